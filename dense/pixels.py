"""Pixels as the published pipelines see them: OpenCV's resizing and colours on uint8, without antialiasing.

OpenCV (`pip install opencv-python-headless`) computes them where it is installed; without it NumPy does, at
most one grey level away and several times slower.
"""
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.log import logger

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, of 0..255
Size = tuple[int, int]  # height, width


class Draws(Protocol):
    """What random transforms draw from: `numpy.random.Generator` is one."""

    def integers(self, low: int, high: int) -> int:
        """low <= n < high."""
        ...

    def uniform(self, low: float, high: float) -> float:
        ...


@cache
def opencv() -> ModuleType | None:
    """OpenCV with one thread, None where it is not installed."""
    try:
        import cv2
    except ImportError:
        logger.info("OpenCV is not installed: NumPy resizes images, slower and at most one grey level away "
                    "from the published pixels (pip install opencv-python-headless).")
        return None
    cv2.setNumThreads(0)
    return cv2


def fitted(size: Size, box: Sequence[int]) -> Size:
    """`size` scaled into a box (the larger of its two numbers for the long side), its shape kept."""
    factor = min(max(box) / max(size), min(box) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (H, W, 3) at `size`, bilinear, no antialiasing."""
    if image.shape[:2] == tuple(size):
        return image
    cv2 = opencv()
    if cv2:
        return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    (top, bottom, down), (left, right, across) = (_taps(a, b) for a, b in zip(image.shape, size))
    down, across = down[:, None, None], across[None, :, None]
    rows = [image[each].astype(np.int32) for each in (top, bottom)]
    rows = [(row[:, left] * (2048 - across) + row[:, right] * across) >> 4 for row in rows]
    return ((((2048 - down) * rows[0] >> 16) + (down * rows[1] >> 16) + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both neighbours of each new pixel along an axis, and the second one's weight in 1/2048."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int32)
    weight = np.rint((at - first) * 2048).astype(np.int32)
    weight[(first < 0) | (first >= old - 1)] = 0
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), weight


def resize_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """A label map or mask (H, W) at `size`, nearest: pixel i comes from floor(i * old / new)."""
    rows, columns = (np.minimum(np.floor(np.arange(new) * (old / new)).astype(int), old - 1)
                     for old, new in zip(labels.shape, size))
    return labels[rows[:, None], columns]


def distort(image: np.ndarray, draws: Draws) -> np.ndarray:
    """Photometric distortion of uint8 (H, W, 3): brightness, contrast, saturation, hue, each with
    probability 1/2; contrast comes second or last. Every step clips to 0..255 and truncates to uint8."""
    if draws.integers(0, 2):
        image = _linear(image, 1.0, draws.uniform(-32, 32))
    contrast_first = draws.integers(0, 2)
    if contrast_first and draws.integers(0, 2):
        image = _linear(image, draws.uniform(0.5, 1.5), 0.0)
    if draws.integers(0, 2):
        hsv = to_hsv(image)
        hsv[..., 1] = _linear(hsv[..., 1], draws.uniform(0.5, 1.5), 0.0)
        image = from_hsv(hsv)
    if draws.integers(0, 2):
        hsv = to_hsv(image)
        hsv[..., 0] = (hsv[..., 0].astype(int) + draws.integers(-18, 18)) % 180
        image = from_hsv(hsv)
    if not contrast_first and draws.integers(0, 2):
        image = _linear(image, draws.uniform(0.5, 1.5), 0.0)
    return image


def _linear(image: np.ndarray, factor: float, offset: float) -> np.ndarray:
    changed = image.astype(np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(changed, 0, 255).astype(np.uint8)


def to_hsv(image: np.ndarray) -> np.ndarray:
    """RGB to OpenCV's HSV, uint8: hue in 0..179, in steps of two degrees."""
    cv2 = opencv()
    if cv2:
        return cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    r, g, b = image.astype(np.int64).transpose(2, 0, 1)
    value = image.max(2).astype(np.int64)
    range_ = value - image.min(2)
    counts = np.maximum(np.arange(256), 1)
    by_value, by_range = (np.rint(scale / counts).astype(np.int64) for scale in (255 << 12, (180 << 12) / 6))
    hue = np.where(value == r, g - b, np.where(value == g, b - r + 2 * range_, r - g + 4 * range_))
    hue = (hue * by_range[range_] + (1 << 11)) >> 12
    saturation = (range_ * by_value[value] + (1 << 11)) >> 12
    return np.stack([np.where(hue < 0, hue + 180, hue), saturation, value], axis=2).astype(np.uint8)


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """OpenCV's HSV back to RGB, uint8."""
    cv2 = opencv()
    if cv2:
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    scale = np.array([30, 255, 255], np.float32)[:, None, None]
    hue, saturation, value = hsv.astype(np.float32).transpose(2, 0, 1) / scale
    sector = np.floor(hue).astype(int) % 6
    part = hue - np.floor(hue)
    low, down, up = value * (1 - saturation), value * (1 - saturation * part), value * (
        1 - saturation * (1 - part))
    table = [(value, up, low), (down, value, low), (low, value, up), (low, down, value), (up, low, value),
             (value, low, down)]
    channels = [np.choose(sector, [row[channel] for row in table]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=2) * 255).clip(0, 255).astype(np.uint8)


def normalised(images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W); zeros outside each image's own (height, width), int (B, 2).

    Padding is a matter of the forward pass: it follows the normalisation.
    """
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    pixels = (images.float() - mean) / std
    if sizes is not None:
        rows, columns = (torch.arange(n, device=images.device) for n in images.shape[1:3])
        inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
        pixels = pixels * inside[..., None]
    return pixels.permute(0, 3, 1, 2)
