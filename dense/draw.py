"""Label maps and boxes drawn over images."""
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.build import Data
from datasets.dataset import Batch
from dense.segmentor import IGNORED

SAMPLES = 8  # images of an evaluation whose results are kept in the run folder


def palette(classes: int) -> np.ndarray:
    """A colour per class, uint8 (256, 3), neighbours far apart; grey for 255."""
    colours = np.full((256, 3), 128, np.uint8)
    for number in range(min(classes, 255)):
        hue, light = (number * 0.618034) % 1, 0.35 + 0.3 * (number * 0.381966 % 1)
        colours[number] = [round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.9)]
    return colours


def overlay(image: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """uint8 (H, W, 3) half covered by the colours of a label map (H, W)."""
    return ((image.astype(np.uint16) + palette(classes)[labels]) // 2).astype(np.uint8)


def save_sample(folder: str, batch: Batch, labels: np.ndarray, data: Data) -> None:
    """Keep one of the first evaluated images in `folder`/samples: itself, its labels and the prediction."""
    index = int(batch.indices[0])
    if index >= SAMPLES or data.val is None:
        return
    given = batch.targets[0].numpy().clip(0, IGNORED)
    image = np.asarray(Image.fromarray(batch.images[0].numpy()).resize(given.shape[::-1]))
    panels = [image, overlay(image, given, data.num_classes), overlay(image, labels, data.num_classes)]
    where = Path(folder, "samples")
    where.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(panels, axis=1)).save(where / f"{index:02d}.jpg", quality=85)
