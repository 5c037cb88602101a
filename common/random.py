"""Random numbers as pure functions of a tuple.

Every random draw of a training run is keyed by (seed, stream name, counters), so that it can be made
again after a crash, with another number of workers, or on another number of processes. Sums such as
`seed + epoch + rank` collide and `hash()` differs between processes, hence a real hash.
"""
import hashlib
import random
from contextlib import contextmanager

import numpy as np
import torch


def key(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit integer from the first 8 bytes of blake2b over (seed, stream, counters)."""
    text = repr((int(seed), str(stream), *(int(c) for c in counters))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """A generator seeded with `key(...)`; unlike torch's on the CPU it uses all bits of the key."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream, *counters)))


def uniforms(seed: int, stream: str, epoch_or_update: int, counters: np.ndarray, n: int) -> np.ndarray:
    """Draws in [0, 1), float32, shape (len(counters), n): row i depends on counters[i] alone.

    The rows of any split of `counters` over processes or micro-batches are therefore the same. One
    splitmix64 step per value (Steele, Lea and Flood, 2014), vectorised, because seeding a generator per
    sample costs more than the draws.
    """
    base = np.uint64(key(seed, stream, epoch_or_update))
    with np.errstate(over="ignore"):
        row = _mix(base + np.asarray(counters, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        z = _mix(row[:, None] + np.arange(1, n + 1, dtype=np.uint64)[None] * np.uint64(0xD1B54A32D192ED03))
    return ((z >> np.uint64(40)).astype(np.float32)) * np.float32(2.0 ** -24)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@contextmanager
def seeded(value: int):
    """Seed Python's, NumPy's and torch's default CPU generators for a block and restore them after it.

    timm's transforms draw from all three. Restoring keeps the main process' streams undisturbed when the
    data is loaded without workers. (`torch.default_generator` only: `torch.manual_seed` visits every
    device and costs a hundred times more.)
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        reseed(value)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def reseed(value: int) -> None:
    """Seed the three generators, within a `seeded` block: saving their states takes ten times as long."""
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value)
