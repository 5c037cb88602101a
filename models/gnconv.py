"""Recursive gated convolution (gnConv) of HorNet: NeurIPS 2022, arXiv:2207.14284, section 3.1.

This file needs torch and nothing else: copy it into another project and `from gnconv import GnConv`.

    mixer = GnConv(dim=96, order=3)                      # 7x7 depthwise convolution
    mixer = GnConv(dim=96, order=3, filter="global")     # global-local filter instead
    y = mixer(torch.randn(2, 96, 28, 28))                # (B, C, H, W) in, (B, out_dim, H, W) out

Tensors are (B, C, H, W). They are fastest in channels_last memory, where a 1x1 convolution is a plain matrix
product and a layer norm reads consecutive values; no module asks for it.
"""
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

# Functions below marked with `torch.fx.wrap` ask for shapes and types, which torch.fx does not know while it
# traces: they stay single calls in its graphs.


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W); the output is channels_last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GnConv(nn.Module):
    """Recursive gated convolution of order n, equations 3 to 5 of the paper:

        p_0, q_0 ... q_{n-1} = proj_in(x)
        p_{k+1} = scale * f_k(q_k) * g_k(p_k)        g_0 the identity, g_k = pws[k - 1]
        out     = proj_out(p_n)

    `dwconv` is all the f_k at once; the widths of q_0 ... q_{n-1} are dim / 2^(n-1), ..., dim / 2, dim.

    Args:
        dim: width of the recursion, a multiple of 2^(order-1) (of 2^order with a global filter).
        order: number of gating products, >= 1.
        kernel_size: of the depthwise convolution, odd.
        scale: the published models use 1/3.
        out_dim, in_dim: output and input channels, `dim` where not given.
        filter: "conv" for the depthwise convolution, "global" for a GlobalLocalFilter trained at 14x14
            features, or its grid (height, width // 2 + 1) for another feature size.

    Input (B, in_dim, H, W), any memory format and floating type; output (B, out_dim, H, W).
    In float16 the products of up to `order` factors, which can leave its range, and the projections between
    them are computed in float32; bfloat16 has float32's range and needs none of this.

    Raises:
        ValueError: for a width, kernel size or filter that does not fit, naming what does.
    """

    def __init__(self, dim: int, order: int = 5, kernel_size: int = 7, scale: float = 1 / 3,
                 out_dim: int | None = None, filter: str | tuple[int, int] = "conv", in_dim: int = 0):
        super().__init__()
        self.dim, self.order, self.scale = dim, order, scale
        self.dims = gnconv_dims(dim, order)
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(in_dim or dim, 2 * dim, kernel_size=1)
        if filter == "conv":
            if kernel_size < 1 or kernel_size % 2 == 0:
                raise ValueError(f"gnConv kernel_size {kernel_size}: an odd number is needed, to keep sizes")
            self.dwconv = nn.Conv2d(total, total, kernel_size, padding=kernel_size // 2, groups=total)
        elif filter == "global" or isinstance(filter, (tuple, list)):
            height, width = (14, 8) if filter == "global" else filter
            self.dwconv = GlobalLocalFilter(total, (height, width))
        else:
            raise ValueError(f'gnConv filter {filter!r}: "conv", "global" or a grid like (14, 8) is needed')
        self.proj_out = nn.Conv2d(dim, out_dim or dim, kernel_size=1)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, kernel_size=1) for a, b in zip(self.dims, self.dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.proj_in(x).split((self.dims[0], sum(self.dims)), dim=1)
        q = self.dwconv(q)
        if not computes_in_float16(self.proj_out):
            return self._recurse(p, q, nn.Module.__call__)
        weight = next(self.proj_out.parameters())
        with without_autocast(weight.device.type):
            # A .half() module gives float16 back; under autocast parameters and output are float32.
            return self._recurse(p.float(), q.float(), call_in_float32).to(weight.dtype)

    def _recurse(self, p: Tensor, q: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        gates = q.split(self.dims, dim=1)
        p = gated(p, gates[0], self.scale)
        for k, pw in enumerate(self.pws, start=1):
            p = gated(call(pw, p), gates[k], self.scale)
        return call(self.proj_out, p)


class GlobalLocalFilter(nn.Module):
    """Half the channels through a depthwise 3x3 convolution, half through a filter in the Fourier domain.

    Args:
        dim: channels, even.
        size: the filter's grid (h, w): the feature map's height and half its width + 1 where it was trained,
            (14, 8) for 14x14. Other feature sizes work; the filter is then resized on the fly.

    Input and output are (B, dim, H, W), any memory format; channels come out interleaved: local 0, global 0,
    local 1, global 1, ...

    Attributes:
        fourier: None, or a function that computes what `global_filter` does in another way.
    """

    fourier: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, dim: int, size: tuple[int, int] = (14, 8)):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"GlobalLocalFilter dim {dim}: an even number is needed, half for each branch; "
                             "the dim of a gnConv of order n with a filter must be a multiple of 2^n")
        self.dw = nn.Conv2d(dim // 2, dim // 2, kernel_size=3, padding=1, bias=False, groups=dim // 2)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, *size, 2))
        self.pre_norm = LayerNorm2d(dim, eps=1e-6)
        self.post_norm = LayerNorm2d(dim, eps=1e-6)
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        local, remote = self.pre_norm(x).chunk(2, dim=1)
        remote = (self.fourier or global_filter)(remote, self.complex_weight)
        post_norm = call_in_float32 if computes_in_float16(self.post_norm) else nn.Module.__call__
        return post_norm(self.post_norm, interleave(self.dw(local), remote))


def gated(x: Tensor, gate: Tensor, scale: float) -> Tensor:
    """scale * x * gate, elementwise."""
    # torch.addcmul would do it in one pass and take four backwards instead of three.
    return x * scale * gate


@torch.fx.wrap
def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (B, C, H, W) by a learned filter in the 2-D Fourier domain, norm "ortho".

    `weight` (C, h, w, 2) holds real and imaginary parts and is resized to (H, W // 2 + 1). Computed and
    returned in float32 (float64 for float64 input) whatever the input or autocast says: sums over all
    positions leave the range of float16 and the precision of bfloat16.
    """
    height, width = x.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft2(x.to(dtype), dim=(2, 3), norm="ortho")
    weight = resize_filter(weight.to(dtype), (height, width // 2 + 1))
    spectrum = spectrum * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(spectrum, s=(height, width), dim=(2, 3), norm="ortho")


def resize_filter(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A filter (C, h, w, 2) at another grid `size`, bilinear with corners aligned, as published."""
    if tuple(weight.shape[1:3]) == tuple(size):
        return weight
    resized = F.interpolate(weight.permute(3, 0, 1, 2), size=size, mode="bilinear", align_corners=True)
    return resized.permute(1, 2, 3, 0)


@torch.fx.wrap
def interleave(local: Tensor, remote: Tensor) -> Tensor:
    """Two (B, C, H, W) as (B, 2 C, H, W): local 0, remote 0, local 1, ...; channels_last in memory."""
    if local.dtype == torch.float16:  # the filter's output may leave float16's range before the norm
        local = local.float()
    pair = local.permute(0, 2, 3, 1), remote.to(local.dtype).permute(0, 2, 3, 1)
    return torch.stack(pair, dim=-1).flatten(-2).permute(0, 3, 1, 2)


def gnconv_dims(dim: int, order: int) -> list[int]:
    """Widths of the recursion, dim / 2^(order-1), ..., dim / 2, dim; ValueError when one is not whole."""
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"gnConv order {order!r}: a whole number from 1 on is needed")
    if dim < 1 or dim % 2 ** (order - 1):
        raise ValueError(f"gnConv of order {order} halves its width {order - 1} times, and dim {dim} is not "
                         f"a multiple of {2 ** (order - 1)}")
    return [dim // 2 ** i for i in reversed(range(order))]


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on `device`, a kind such as "cuda"; None without."""
    # Not torch.amp.is_autocast_available, which older compilers cannot trace.
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def without_autocast(device: str):
    """A context without autocast on `device`."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def computes_in_float16(module: nn.Module) -> bool:
    """Whether `module` gives float16: after `.half()`, or under such an autocast.

    Read from its parameters, not from its input, so that torch.fx can trace through the decision.
    """
    weight = next(module.parameters(), None)
    return weight is not None and torch.float16 in (weight.dtype, autocast_dtype(weight.device.type))


def call_in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) with its parameters in float32, whatever they are stored in; its hooks are called."""
    parameters = dict(module.named_parameters())
    if all(p.dtype != torch.float16 for p in parameters.values()):
        return module(x)
    return torch.func.functional_call(module, {name: p.float() for name, p in parameters.items()}, (x,))
