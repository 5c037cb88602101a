"""Sample data without a download: drawn scenes of overlapping textured shapes, made from a seed.

    image, instances = draw(7, split="training")      # uint8 (H, W, 3), [(class, visible mask), …]

`write_segmentation` stores them as ADE20K is laid out.
"""
import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from common.random import numpy_generator
from dense.pixels import Size

NAMES = ("disc", "square", "triangle", "ring", "cross")
COUNTS = {"training": 400, "validation": 100}
SIZE, SEED = (96, 96), 20
Instances = list[tuple[int, np.ndarray]]
Draw = np.random.Generator


def draw(index: int, split: str = "training", size: Size = SIZE, seed: int = SEED
         ) -> tuple[np.ndarray, Instances]:
    """Scene `index` of a split: RGB uint8 (H, W, 3), and its shapes from back to front, each a class (a place
    in NAMES) with the mask of what is visible of it, bool (H, W), at least 40 pixels."""
    draws = numpy_generator(seed, f"scene {split}", index)
    y, x = np.mgrid[0:size[0], 0:size[1]].astype(np.float32)
    image = _texture(draws, y, x, -1)
    shapes: Instances = []
    for _ in range(int(draws.integers(3, 7))):
        kind = int(draws.integers(len(NAMES)))
        mask = _shape(draws, y, x, kind)
        image[mask] = _texture(draws, y, x, kind)[mask]
        shapes = [(other, seen & ~mask) for other, seen in shapes] + [(kind, mask)]
    noisy = image + draws.normal(0, 4, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), [(kind, seen) for kind, seen in shapes if seen.sum() >= 40]


def _shape(draws: Draw, y: np.ndarray, x: np.ndarray, kind: int) -> np.ndarray:
    """The mask of one shape of a kind, anywhere, of any size and turn."""
    height, width = y.shape
    radius = draws.uniform(0.13, 0.26) * min(height, width)
    angle, cy, cx = draws.uniform(0, 2 * np.pi), draws.uniform(0, height), draws.uniform(0, width)
    u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / radius
    v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / radius
    far = np.hypot(u, v)
    masks: list[Callable[[], np.ndarray]] = [
        lambda: far < 1, lambda: np.maximum(abs(u), abs(v)) < 0.85,
        lambda: (v > -0.6) & (v < 1.2 - 1.8 * abs(u)), lambda: (far < 1.1) & (far > 0.55),
        lambda: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1.05)]
    return masks[kind]()


def _texture(draws: Draw, y: np.ndarray, x: np.ndarray, kind: int) -> np.ndarray:
    """Two colours in a pattern, float (H, W, 3); each kind has its pattern and range of hues; the
    background is pale."""
    hue = (draws.uniform(0, 1) if kind < 0 else kind / len(NAMES) + draws.uniform(-0.06, 0.06)) % 1
    pale = draws.uniform(0, 0.25) if kind < 0 else draws.uniform(0.5, 1)
    first = 255 * np.array(colorsys.hsv_to_rgb(hue, pale, draws.uniform(0.5, 0.9)))
    second = draws.uniform(-45, 45, 3)
    step, turn = draws.uniform(0.6, 0.9), draws.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    one, other = np.sin(step * along), np.sin(step * across)
    wave = {-1: np.sin(0.12 * along), 0: one, 1: np.sign(one * other), 2: np.zeros_like(along),
            3: np.maximum(one, other), 4: np.sin(0.35 * step * along)}[kind]
    return first + wave[..., None] * second


def label_map(instances: Instances, size: Size = SIZE) -> np.ndarray:
    """Labels uint8 (H, W): 1 for the background, 2 and more for NAMES; front shapes cover those behind."""
    labels = np.ones(size, np.uint8)
    for kind, seen in instances:
        labels[seen] = kind + 2
    return labels


def write_segmentation(folder: Path) -> None:
    """Fill `folder` with images/, annotations/ and classes.txt."""
    for split, count in COUNTS.items():
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for index in range(count):
            image, instances = draw(index, split)
            Image.fromarray(image).save(folder / "images" / split / f"{index:04d}.png")
            Image.fromarray(label_map(instances)).save(folder / "annotations" / split / f"{index:04d}.png")
    (folder / "classes.txt").write_text("\n".join(["background", *NAMES, ""]))
