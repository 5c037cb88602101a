"""What differs between devices: the precision of float32, and copies that nobody waits for.

PyTorch has two ways to say what products of float32 tensors are computed in, `allow_tf32` and
`fp32_precision`, and reading the one after the other was set raises RuntimeError, also inside its compiler.
Here it is `allow_tf32` for CUDA's products and cuDNN, and `fp32_precision` for oneDNN, which knows nothing
else; no other file sets either.
"""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from operator import attrgetter

import torch
from torch import Tensor

_FLOAT32 = {"cuda.matmul": "allow_tf32", "cudnn": "allow_tf32", "mkldnn.matmul": "fp32_precision",
            "mkldnn.conv": "fp32_precision"}


def float32_settings() -> tuple[bool | str, ...]:
    """Of this process: TF32 in CUDA's products and in cuDNN, precision of oneDNN's products and convolutions.
    """
    return tuple(getattr(place, name) for place, name in zip(_places(), _FLOAT32.values()))


def set_float32(tf32: bool) -> None:
    """Let products and convolutions of float32 tensors be float32, or on NVIDIA GPUs TF32."""
    _apply((tf32, tf32, "ieee", "ieee"))


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """`set_float32` for a block."""
    before = float32_settings()
    set_float32(tf32)
    try:
        yield
    finally:
        _apply(before)


def _places() -> tuple:
    return attrgetter(*_FLOAT32)(torch.backends)


def _apply(settings: tuple[bool | str, ...]) -> None:
    for place, name, value in zip(_places(), _FLOAT32.values(), settings):
        setattr(place, name, value)


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Mixed precision with `dtype`, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def asynchronous(device: torch.device) -> bool:
    """Whether `device` works through a queue that the host does not wait for."""
    return device.type in ("cuda", "xpu") and torch.accelerator.is_available()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for. Pageable memory would make it wait for the device's queue."""
    return (tensor.pin_memory() if asynchronous(device) else tensor).to(device, non_blocking=True)
