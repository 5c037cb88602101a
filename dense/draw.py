"""Label maps and boxes drawn over images."""
import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datasets.build import Data
from datasets.dataset import Batch
from dense.coco import CocoSet
from dense.detector import Detections
from dense.segmentor import IGNORED

SHOWN = 0.5  # least score of an object that is drawn
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


def save_sample(folder: str, data: Data, batch: Batch, labels: np.ndarray) -> None:
    """Keep one of the first evaluated images in `folder`/samples: itself, its labels and the prediction; none
    where `folder` is ""."""
    index = int(batch.indices[0])
    if not folder or index >= SAMPLES or data.val is None:
        return
    given = batch.targets[0].numpy().clip(0, IGNORED)
    image = np.asarray(Image.fromarray(batch.images[0].numpy()).resize(given.shape[::-1]))
    panels = [image, overlay(image, given, data.num_classes), overlay(image, labels, data.num_classes)]
    keep_panels(folder, index, panels)


def keep_panels(folder: str, index: int, panels: Sequence[np.ndarray]) -> None:
    """Write images uint8 (H, W, 3), side by side, to `folder`/samples, which the report shows."""
    where = Path(folder, "samples")
    where.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(panels, axis=1)).save(where / f"{index:02d}.jpg", quality=85)


def draw_objects(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, masks: np.ndarray,
                 captions: Sequence[str], classes: int) -> np.ndarray:
    """uint8 (H, W, 3) with objects drawn over it: boxes (n, 4), labels (n,), masks (n, H, W), captions."""
    colours, drawn = palette(classes), image.copy()
    for label, mask in zip(labels, masks.astype(bool)):
        drawn[mask] = (drawn[mask].astype(np.uint16) + colours[label]) // 2
    canvas = Image.fromarray(drawn)
    pen = ImageDraw.Draw(canvas)
    for (left, top, right, bottom), label, caption in zip(boxes.tolist(), labels, captions):
        colour = tuple(colours[label].tolist())
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        pen.text((left + 3, top + 2), caption, fill=(255, 255, 255), stroke_width=1, stroke_fill=colour)
    return np.asarray(canvas)


def drawn(image: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    """The objects of at least SHOWN over an image uint8 (H, W, 3)."""
    boxes, scores, labels, masks = (value[found.scores >= SHOWN].cpu().numpy() for value in found)
    captions = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores)]
    return draw_objects(image, boxes, labels, masks, captions, len(names))


def save_objects(folder: str, images: CocoSet, index: int, found: Detections) -> None:
    """Keep one of the first evaluated images in `folder`/samples: itself, its objects and the detections;
    none where `folder` is ""."""
    if not folder or index >= SAMPLES:
        return
    image, truth, names = images.pixels(index), images.objects(index), images.class_names
    captions = [names[label] for label in truth.labels]
    given = draw_objects(image, truth.boxes, truth.labels, truth.masks, captions, len(names))
    keep_panels(folder, index, [image, given, drawn(image, found, names)])
