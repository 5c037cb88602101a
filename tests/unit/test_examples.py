"""The example that puts gnConv into another network runs as documented."""
import timm

from examples.gnconv_in_convnext import swap_in_gnconv, train
from models.gnconv import GnConv


def test_every_depthwise_convolution_is_replaced_and_the_network_learns(tmp_path):
    model = timm.create_model("convnext_atto")
    assert swap_in_gnconv(model) == sum(isinstance(module, GnConv) for module in model.modules()) == 12
    losses = train(tmp_path / "sample", updates=16, batch_size=16)
    assert len(losses) == 16 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
