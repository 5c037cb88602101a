"""Recursive gated convolution (gnConv) of HorNet: NeurIPS 2022, arXiv:2207.14284, section 3.1.

This file needs torch and nothing else: copy it into another project and `from gnconv import GnConv`.

    mixer = GnConv(dim=96, order=3)                      # 7x7 depthwise convolution
    mixer = GnConv(dim=96, order=3, filter="global")     # global-local filter instead
    y = mixer(torch.randn(2, 96, 28, 28))                # (B, C, H, W) in, (B, out_dim, H, W) out

Inside, tensors are NHWC, so that a 1x1 convolution is a plain matrix product and a layer norm reads
consecutive values. The permutations at the borders are views of a channels_last tensor and cost nothing there.
"""
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Operators:
    """The operations a HorNet is made of, each on NHWC tensors, in plain PyTorch.

    A faster implementation is a subclass, given to a model with `HorNet.set_operators` (or set as the
    attribute `ops` of a single module). Every method must be differentiable wherever the plain one is.
    """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) -> (..., out); `weight` is (out, in) or that of a 1x1 convolution, (out, in, 1, 1)."""
        if x.dtype == torch.float32 and weight.dtype == torch.float16:  # a .half() model's float32 part
            weight, bias = weight.float(), None if bias is None else bias.float()
        return F.linear(x, weight.flatten(1), bias)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Linear, then the exact (erf) GELU."""
        return F.gelu(self.linear(x, weight, bias))

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Over the last axis; a float32 input stays float32 with half-precision parameters."""
        if x.dtype == torch.float32:
            weight, bias = weight.float(), bias.float()
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def depthwise(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        """x (B, H, W, C), weight (C, 1, k, k) with odd k, zero padding k // 2; `scale` multiplies weight and bias."""
        if scale != 1:  # on the small parameters, which saves a pass over x
            weight, bias = weight * scale, None if bias is None else bias * scale
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
        return out.permute(0, 2, 3, 1)

    def patch_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, H, W, in), weight (out, in, k, k): a convolution with stride k and no padding."""
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=weight.shape[2]).permute(0, 2, 3, 1)

    def global_filter(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x (B, H, W, C) by a learned filter in the 2-D Fourier domain, norm "ortho".

        `weight` (C, h, w, 2) holds real and imaginary parts and is resized to (H, W // 2 + 1). Computed
        and returned in float32 (float64 for float64 input) whatever the input or autocast says: sums over all
        positions leave the range of float16 and the precision of bfloat16.
        """
        height, width = x.shape[1:3]
        dtype = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft2(x.to(dtype), dim=(1, 2), norm="ortho")
        weight = resize_filter(weight.to(dtype), (height, width // 2 + 1))
        spectrum = spectrum * torch.view_as_complex(weight.permute(1, 2, 0, 3).contiguous())
        return torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2), norm="ortho")

    def global_local(self, x: Tensor, weight: Tensor, spectrum: Tensor) -> Tensor:
        """x (B, H, W, 2 C): depthwise `weight` on the first half of the channels, `global_filter` on the second.

        The results alternate: local 0, global 0, local 1, ...
        """
        local, remote = x.chunk(2, dim=-1)
        local, remote = self.depthwise(local, weight, None), self.global_filter(remote, spectrum)
        if local.dtype == torch.float16:  # the filter's output may leave float16's range before the norm
            local = local.float()
        return torch.stack((local, remote.to(local.dtype)), dim=-1).flatten(-2)

    def gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """The gating product, elementwise."""
        return x * gate

    def recursion(self, p: Tensor, q: Tensor, projections: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """x = p * q[0], then x = linear(x, *projections[k]) * q[k + 1]; q's parts lie side by side in its channels."""
        gates = q.split([p.shape[-1], *(weight.shape[0] for weight, _ in projections)], dim=-1)
        x = self.gate(p, gates[0])
        for (weight, bias), gate in zip(projections, gates[1:]):
            x = self.gate(self.linear(x, weight, bias), gate)
        return x

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], gamma: Tensor | None,
                 keep: Tensor | None) -> Tensor:
        """x + keep * gamma * branch(x), with x (B, H, W, C), gamma (C,) or None, keep (B,) or None (0: dropped).

        The sum has the wider type of x and gamma: under autocast the residual stream stays float32.
        """
        out, factor = branch(x), gamma
        if keep is not None:
            keep = keep[:, None, None, None]
            factor = keep if gamma is None else keep * gamma
        dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
        return (x + out if factor is None else x + out * factor).to(dtype)


PLAIN = Operators()


def resize_filter(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A filter (C, h, w, 2) at another grid `size`, bilinear with corners aligned, as published."""
    if tuple(weight.shape[1:3]) == tuple(size):
        return weight
    resized = F.interpolate(weight.permute(3, 0, 1, 2), size=size, mode="bilinear", align_corners=True)
    return resized.permute(1, 2, 3, 0)


def gnconv_dims(dim: int, order: int) -> list[int]:
    """Widths of the recursion, dim / 2^(order-1), ..., dim / 2, dim; ValueError when the division leaves a rest."""
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"gnConv order {order!r}: a whole number from 1 on is needed")
    step = 2 ** (order - 1)
    if dim < step or dim % step:
        nearest = max(step, round(dim / step) * step)
        largest = (dim & -dim).bit_length() if dim > 0 else 0
        raise ValueError(f"gnConv of order {order} halves its width {order - 1} times, and dim {dim} is not a multiple "
                         f"of {step}; the nearest width is {nearest}, the largest order for {dim} is {largest}")
    return [dim // 2 ** i for i in reversed(range(order))]


class GlobalLocalFilter(nn.Module):
    """Half the channels through a depthwise 3x3 convolution, half through a learned filter in the Fourier domain.

    Args:
        dim: channels, even.
        size: the filter's grid (h, w): the feature map's height and half its width + 1 where it was trained,
            (14, 8) for 14x14. Other feature sizes work; the filter is then resized on the fly.

    Input and output are (B, dim, H, W), any memory format; channels come out interleaved: local 0, global 0,
    local 1, global 1, ...
    """

    ops: Operators = PLAIN

    def __init__(self, dim: int, size: tuple[int, int] = (14, 8)):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"GlobalLocalFilter dim {dim}: an even number is needed, half of it goes to each branch")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"GlobalLocalFilter size {size!r}: positive (height, width // 2 + 1) is needed")
        self.dw = nn.Conv2d(dim // 2, dim // 2, kernel_size=3, padding=1, bias=False, groups=dim // 2)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, *size, 2))
        self.pre_norm = nn.LayerNorm(dim, eps=1e-6)
        self.post_norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`scale` multiplies the output; it is folded into the last norm's parameters."""
        pre, post = self.pre_norm, self.post_norm
        x = self.ops.layer_norm(x.permute(0, 2, 3, 1), pre.weight, pre.bias, pre.eps)
        x = self.ops.global_local(x, self.dw.weight, self.complex_weight)
        weight, bias = (post.weight, post.bias) if scale == 1 else (post.weight * scale, post.bias * scale)
        return self.ops.layer_norm(x, weight, bias, post.eps).permute(0, 3, 1, 2)


class GnConv(nn.Module):
    """Recursive gated convolution of a given order.

    `proj_in` makes (p, q) of widths d / 2^(order-1) and the sum of all widths; q goes through a spatial operator
    and is multiplied by `scale`; then x = p * q[0], x = pws[k](x) * q[k + 1], and `proj_out`.

    Args:
        dim: input channels, a multiple of 2^(order-1) (of 2^order with a global filter).
        order: number of gating products, >= 1.
        kernel_size: of the depthwise convolution, odd.
        scale: the published models use 1/3.
        out_dim: output channels, `dim` by default.
        filter: "conv" for the depthwise convolution, "global" for a GlobalLocalFilter trained at 14x14
            features, or its grid (height, width // 2 + 1) for another feature size.

    Input (B, dim, H, W), any memory format and floating type; output (B, out_dim, H, W), a channels_last view.
    In float16 the products of up to `order` factors, which can leave its range, and the projections between
    them are computed in float32; bfloat16 has float32's range and needs none of this.

    Raises:
        ValueError: for a width, kernel size or filter that does not fit, naming what does.
    """

    ops: Operators = PLAIN

    def __init__(self, dim: int, order: int = 5, kernel_size: int = 7, scale: float = 1 / 3,
                 out_dim: int | None = None, filter: str | tuple[int, int] = "conv"):
        super().__init__()
        self.dim, self.order, self.scale = dim, order, scale
        self.dims = gnconv_dims(dim, order)
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * dim, kernel_size=1)
        if filter == "conv":
            if kernel_size < 1 or kernel_size % 2 == 0:
                raise ValueError(f"gnConv kernel_size {kernel_size}: an odd number is needed, so that sizes stay equal")
            self.dwconv = nn.Conv2d(total, total, kernel_size, padding=kernel_size // 2, groups=total)
        elif filter == "global" or isinstance(filter, (tuple, list)):
            if total % 2:
                raise ValueError(f"gnConv of order {order} with a global filter needs a dim that is a multiple of "
                                 f"{2 ** order}, not {dim}: the filter takes half of the {total} gated channels")
            self.dwconv = GlobalLocalFilter(total, (14, 8) if filter == "global" else tuple(filter))
        else:
            raise ValueError(f'gnConv filter {filter!r}: "conv", "global" or a grid such as (14, 8) is needed')
        self.proj_out = nn.Conv2d(dim, dim if out_dim is None else out_dim, kernel_size=1)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, kernel_size=1) for a, b in zip(self.dims, self.dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"gnConv needs an input (batch, {self.dim}, height, width), not {tuple(x.shape)}")
        fused = self.ops.linear(x.permute(0, 2, 3, 1), self.proj_in.weight, self.proj_in.bias)
        p, q = fused.split((self.dims[0], sum(self.dims)), dim=-1)
        q = self._spatial(q)
        if p.dtype != torch.float16:
            return self._recurse(p, q).permute(0, 3, 1, 2)
        with _without_autocast(x.device.type):
            out = self._recurse(p.float(), q.float()).permute(0, 3, 1, 2)
        # A .half() module gives float16 back; under autocast the parameters are float32 and so is the output.
        return out.to(torch.promote_types(x.dtype, self.proj_out.weight.dtype))

    def _spatial(self, q: Tensor) -> Tensor:
        """The depthwise operator, multiplied by the scale."""
        if isinstance(self.dwconv, GlobalLocalFilter):
            return self.dwconv(q.permute(0, 3, 1, 2), self.scale).permute(0, 2, 3, 1)
        return self.ops.depthwise(q, self.dwconv.weight, self.dwconv.bias, self.scale)

    def _recurse(self, p: Tensor, q: Tensor) -> Tensor:
        x = self.ops.recursion(p, q, [(pw.weight, pw.bias) for pw in self.pws])
        return self.ops.linear(x, self.proj_out.weight, self.proj_out.bias)


def _without_autocast(device_type: str):
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()
