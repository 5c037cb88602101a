"""From a decoded image to uint8 pixels: the published crops and augmentation, without normalisation.

Normalisation and the filling of erased boxes happen on the device (device.py); a quarter of the bytes pass
from the workers, and the values stay those of ToTensor + Normalize, bit for bit.
"""
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from config.options import ImageSettings, Options

Transform = Callable[[Image.Image], np.ndarray]


def train_transform(options: Options) -> Transform:
    """RGB image → uint8 (size, size, 3): timm's random resized crop, flip and RandAugment or colour jitter.

    Draws from the default generators of Python, NumPy and torch; seed them around each call. Up to 32 pixels
    the area crop is a plain one after padding by 4, as published.
    """
    settings = ImageSettings.of(options)
    parts: Any = create_transform(
        options.input_size, is_training=True, color_jitter=options.color_jitter or None,  # type: ignore
        auto_augment=options.aa if options.aa and options.aa != "none" else None,
        interpolation=options.train_interpolation, re_prob=0.0, mean=settings.mean, std=settings.std,
        separate=True, hflip=options.hflip, scale=(options.scale[0], options.scale[1]))
    first, second, _ = parts
    if options.input_size <= settings.SMALL:
        first.transforms[0] = transforms.RandomCrop(options.input_size, padding=4, pad_if_needed=True)
    return partial(_to_pixels, (first, second), 0)


def eval_transform(input_size: int, crop_pct: float | None = None,
                   interpolation: str = "bicubic") -> Transform:
    """RGB image → uint8 (size, size, 3): short side to int(size / crop_pct) and centre crop; from 384 on a
    warp.

    An image that has the wanted size of 32 pixels or fewer is left as it is (CIFAR).
    """
    settings, mode = ImageSettings(input_size, crop_pct), transforms.InterpolationMode(interpolation)
    if settings.eval_crop_pct is None:
        return partial(_to_pixels, [transforms.Resize((input_size, input_size), interpolation=mode)], 0)
    short, keep = int(input_size / settings.eval_crop_pct), input_size if input_size <= settings.SMALL else 0
    steps = transforms.Resize(short, interpolation=mode), transforms.CenterCrop(input_size)
    return partial(_to_pixels, steps, keep)


def _to_pixels(steps: Sequence[Callable], keep: int, image: Image.Image) -> np.ndarray:
    for step in steps if image.size != (keep, keep) else ():
        image = step(image)
    return np.asarray(image)


@dataclass(frozen=True)
class Erasing:
    """Boxes to erase, drawn as timm's RandomErasing draws them from Python's default generator, and what
    fills them: noise per "pixel", one random colour ("rand"), or zeros ("const")."""

    probability: float = 0.25
    count: int = 1
    mode: str = "pixel"

    def boxes(self, height: int, width: int) -> np.ndarray:
        """int32 (count, 4) of top, left, height, width; unused rows are zero."""
        boxes = np.zeros((self.count, 4), dtype=np.int32)
        if random.random() > self.probability:
            return boxes
        used = 1 if self.count == 1 else random.randint(1, self.count)
        for number in range(used):
            for _ in range(10):
                area = random.uniform(0.02, 1 / 3) * height * width / used
                aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if w < width and h < height:
                    boxes[number] = random.randint(0, height - h), random.randint(0, width - w), h, w
                    break
        return boxes

    def fill(self, boxes: np.ndarray, seeds: Sequence[int], height: int, width: int
             ) -> tuple[torch.Tensor, ...]:
        """Places, int64 (n,), in the B * H * W pixels of a batch with `boxes` (B, count, 4), and their values
        after normalisation, float32 (n, 3); nothing for a batch without boxes. Image by image from `seeds`.
        """
        places, values, generator = [], [], torch.Generator()
        for row in np.flatnonzero((boxes[:, :, 2] > 0).any(1)).tolist():
            generator.manual_seed(seeds[row])
            canvas, erased = torch.zeros(height, width, 3), np.zeros((height, width), dtype=bool)
            for top, left, h, w in boxes[row].tolist():
                if h > 0:
                    area = slice(top, top + h), slice(left, left + w)
                    erased[area] = True
                    canvas[area] = self._noise(h, w, generator)
            places.append(torch.from_numpy(np.flatnonzero(erased)))
            values.append(canvas.view(-1, 3)[places[-1]])
            places[-1] += row * height * width
        return (torch.cat(places), torch.cat(values)) if places else ()

    def _noise(self, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        if self.mode == "const":
            return torch.zeros(3)
        shape = (height, width, 3) if self.mode == "pixel" else (3,)
        return torch.empty(shape).normal_(generator=generator)
