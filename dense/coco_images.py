"""What happens to images and objects on their way into a detector: the published pipelines on uint8.

Draws come from `Draws`; an image's are keyed by seed, epoch and index, so that any process makes the same.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dense.coco import Objects
from dense.pixels import Draws, fitted, resize, resize_labels


@dataclass(frozen=True)
class Scales:
    """How images are resized and cropped; the defaults are COCO's.

    Attributes:
        train: short sides, one of which is drawn.
        test: short side in evaluation.
        longest: limit of the long side.
        crop: least and largest side of the crop that half of the images go through; None for none.
        before_crop: short sides before it.
    """
    train: tuple[int, ...] = tuple(range(480, 801, 32))
    test: int = 800
    longest: int = 1333
    crop: tuple[int, int] | None = (384, 600)
    before_crop: tuple[int, ...] = (400, 500, 600)


def train_transform(image: np.ndarray, objects: Objects, draws: Draws, scales: Scales
                    ) -> tuple[np.ndarray, Objects]:
    """Flip, perhaps a crop of a smaller image, resize: image uint8 (H, W, 3) and its objects, those cropped
    away left out."""
    if draws.integers(0, 2):
        image, objects = image[:, ::-1], _flipped(objects)
    if scales.crop is not None and draws.integers(0, 2):
        image, objects = _resized(image, objects, _one_of(scales.before_crop, draws), scales.longest)
        least, most = scales.crop
        size = [draws.integers(min(side, least), min(side, most) + 1) for side in image.shape[:2]]
        offset = [draws.integers(0, side - part + 1) for side, part in zip(image.shape, size)]
        image, objects = _cropped(image, objects, offset, size)
    return _resized(image, objects, _one_of(scales.train, draws), scales.longest)


def test_transform(image: np.ndarray, scales: Scales) -> np.ndarray:
    """The image at the size of evaluation, uint8 (h, w, 3)."""
    return resize(image, fitted((image.shape[0], image.shape[1]), (scales.longest, scales.test)))


def _one_of(sides: Sequence[int], draws: Draws) -> int:
    return sides[draws.integers(0, len(sides))]


def _flipped(objects: Objects) -> Objects:
    width = objects.masks.shape[2]
    boxes = np.stack([width - objects.boxes[:, 2], objects.boxes[:, 1], width - objects.boxes[:, 0],
                      objects.boxes[:, 3]], axis=1)
    return Objects(boxes, objects.labels, objects.masks[:, :, ::-1])


def _resized(image: np.ndarray, objects: Objects, side: int, longest: int) -> tuple[np.ndarray, Objects]:
    height, width = image.shape[:2]
    size = fitted((height, width), (longest, side))
    factors = np.array([size[1] / width, size[0] / height] * 2, dtype=np.float32)
    boxes = (objects.boxes * factors).clip(0, [size[1], size[0]] * 2)
    masks = [resize_labels(mask, size) for mask in objects.masks]
    stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
    return resize(np.ascontiguousarray(image), size), Objects(boxes.astype(np.float32), objects.labels, stacked)


def _cropped(image: np.ndarray, objects: Objects, offset: Sequence[int], size: Sequence[int]
             ) -> tuple[np.ndarray, Objects]:
    (top, left), (height, width) = offset, size
    part = np.s_[top:top + height, left:left + width]
    boxes = (objects.boxes - np.array([left, top] * 2, dtype=np.float32)).clip(0, [width, height] * 2)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image[part], Objects(boxes[kept].astype(np.float32), objects.labels[kept],
                                objects.masks[kept][(slice(None), *part)])
