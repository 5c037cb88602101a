"""gnConv as a part: it takes the place of the depthwise convolutions in a timm ConvNeXt and trains for a few
updates.

    python examples/gnconv_in_convnext.py

Needs no ImageNet: the images are handwritten digits from scikit-learn, written to data/digits on the first
run.
"""
import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without installing

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from datasets.sample import ensure_sample
from models.gnconv import GnConv

ORDERS = (2, 3, 4, 5)  # per stage, as in HorNet: wider features take higher orders


def swap_in_gnconv(model: nn.Module, orders: tuple[int, ...] = ORDERS) -> int:
    """Replace every block's depthwise convolution in a timm ConvNeXt; returns how many were replaced.

    GnConv maps (B, C, H, W) to the same shape, as the depthwise convolution does. Its width has to be a
    multiple of 2^(order-1), which the error would say.
    """
    replaced = 0
    for stage, order in zip(model.stages, orders, strict=True):
        for block in stage.blocks:
            block.conv_dw = GnConv(block.conv_dw.out_channels, order)
            replaced += 1
    return replaced


def train(folder: Path, updates: int, batch_size: int = 32) -> list[float]:
    """Train a small ConvNeXt with gnConv on the sample data; returns the loss of each update."""
    torch.manual_seed(0)
    ensure_sample(folder)
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    data = ImageFolder(str(folder / "train"), prepare)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    model = timm.create_model("convnext_atto", num_classes=len(data.classes))
    sys.stdout.write(f"{swap_in_gnconv(model)} depthwise convolutions replaced by gnConv\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    endless, losses = itertools.chain.from_iterable(itertools.repeat(loader)), []
    for images, targets in itertools.islice(endless, updates):
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            mean = sum(losses[-10:]) / 10
            sys.stdout.write(f"update {len(losses):3d}  mean loss of the last ten {mean:.3f}\n")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="gnConv in a timm ConvNeXt, trained for a few updates.")
    parser.add_argument("--data_path", type=Path, default=Path("data/digits"),
                        help="where the sample data lies")
    parser.add_argument("--updates", type=int, default=40, help="updates to train (default 40)")
    arguments = parser.parse_args()
    train(arguments.data_path, arguments.updates)
