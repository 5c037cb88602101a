"""What differs between devices: the precision of float32, copies that nobody waits for, clocks, peaks.

PyTorch has two ways to say what products of float32 tensors are computed in, `allow_tf32` and
`fp32_precision`, and reading the one after the other was set raises RuntimeError, also inside its compiler.
Here it is `allow_tf32` for CUDA's products and cuDNN, and `fp32_precision` for oneDNN, which knows nothing
else; no other file sets either.
"""
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor


def float32_settings() -> tuple[bool | str, ...]:
    """Of this process: TF32 in CUDA's products and in cuDNN, precision of oneDNN's products and convolutions.
    """
    cuda, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn
    return (cuda.allow_tf32, torch.backends.cudnn.allow_tf32, onednn.matmul.fp32_precision,
            onednn.conv.fp32_precision)


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


def _apply(settings: tuple[bool | str, ...]) -> None:
    cuda, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn
    cuda.allow_tf32, torch.backends.cudnn.allow_tf32 = settings[:2]
    onednn.matmul.fp32_precision, onednn.conv.fp32_precision = settings[2:]


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Mixed precision with `dtype`, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def asynchronous(device: torch.device) -> bool:
    """Whether `device` works through a queue that the host does not wait for."""
    return device.type in ("cuda", "xpu") and torch.accelerator.is_available()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for. Pageable memory would make it wait for the device's queue."""
    return (tensor.pin_memory() if asynchronous(device) else tensor).to(device, non_blocking=True)


class PhaseClock:
    """Seconds spent in each phase of a work, on the device's own clock: where it works through a queue, when
    the device came to a phase and not when the host did."""

    def __init__(self, device: torch.device):
        self.device, self.marks, self.seconds = device, [], Counter()

    def begins(self, phase: str) -> None:
        """The phase before ends, and this one begins."""
        at: torch.Event | float = time.perf_counter()
        if asynchronous(self.device):
            at = torch.Event(self.device, enable_timing=True)
            at.record()
        self.marks.append((phase, at))

    def read(self) -> dict[str, float]:
        """Of each phase so far; the last begun is left out. Waits for the device."""
        if self.marks and asynchronous(self.device):
            self.marks[-1][1].synchronize()
        for (phase, start), (_, end) in pairwise(self.marks):
            self.seconds[phase] += end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
        self.marks = self.marks[-1:]
        return dict(self.seconds)


# Dense bf16 and fp16 products in TFLOP/s by a part of the device's name, from the makers' data sheets; of
# names that are part of others the longer ones first. TF32 has half of it.
_PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A10": 125,
          "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307}


def dense_peak(name: str, dtype: torch.dtype | None, tf32: bool) -> float | None:
    """Operations per second of a device called `name` in mixed precision with `dtype`, in TF32 without; None
    where it is not known."""
    peak = next((1e12 * peak for part, peak in _PEAKS.items() if part in name), None)
    return peak and (peak if dtype is not None else peak / 2 if tf32 else None)
