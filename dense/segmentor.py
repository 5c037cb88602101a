"""Segmentors: HorNet, UPerHead (Xiao et al., 2018) or HorFPN's GNUPerHead, and an auxiliary head in training.

Names, shapes and order of the parameters are the published ones; initial values too.
"""
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense.backbone import Backbone, Filters
from dense.necks import ConvNormAct, Filter, GnConvLayer

WIDTH, AUXILIARY_WIDTH = 512, 256
POOLS = (1, 2, 3, 6)
DROPOUT, AUXILIARY_WEIGHT, IGNORED = 0.1, 0.4, 255


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) at `size`, bilinear, corners not aligned."""
    return F.interpolate(x, size=(size[0], size[1]), mode="bilinear", align_corners=False)


class AveragePool(nn.AdaptiveAvgPool2d):
    """Averages over size x size parts; for an exported graph as two products, so that sizes stay free."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(x)
        rows, columns = (self._weights(side, x) for side in x.shape[2:])
        return rows @ x @ columns.T

    def _weights(self, side: int, like: Tensor) -> Tensor:
        """(size, side): each row the share of the pixels of one part."""
        count, pixels = cast(int, self.output_size), torch.arange(side, device=like.device)
        part = torch.arange(count, device=like.device)[:, None]
        inside = (pixels >= part * side // count) & (pixels < ((part + 1) * side + count - 1) // count)
        return inside.to(like.dtype) / inside.sum(dim=1, keepdim=True)


class Classifier(nn.Module):
    """The end of a head: dropout of whole maps, then a 1x1 convolution to the classes (`conv_seg`)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.channels, self.dropout = channels, DROPOUT
        self.conv_seg = nn.Conv2d(channels, classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """Logits; in training `draws` (B, channels), uniform in [0, 1) and drawn here when None, decide which
        maps are dropped."""
        if self.training and self.dropout > 0:
            draws = torch.rand(x.shape[:2], device=x.device) if draws is None else draws
            x = x * ((draws >= self.dropout) / (1 - self.dropout))[:, :, None, None].to(x.dtype)
        return self.conv_seg(x)


class UPerHead(Classifier):
    """Four maps to logits (B, classes, H_0, W_0).

    `filter`: None for the 3x3 fusion of UPerNet, else "conv" or a filter's grid for GNUPerHead's gnConv.
    """

    def __init__(self, channels: Sequence[int], classes: int, filter: Filter | None = None,
                 width: int = WIDTH):
        super().__init__(width, classes)
        *lower, last = channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AveragePool(pool), ConvNormAct(last, width)) for pool in POOLS)
        self.bottleneck = ConvNormAct(last + len(POOLS) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(c, width) for c in lower)
        self.fpn_convs = nn.ModuleList(ConvNormAct(width, width, 3) for _ in lower)
        joined = len(channels) * width
        self.fpn_bottleneck = (ConvNormAct(joined, width, 3) if filter is None
                               else GnConvLayer(joined, width, filter, norm=True))

    def forward(self, maps: Sequence[Tensor], draws: Tensor | None = None) -> Tensor:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps)] + [self.pyramid(maps[-1])]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resized(levels[i], levels[i - 1].shape[2:])
        levels = [*(conv(x) for conv, x in zip(self.fpn_convs, levels)), levels[-1]]
        joined = torch.cat([levels[0], *(resized(x, levels[0].shape[2:]) for x in levels[1:])], dim=1)
        return self.classify(self.fpn_bottleneck(joined), draws)

    def pyramid(self, x: Tensor) -> Tensor:
        """The last map with its own averages over 1, 4, 9 and 36 parts."""
        pooled = [resized(module(x), x.shape[2:]) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class AuxiliaryHead(Classifier):
    """One map to logits of its size: a second loss in training, without use in inference."""

    def __init__(self, channels: int, classes: int, width: int = AUXILIARY_WIDTH):
        super().__init__(width, classes)
        self.convs = nn.ModuleList([ConvNormAct(channels, width, 3)])

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        return self.classify(self.convs[0](x), draws)


class Segmentor(nn.Module):
    """Images float (B, 3, H, W) to logits (B, classes, H, W); in training to (logits, auxiliary logits), both
    at the heads' own sizes.

    Args:
        model: name of the HorNet.
        filters: grids of its filters, as in `Backbone`.
        head_filter: None for UPerNet; "conv" or a grid for HorFPN.
        width, auxiliary_width: of the heads, 512 and 256 as published.
    """

    def __init__(self, model: str, classes: int = 150, filters: Filters | None = None,
                 head_filter: Filter | None = None, drop_path: float = 0.0, width: int = WIDTH,
                 auxiliary_width: int = AUXILIARY_WIDTH, layer_scale_init_value: float = 1e-6):
        super().__init__()
        self.backbone = Backbone(model, filters, drop_path, layer_scale_init_value)
        channels, self.in_chans = self.backbone.channels, 3
        self.decode_head = UPerHead(channels, classes, head_filter, width)
        self.auxiliary_head = AuxiliaryHead(channels[2], classes, auxiliary_width)

    @property
    def num_drop_draws(self) -> int:
        """Uniform draws per image: the backbone's for drop path, then a draw per map of each head."""
        return self.backbone.num_drop_draws + self.decode_head.channels + self.auxiliary_head.channels

    def forward(self, x: Tensor, drop_draws: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.training:
            return self.both(x, drop_draws)
        return resized(self.decode_head(self.backbone(x)), x.shape[2:])

    def both(self, x: Tensor, drop_draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the decode head (stride 4) and the auxiliary head (stride 16)."""
        sizes = [self.backbone.num_drop_draws, self.decode_head.channels, self.auxiliary_head.channels]
        draws = [None] * 3 if drop_draws is None else drop_draws.split(sizes, dim=1)
        maps = self.backbone(x, draws[0])
        return self.decode_head(maps, draws[1]), self.auxiliary_head(maps[2], draws[2])


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C, h, w), resized to labels int64 (B, H, W), over **all** pixels: ignored
    ones (255) add nothing and count in the divisor, as published, so padded crops weigh less."""
    losses = F.cross_entropy(resized(logits, labels.shape[1:]), labels, ignore_index=IGNORED, reduction="sum")
    return losses / labels.numel()
