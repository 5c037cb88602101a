"""What PyTorch computes products of float32 tensors in, said in one way and in one place.

It has two ways to say it, `allow_tf32` and `fp32_precision`, and reading the one after the other was set
raises RuntimeError, also inside its compiler. Here it is `allow_tf32` for CUDA's products and cuDNN, and
`fp32_precision` for oneDNN, which knows nothing else.
"""
from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda, cudnn, mkldnn

Float32 = tuple[bool, bool, str, str]


def float32_settings() -> Float32:
    """Of this process: TF32 in CUDA's products and in cuDNN, precision of oneDNN's products and convolutions.
    """
    return (cuda.matmul.allow_tf32, cudnn.allow_tf32, mkldnn.matmul.fp32_precision,
            mkldnn.conv.fp32_precision)


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


def _apply(settings: Float32) -> None:
    (cuda.matmul.allow_tf32, cudnn.allow_tf32, mkldnn.matmul.fp32_precision,
     mkldnn.conv.fp32_precision) = settings  # type: ignore
