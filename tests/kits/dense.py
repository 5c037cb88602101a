"""Deterministic weights, maps, labels and boxes behind the figures in tests/data/dense, and their files."""
import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dense.evaluation import DETECTOR, SEGMENTOR, Kind
from dense.zoo import Published
from tests.kits.fill import parity_image, parity_input, parity_tensor

DENSE = Path(__file__).resolve().parents[1] / "data" / "dense"


def files(pattern: str) -> list[str]:
    """Those of tests/data/dense."""
    return sorted(str(path.relative_to(DENSE)) for path in DENSE.glob(pattern))


def stored(name: str):
    """A file of tests/data/dense: (arrays by name, with their description) of an .npz, or a JSON's content."""
    path = DENSE / name
    if path.suffix == ".npz":
        file = np.load(path)
        return {key: file[key] for key in file if key != "meta"}, json.loads(str(file["meta"]))
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def dense_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values of the state-dict entry `name`; like `parity_tensor`, plus buffers."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    if leaf in ("running_mean", "running_var"):
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
        return (0.2 * noise if leaf == "running_mean" else np.exp(0.4 * noise)).astype(np.float32)
    return parity_tensor(name, shape, seed)


def row_of(config: str) -> tuple[Kind, str, Published]:
    """Kind, name and row of a published configuration ("seg/…" or "det/…")."""
    kind = SEGMENTOR if config.startswith("seg/") else DETECTOR
    return next((kind, name, row) for name, row in kind.published.items() if row.config == config[4:])


def published(config: str, **options) -> nn.Module:
    """The network of a published configuration, without values."""
    kind, _, row = row_of(config)
    values = replace(kind.options(), **kind.of_published(row), **options)
    with torch.device("meta"):
        return kind.build(values, 150 if kind is SEGMENTOR else 80)


def filled(module: nn.Module, prefix: str = "", factors: dict[str, float] | None = None) -> nn.Module:
    """`module`, whose full names begin with `prefix`, in evaluation mode with the stored figures' weights, loaded
    strictly; those whose names end as in `factors` times that."""
    state = {name: torch.from_numpy(dense_tensor(prefix + name, tuple(value.shape)))
             for name, value in module.state_dict().items()}
    for ending, factor in (factors or {}).items():
        state |= {name: value * factor for name, value in state.items() if name.endswith(ending)}
    module.load_state_dict(state, assign=True)
    return module.eval()


def dense_map(seed: int, *shape: int) -> np.ndarray:
    """One feature map, float32, standard normal."""
    return np.random.default_rng([77, seed]).standard_normal(shape).astype(np.float32)


def dense_labels(batch: int, height: int, width: int, classes: int, seed: int = 5, block: int = 8) -> np.ndarray:
    """A label map, int64, (batch, height, width): square blocks of one class, one block in eight is 255."""
    rng = np.random.default_rng([78, seed])
    rows, cols = -(-height // block), -(-width // block)
    coarse = rng.integers(0, classes, (batch, rows, cols))
    coarse[rng.integers(0, 8, coarse.shape) == 0] = 255
    return coarse.repeat(block, 1).repeat(block, 2)[:, :height, :width]


def dense_boxes(count: int, height: int, width: int, seed: int = 6, margin: float = 0.0) -> np.ndarray:
    """Boxes x1, y1, x2, y2, float32; sides from 4 pixels to most of the image; `margin` lets them leave it."""
    rng = np.random.default_rng([79, seed])
    centre = rng.uniform(-margin, 1 + margin, (count, 2)) * (width, height)
    side = 4 + rng.uniform(0, 1, (count, 2)) ** 2 * (0.8 * width, 0.8 * height)
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=1)
    if margin == 0.0:
        boxes = boxes.clip(0, [width, height, width, height])
    return boxes.astype(np.float32)


def dense_masks(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """One binary mask per box, uint8, (n, height, width): the ellipse inscribed in the box."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x1, y1, x2, y2 = (boxes[:, i, None, None].astype(np.float64) for i in range(4))
    inside = ((x - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + ((y - (y1 + y2) / 2) / ((y2 - y1) / 2)) ** 2
    return (inside <= 1).astype(np.uint8)


def given(call: str) -> torch.Tensor:
    """The tensor that a description's `parity_input(...)`, `dense_map(...)` and so on stand for."""
    known = {"parity_input": parity_input, "parity_image": parity_image, "dense_map": dense_map,
             "dense_labels": dense_labels, "dense_boxes": dense_boxes}
    return torch.from_numpy(np.ascontiguousarray(eval(call, {"__builtins__": {}}, known)))


def check_image(x: np.ndarray, expected: dict) -> None:
    """A network's input (3, H, W) has the stored shape, mean and norm of each channel, and five pixels."""
    assert list(x.shape) == expected["shape"]
    h, w = x.shape[1:]
    probes = [x[0, 0, 0], x[1, h // 3, w // 2], x[2, h // 2, w // 3], x[0, h - 1, w - 1], x[1, h // 4, w - 3]]
    assert probes == pytest.approx(expected["probes"], abs=1e-5)
    x = x.astype(np.float64)
    assert x.mean(axis=(1, 2)) == pytest.approx(expected["mean"], abs=1e-5)
    assert np.sqrt((x ** 2).sum(axis=(1, 2))) == pytest.approx(expected["norm"], rel=1e-5)


class Scripted:
    """Gives draws in their order: plain values within the bounds asked for, or stored (kind, bounds, value)."""

    def __init__(self, draws: Iterable):
        self.draws = list(draws)

    def _next(self, kind: str, low: float, high: float):
        draw = self.draws.pop(0)
        name, bounds, value = draw if isinstance(draw, list) else (kind, [low, high], draw)
        assert name == kind and [low, high][-len(bounds):] == bounds and (len(bounds) == 2 or low == 0)
        assert low <= value < high
        return value

    def integers(self, low: int, high: int) -> int:
        return self._next("randint", low, high)

    def uniform(self, low: float, high: float) -> float:
        return self._next("uniform", low, high)
