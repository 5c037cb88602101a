"""The global filter without a Fourier transform: real matrix products, for compilers and other runtimes.

Many runtimes lack FFT operators and complex numbers, and torch.compile's Inductor has open bugs that give
wrong values around FFTs (pytorch#143719, #181625); at HorNet's sizes the products are the faster form anyway.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gnconv import GlobalLocalFilter, without_autocast


def use_matrix_filter(model: nn.Module, use: bool = True) -> None:
    """Let every GlobalLocalFilter of `model` compute with `matrix_filter`, or with the FFT again."""
    for module in model.modules():
        if isinstance(module, GlobalLocalFilter):
            module.fourier = matrix_filter if use else None


def matrix_filter(x: Tensor, weight: Tensor) -> Tensor:
    """What `models.gnconv.global_filter` gives, in float32: x (B, C, H, W), weight (C, h, w, 2).

    The matrices are made in the graph from the feature map's size, so that an exported size stays free.
    """
    height, width = x.shape[2], x.shape[3]
    half = width // 2 + 1
    with without_autocast(x.device.type):
        x = x.float().contiguous()  # no branch on strides in the exported graph
        cos_w, sin_w = _turns(half, width, width, x.device)
        cos_h, sin_h = _turns(height, height, height, x.device)
        real, imaginary = F.linear(x, cos_w), -F.linear(x, sin_w)  # along the width, half the spectrum
        real, imaginary = real.transpose(2, 3).contiguous(), imaginary.transpose(2, 3).contiguous()
        real, imaginary = (F.linear(real, cos_h) + F.linear(imaginary, sin_h),
                           F.linear(imaginary, cos_h) - F.linear(real, sin_h))
        a, b = _resized(weight.float(), height, half)  # real and imaginary part, (C, half, height)
        real, imaginary = real * a - imaginary * b, real * b + imaginary * a
        real, imaginary = (F.linear(real, cos_h) - F.linear(imaginary, sin_h),
                           F.linear(imaginary, cos_h) + F.linear(real, sin_h))
        real, imaginary = real.transpose(2, 3).contiguous(), imaginary.transpose(2, 3).contiguous()
        # Columns strictly between 0 and width / 2 stand for two of the full spectrum.
        column = torch.arange(half, device=x.device)
        twice = 1.0 + ((column > 0) & (2 * column != width)).float()
        back_cos, back_sin = (cos_w * twice[:, None]).T.contiguous(), (sin_w * twice[:, None]).T.contiguous()
        return (F.linear(real, back_cos) - F.linear(imaginary, back_sin)) / (height * width)


def _turns(rows: int, columns: int, period: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / period, (rows, columns); the product is reduced as integers, exactly."""
    i, j = torch.arange(rows, device=device), torch.arange(columns, device=device)
    # The divisor is a tensor because ONNX has no remainder by a number known only at run time.
    steps = torch.remainder(i[:, None] * j[None], torch.full((1,), period, dtype=torch.int64, device=device))
    angle = steps.float() * (2 * math.pi / period)
    return angle.cos(), angle.sin()


def _resized(weight: Tensor, height: int, half: int) -> Tensor:
    """(C, h, w, 2) → (2, C, half, height), bilinear with corners aligned.

    Two matrix products: no branch on the size, and exact at the filter's own size.
    """
    rows = _interpolation(weight.shape[1], height, weight)
    columns = _interpolation(weight.shape[2], half, weight)
    across = F.linear(weight.permute(3, 0, 1, 2).contiguous(), columns)
    return F.linear(across.transpose(2, 3).contiguous(), rows)


def _interpolation(source: int, target: int, like: Tensor) -> Tensor:
    """(target, source) weights of linear interpolation."""
    steps = torch.arange(target, device=like.device)
    # Older compilers cannot trace sym_max of plain numbers.
    last = torch.sym_max(target - 1, 1) if isinstance(target, torch.SymInt) else max(target - 1, 1)
    place: Tensor = (steps * (source - 1)).float() / last  # type: ignore[assignment]
    return (1 - (place[:, None] - torch.arange(source, device=like.device)[None]).abs()).clamp_min(0)
