"""The example that puts gnConv into another network runs as documented."""
import timm
import torch
from timm.models.convnext import ConvNeXtBlock

from examples.gnconv_in_convnext import swap_in_gnconv, train
from models.gnconv import GnConv


def test_every_depthwise_convolution_is_replaced():
    model = timm.create_model("convnext_atto", num_classes=10)
    blocks = [m for m in model.modules() if isinstance(m, ConvNeXtBlock)]
    assert swap_in_gnconv(model) == len(blocks) == 12
    assert all(isinstance(block.conv_dw, GnConv) for block in blocks)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_the_swapped_network_learns(tmp_path):
    losses = train(tmp_path / "sample", updates=16, batch_size=16)
    assert len(losses) == 16 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
