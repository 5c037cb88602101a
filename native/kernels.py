"""Compile, load and call `kernels.cpp`: CPU kernels that PyTorch lacks or has only in a slow form.

Built with the system's C++ compiler on first use. Without a compiler everything runs in plain PyTorch.

Those with a gradient give their output and a tuple of what `NAME_backward(gradient, *kept)` needs, which
gives a gradient, or None, for each argument.
"""
import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from native.build import load_compiled

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti",
         "-fopenmp")
GAIN = "made training 1.3 to 1.4 times as fast in float32 where it was measured"  # native/README.md
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
CHUNKS = 64  # runs of rows with a LayerNorm gradient sum each: fixed, so threads do not change it


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (with one line in the log) where they cannot be built."""
    return load_compiled(Path(__file__).with_name("kernels.cpp"), FLAGS, "CPU kernels", GAIN)


def _call(name: str, *args) -> None:
    """Call a kernel: tensors become pointers, integers 64 bits; the number of threads is torch's."""
    converted = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_void_p() if a is None
        else ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int64(a) for a in args]
    getattr(library(), name)(*converted, ctypes.c_int(torch.get_num_threads()))


def _pixels(x: Tensor) -> tuple[Tensor, int]:
    """x (B, H, W, C) and the distance between pixels; a channel slice of an NHWC tensor needs no copy."""
    _, height, width, _ = x.shape
    step = x.stride(2)
    if x.stride(3) != 1 or x.stride(1) != width * step or x.stride(0) != height * width * step:
        x = x.contiguous()
        step = x.stride(2)
    return x, step


def depthwise(x: Tensor, taps: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple]:
    """x (B, H, W, C) float32 or bfloat16, taps (k * k, C) float32 with k 3 or 7, bias (C,) float32."""
    x, step = _pixels(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    shape = torch.tensor(x.shape)
    size = 7 if len(taps) == 49 else 3
    _call(f"depthwise_{NAMES[x.dtype]}", x, step, taps, bias, out, x.shape[3], shape, size)
    return out, (x, taps, bias)


def depthwise_backward(grad: Tensor, x: Tensor, taps: Tensor,
                       bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, taps and bias."""
    x, step = _pixels(x)
    grad, grad_step = _pixels(grad)
    dx = torch.empty(x.shape, dtype=x.dtype)
    partial = torch.empty(x.shape[0], len(taps) + 1, x.shape[3])
    _call(f"depthwise_backward_{NAMES[x.dtype]}", x, step, grad, grad_step, taps, dx, x.shape[3], partial,
          torch.tensor(x.shape), 7 if len(taps) == 49 else 3)
    total = partial.sum(0)
    return dx, total[:-1], None if bias is None else total[-1]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float,
               dtype: torch.dtype) -> tuple[Tensor, tuple]:
    """Normalise the last axis of a contiguous x: the output in `dtype`; each row's mean and 1 / deviation are
    kept.
    """
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    out, mean, rstd = torch.empty(x.shape, dtype=dtype), torch.empty(rows), torch.empty(rows)
    _call(f"layer_norm_{NAMES[x.dtype]}_{NAMES[dtype]}", x, weight, bias, out, mean, rstd, rows, channels,
          float(eps))
    return out, (x, weight, mean, rstd)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple:
    """Gradients of x, weight and bias."""
    grad = grad.contiguous()
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    dx, partial = torch.empty_like(x), torch.empty(CHUNKS, 2, channels)
    _call(f"layer_norm_backward_{NAMES[x.dtype]}_{NAMES[grad.dtype]}", x, grad, weight, mean, rstd, dx,
          partial, rows, channels, CHUNKS)
    total = partial.sum(0)
    return dx, total[0], total[1], None, None


def join(x: Tensor, y: Tensor, gamma: Tensor, keep: Tensor | None, slot: Tensor | None,
         out: Tensor | None = None) -> tuple[Tensor, tuple]:
    """x (B, H, W, C) + keep (B,) * gamma (C,) * y (kept, H, W, C); `slot` (B,) int64 is a row of y or -1.

    Without `keep` it is 1, without `slot` every image has its row. `out` can be y when no image is left out.
    """
    out = torch.empty_like(x) if out is None else out
    images, height, width, channels = x.shape
    _call(f"join_{NAMES[x.dtype]}_{NAMES[y.dtype]}", x, y, gamma, keep, slot, out, images, height * width,
          channels)
    return out, (y, gamma, keep, slot)


def join_backward(grad: Tensor, y: Tensor, gamma: Tensor, keep: Tensor | None, slot: Tensor | None) -> tuple:
    """Gradients of x, y and gamma."""
    grad = grad.contiguous()
    images, height, width, channels = grad.shape
    dy, partial = torch.empty_like(y), torch.empty(images, channels)
    _call(f"join_backward_{NAMES[grad.dtype]}_{NAMES[y.dtype]}", grad, y, gamma, keep, slot, dy, partial,
          images, height * width, channels)
    return grad, dy, partial.sum(0), None, None


def weight_grad(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """grad (rows, out)^T @ x (rows, in) and the column sums of grad; both float32 and contiguous."""
    d_weight, d_bias = torch.empty(grad.shape[1], x.shape[1]), torch.empty(grad.shape[1])
    _call("weight_grad", x.contiguous(), grad.contiguous(), d_weight, d_bias, *grad.shape, x.shape[1])
    return d_weight, d_bias


@cache
def _dft_tables(height: int, width: int) -> Tensor:
    """The cosines and sines that `kernels.cpp` describes, computed in float64."""
    def angles(rows: int, size: int) -> Tensor:
        product = torch.arange(rows)[:, None] * torch.arange(size) % size
        return product.double() * (2 * torch.pi / size)

    row, column = angles(width // 2 + 1, width), angles(height, height)
    twice = torch.full((len(row), 1), 2.0, dtype=torch.float64)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    parts = [part / width ** 0.5 for part in (row.cos(), row.sin(), twice * row.cos(), twice * row.sin())]
    parts += [part / height ** 0.5 for part in (column.cos(), column.sin())]
    return torch.cat([part.flatten() for part in parts]).float()


def global_local(x: Tensor, taps: Tensor, spectrum: Tensor) -> tuple[Tensor, tuple]:
    """x (B, H, W, 2 C) contiguous, taps (9, C) and spectrum (H, W // 2 + 1, 2, C) float32 contiguous."""
    batch, height, width, channels = x.shape
    out, shape = torch.empty_like(x), torch.tensor((batch, height, width, channels // 2))
    _call(f"global_local_{NAMES[x.dtype]}", x, taps, spectrum, _dft_tables(height, width), out, shape)
    return out, (x, taps, spectrum)


def global_local_backward(grad: Tensor, x: Tensor, taps: Tensor,
                          spectrum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, taps and spectrum."""
    grad = grad.contiguous()
    batch, height, width, channels = x.shape
    dx, groups, half = torch.empty_like(x), min(batch, 8), channels // 2
    partial = torch.empty(groups, 9 + spectrum.numel() // half, half)
    _call(f"global_local_backward_{NAMES[x.dtype]}", x, grad, taps, spectrum, _dft_tables(height, width), dx,
          partial, torch.tensor((batch, height, width, half)), groups)
    total = partial.sum(0)
    return dx, total[:9], total[9:].view(spectrum.shape)


def gelu(x: Tensor, with_slope: bool = False) -> Tensor:
    """Exact GELU of a contiguous x, within 2e-7 of torch's relative to |x|; `with_slope` makes x its slope.
    """
    out = torch.empty_like(x)
    _call(f"gelu_{NAMES[x.dtype]}", x, out, x if with_slope else None, x.numel())
    return out


def gate(x: Tensor, gate: Tensor) -> Tensor:
    """The product of two tensors (B, H, W, C) that can be channel slices."""
    (x, step), (gate, gate_step) = _pixels(x), _pixels(gate)
    out = torch.empty(x.shape, dtype=x.dtype)
    _call(f"gate_{NAMES[x.dtype]}", x, step, gate, gate_step, out, x.numel() // x.shape[3], x.shape[3])
    return out


def gate_backward(grad: Tensor, x: Tensor, gate: Tensor, d_gate: Tensor) -> Tensor:
    """The gradient of x; that of the gate is written into `d_gate`, a channel slice of an NHWC tensor."""
    (x, step), (gate, gate_step) = _pixels(x), _pixels(gate)
    dx = torch.empty(x.shape, dtype=x.dtype)
    _call(f"gate_backward_{NAMES[x.dtype]}", grad, x, step, gate, gate_step, dx, d_gate, d_gate.stride(2),
          x.numel() // x.shape[3], x.shape[3])
    return dx
