"""Layers between backbone and heads: convolution-norm-activation, gnConv of HorFPN, FPN and GNFPN.

HorFPN (HorNet, NeurIPS 2022, section 3.3) puts gnConv in place of the 3x3 convolutions that join a pyramid's
levels. Names and initial values are the published ones.
"""
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.gnconv import GnConv

Filter = str | tuple[int, int]
HORFPN_FILTER = (32, 17)  # grid of the global-local filters in published HorFPN layers


class ConvNormAct(nn.Module):
    """Convolution that keeps sizes (`conv`), BatchNorm (`bn`), ReLU; with norm=False a bias and nothing else,
    unless `act` adds a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, *, norm: bool = True,
                 act: bool | None = None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(out_channels) if norm else None
        self.act = norm if act is None else act
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) if self.bn is None else self.bn(self.conv(x))
        return F.relu(x) if self.act else x


class GnConvLayer(GnConv):
    """gnConv of order 2 from `in_channels` to `out_channels`, without the backbone's factor 1/3; with
    norm=True BatchNorm (`bn`) and ReLU follow.

    `filter` is "conv" for a 7x7 depthwise convolution, or the grid of a global-local filter.
    """

    def __init__(self, in_channels: int, out_channels: int, filter: Filter, norm: bool = False):
        super().__init__(out_channels, order=2, scale=1.0, filter=filter, in_dim=in_channels)
        self.bn = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.bn is None else F.relu(self.bn(x))


class FPN(nn.Module):
    """Four maps (B, channels[i], H_i, W_i) to five (B, 256, …); the fifth is every second pixel of the
    fourth.

    Args:
        channels: of the backbone's maps.
        filter: None for FPN's 3x3 output convolutions; for GNFPN "conv" (7x7 gnConv) or a filter's grid.
    """

    def __init__(self, channels: Sequence[int], filter: Filter | None = None, width: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvNormAct(c, width, norm=False) for c in channels)
        self.fpn_convs = nn.ModuleList(
            ConvNormAct(width, width, 3, norm=False) if filter is None else GnConvLayer(width, width, filter)
            for _ in channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        for i in range(len(levels) - 1, 0, -1):  # nearest here, bilinear in the segmentors' head
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels)]
        return [*outputs, F.max_pool2d(outputs[-1], kernel_size=1, stride=2)]
