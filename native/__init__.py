"""Optional fast paths for CPUs: README.md says what they gain, how they are built and how to switch them off.

    paths = native.attach(model)       # a HorNet's blocks compute on this machine's fast paths
    with native.packed(model): ...     # evaluation: weights in the library's own layout meanwhile
    decoder = native.jpeg()            # a JPEG decoder with Pillow's pixels, or None
"""
from types import ModuleType

from native.paths import attach, packed

__all__ = ["attach", "jpeg", "packed"]


def jpeg() -> ModuleType | None:
    """`native.decoder`, whose `image_of(data)` may raise its `NeedsPillow`; None where it is not available.

    Built and tested at the first call, in seconds: ask before loader processes are started.
    """
    from native import decoder
    return decoder if decoder.available() else None
