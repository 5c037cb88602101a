"""Optional fast paths for CPUs; README.md here says what they gain and how to switch them off.

    paths = native.attach(model)       # a HorNet's blocks compute on this machine's fast paths
    with native.packed(model): ...     # evaluation: weights in the library's own layout meanwhile
"""
from native.paths import attach, packed

__all__ = ["attach", "packed"]
