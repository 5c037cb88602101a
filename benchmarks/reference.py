"""The yardstick of every ratio: the published model in its plain formulation, and the plain update step.

Layout NCHW; LayerNorm over channels written as mean, variance and scale; 1x1 convolutions; complex FFT with
the filter resized on every forward that needs it; chunks and concatenations; drop path as a mask; AdamW as a
loop over tensors; EMA as a loop over state-dict entries. Nothing here is tuned and nothing may be slowed
down: tests hold it to the published figures, and the product is measured against it.
Source: HorNet (Rao et al., NeurIPS 2022), sections 3.1-3.3.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), written out."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GlobalLocal(nn.Module):
    """Half of the channels through a depthwise 3x3, half through a learned filter in the Fourier domain."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        half = channels // 2
        self.dw = nn.Conv2d(half, half, 3, padding=1, bias=False, groups=half)
        self.complex_weight = nn.Parameter(torch.randn(half, height, width, 2) * 0.02)
        self.pre_norm = ChannelNorm(channels)
        self.post_norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        local, spectral = self.pre_norm(x).chunk(2, dim=1)
        local = self.dw(local)
        batch, half, height, width = spectral.shape
        spectral = torch.fft.rfft2(spectral.float(), dim=(2, 3), norm="ortho")
        weight = self.complex_weight
        if weight.shape[1:3] != spectral.shape[2:4]:
            weight = F.interpolate(weight.permute(3, 0, 1, 2), size=spectral.shape[2:4], mode="bilinear",
                                   align_corners=True).permute(1, 2, 3, 0)
        spectral = spectral * torch.view_as_complex(weight.contiguous())
        spectral = torch.fft.irfft2(spectral, s=(height, width), dim=(2, 3), norm="ortho")
        x = torch.cat([local.unsqueeze(2), spectral.unsqueeze(2)], dim=2)
        return self.post_norm(x.reshape(batch, 2 * half, height, width))


class RecursiveGate(nn.Module):
    """gnConv of one order on (B, C, H, W)."""

    def __init__(self, dim: int, order: int, grid: tuple[int, int] | None, scale: float = 1 / 3):
        super().__init__()
        self.widths = [dim // 2 ** i for i in range(order)][::-1]
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        total = sum(self.widths)
        if grid is None:
            self.dwconv = nn.Conv2d(total, total, 7, padding=3, groups=total)
        else:
            self.dwconv = GlobalLocal(total, *grid)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.widths, self.widths[1:]))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(self.proj_in(x), (self.widths[0], sum(self.widths)), dim=1)
        gates = torch.split(self.dwconv(rest) * self.scale, self.widths, dim=1)
        x = first * gates[0]
        for pw, gate in zip(self.pws, gates[1:]):
            x = pw(x) * gate
        return self.proj_out(x)


def drop_path(x: Tensor, p: float, draws: Tensor | None) -> Tensor:
    """Zero whole samples of a branch where the draw is below `p`, scale the others by 1 / (1 - p)."""
    if p == 0 or draws is None:
        return x
    kept = (draws >= p).to(x.dtype).div_(1 - p)
    return x * kept.view(-1, 1, 1, 1)


class PlainBlock(nn.Module):
    """x + drop(gamma1 * gnConv(LN(x))), then x + drop(gamma2 * MLP(LN(x)))."""

    def __init__(self, dim: int, order: int, grid: tuple[int, int] | None, p: float):
        super().__init__()
        self.gamma1 = nn.Parameter(1e-6 * torch.ones(dim))
        self.gamma2 = nn.Parameter(1e-6 * torch.ones(dim))
        self.norm1 = ChannelNorm(dim)
        self.gnconv = RecursiveGate(dim, order, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.p = p

    def forward(self, x: Tensor, draws: tuple[Tensor | None, Tensor | None]) -> Tensor:
        x = x + drop_path(self.gamma1.view(-1, 1, 1) * self.gnconv(self.norm1(x)), self.p, draws[0])
        y = self.norm2(x.permute(0, 2, 3, 1))
        y = self.gamma2 * self.pwconv2(self.act(self.pwconv1(y)))
        return x + drop_path(y.permute(0, 3, 1, 2), self.p, draws[1])


class PlainHorNet(nn.Module):
    """The network; `forward(x, drop_draws)` as in the product, so that both drop the same samples."""

    def __init__(self, base: int, depths: tuple[int, ...], grids: tuple, drop_path_rate: float, num_classes: int):
        super().__init__()
        widths = [base * 2 ** i for i in range(4)]
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, base, 4, 4), ChannelNorm(base))])
        for a, b in zip(widths, widths[1:]):
            self.downsample_layers.append(nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, 2)))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(PlainBlock(width, 2 + i, grids[i], next(rates)) for _ in range(depth)))
            for i, (width, depth) in enumerate(zip(widths, depths)))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)
        self.num_drop_draws = 2 * sum(depths)

    def forward(self, x: Tensor, drop_draws: Tensor | None = None) -> Tensor:
        if drop_draws is None and self.training:
            drop_draws = torch.rand(len(x), self.num_drop_draws, device=x.device)
        block_index = 0
        for down, stage in zip(self.downsample_layers, self.stages):
            x = down(x)
            for block in stage:
                pair = (None, None)
                if self.training:
                    pair = drop_draws[:, 2 * block_index], drop_draws[:, 2 * block_index + 1]
                x = block(x, pair)
                block_index += 1
        return self.head(self.norm(x.mean((-2, -1))))


WIDTHS = {"pico": 8, "nano": 32, "tiny": 64, "small": 96, "base": 128, "large": 192}


def plain_model(name: str, num_classes: int = 1000, drop_path_rate: float = 0.0) -> PlainHorNet:
    """The plain network with the parameter names and shapes of `name`
    (`hornet_<size>_<7x7|gf|gf_img384>`)."""
    _, size, kind, *rest = name.split("_")
    small = {"pico": (1, 1, 1, 1), "nano": (1, 1, 3, 1)}
    last = ((24, 13), (12, 7)) if rest == ["img384"] else ((4, 3), (2, 2)) if size in small else ((14, 8), (7, 4))
    grids = (None, None, *last) if kind == "gf" else (None,) * 4
    return PlainHorNet(WIDTHS[size], small.get(size, (2, 3, 18, 2)), grids, drop_path_rate, num_classes)


@dataclass
class PlainUpdate:
    """Clip by global norm tensor by tensor, AdamW as a loop, EMA over every state-dict entry."""

    model: nn.Module
    shadow: nn.Module
    max_norm: float = 1.0
    decay: float = 0.9999

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-3, weight_decay=0.05,
                                           foreach=False, fused=False)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm, foreach=False)
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.shadow.state_dict().values(), self.model.state_dict().values()):
                old.copy_(self.decay * old + (1 - self.decay) * new)
