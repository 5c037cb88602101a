"""The yardstick of every ratio: the published model in its plain formulation, and the plain update step.

Computed with the weights of a HorNet of this project, but as the authors' code computes: layout NCHW;
LayerNorm over channels written as mean, variance and scale; complex FFT with the filter resized on every
forward that needs it; chunks and concatenations; drop path as a mask; AdamW as a loop over tensors; EMA as a
loop over state-dict entries. Nothing here is tuned and nothing may be slowed down: a test holds it to the
published logits, and the product is measured against it.
Source: HorNet (Rao et al., NeurIPS 2022), sections 3.1-3.3.
"""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gnconv import GlobalLocalFilter, GnConv
from models.hornet import Block, HorNet


class PlainHorNet(nn.Module):
    """The network `model` in the plain formulation.

    `forward(x, drop_draws)` as the model's own, without draws no path is dropped.
    """

    def __init__(self, model: HorNet):
        super().__init__()
        self.model, self.depths = model, model.cfg.depths
        self.rates = torch.linspace(0, model.drop_path_rate, sum(self.depths), device="cpu").tolist()

    def forward(self, x: Tensor, drop_draws: Tensor | None = None) -> Tensor:
        x, rates = x.contiguous(), iter(self.rates)
        draws = iter(() if drop_draws is None else drop_draws.unbind(1))
        for (one, two), stage in zip(self.model.downsample_layers, self.model.stages):
            x = channel_norm(two, one(x)) if isinstance(one, nn.Conv2d) else two(channel_norm(one, x))
            for each in stage:
                x = block(each, x, next(rates), next(draws, None), next(draws, None))
        return self.model.head(self.model.norm(x.mean((-2, -1))))


def block(layer: Block, x: Tensor, p: float, first: Tensor | None, second: Tensor | None) -> Tensor:
    """x + drop(gamma1 * gnConv(LN(x))), then x + drop(gamma2 * MLP(LN(x)))."""
    y = gnconv(layer.gnconv, channel_norm(layer.norm1, x))
    x = x + drop_path(layer.gamma1.view(-1, 1, 1) * y, p, first)
    y = layer.norm2(x.permute(0, 2, 3, 1))
    y = layer.gamma2 * layer.pwconv2(F.gelu(layer.pwconv1(y)))
    return x + drop_path(y.permute(0, 3, 1, 2), p, second)


def gnconv(layer: GnConv, x: Tensor) -> Tensor:
    """gnConv of one order on (B, C, H, W)."""
    first, rest = torch.split(layer.proj_in(x), [layer.dims[0], sum(layer.dims)], dim=1)
    spatial = layer.dwconv
    rest = global_local(spatial, rest) if isinstance(spatial, GlobalLocalFilter) else spatial(rest)
    gates = torch.split(rest * layer.scale, layer.dims, dim=1)
    x = first * gates[0]
    for pw, gate in zip(layer.pws, gates[1:]):
        x = pw(x) * gate
    return layer.proj_out(x)


def global_local(layer: GlobalLocalFilter, x: Tensor) -> Tensor:
    """Half of the channels through a depthwise 3x3, half through a learned filter in the Fourier domain."""
    local, spectral = channel_norm(layer.pre_norm, x).chunk(2, dim=1)
    local, weight = layer.dw(local), layer.complex_weight
    spectral = torch.fft.rfft2(spectral.float(), dim=(2, 3), norm="ortho")
    if weight.shape[1:3] != spectral.shape[2:4]:
        weight = F.interpolate(weight.permute(3, 0, 1, 2), size=spectral.shape[2:4], mode="bilinear",
                               align_corners=True).permute(1, 2, 3, 0)
    spectral = spectral * torch.view_as_complex(weight.contiguous())
    spectral = torch.fft.irfft2(spectral, s=local.shape[2:], dim=(2, 3), norm="ortho")
    x = torch.cat([local.unsqueeze(2), spectral.unsqueeze(2)], dim=2)
    return channel_norm(layer.post_norm, x.flatten(1, 2))


def channel_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W), written out."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + layer.eps)
    return layer.weight[:, None, None] * x + layer.bias[:, None, None]


def drop_path(x: Tensor, p: float, draws: Tensor | None) -> Tensor:
    """Zero whole samples of a branch where the draw is below `p`, scale the others by 1 / (1 - p)."""
    if p == 0 or draws is None:
        return x
    kept = (draws >= p).to(x.dtype).div_(1 - p)
    return x * kept.view(-1, 1, 1, 1)


class PlainUpdate:
    """Clipping by global norm tensor by tensor, AdamW as a loop, EMA over each state-dict entry."""

    backward = staticmethod(Tensor.backward)

    def __init__(self, model: nn.Module):
        self.model, self.average = model, copy.deepcopy(model)
        self.adamw = torch.optim.AdamW(model.parameters(), 1e-5, foreach=False, fused=False)

    @torch.no_grad()
    def step(self, _: int) -> None:
        """Apply the gradients, and forget them."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=False)
        self.adamw.step()
        self.adamw.zero_grad()
        for old, new in zip(self.average.state_dict().values(), self.model.state_dict().values()):
            old.copy_(0.9999 * old + 0.0001 * new)
