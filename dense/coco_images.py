"""Images and objects on their way into a detector: the published pipelines on uint8, batches, their order."""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.random import numpy_generator
from datasets.dataset import UNREADABLE_TARGET, ImageDataset
from datasets.sampler import GlobalBatchSampler, Item
from dense.coco import CocoSet, Objects
from dense.detector_losses import Truth, padded
from dense.pixels import Draws, Size, fitted, normalised, resize, resize_labels

TOGETHER = 2  # images of one orientation, as each published process has them


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
    found = Objects(boxes.astype(np.float32), objects.labels, stacked)
    return resize(np.ascontiguousarray(image), size), found


def _cropped(image: np.ndarray, objects: Objects, offset: Sequence[int], size: Sequence[int]
             ) -> tuple[np.ndarray, Objects]:
    (top, left), (height, width) = offset, size
    part = np.s_[top:top + height, left:left + width]
    boxes = (objects.boxes - np.array([left, top] * 2, dtype=np.float32)).clip(0, [width, height] * 2)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image[part], Objects(boxes[kept].astype(np.float32), objects.labels[kept],
                                objects.masks[kept][(slice(None), *part)])


class Sample(NamedTuple):
    """One image for the network, uint8 (h, w, 3), its objects, and its size before resizing."""
    image: np.ndarray
    objects: Objects
    original: Size


class DetectionBatch(NamedTuple):
    """Images uint8 (B, H, W, 3), zeros outside each one's `sizes` (height, width), int64 (B, 2); `originals`
    are those before resizing. Objects of all images one after the other, `counts` int64 (B,) each: boxes
    float32 (N, 4), labels int64 (N,), and masks uint8, flat, each of its image's size padded for itself.
    targets: 0, or UNREADABLE_TARGET where no image could be read; the rest as in `datasets.dataset.Batch`."""
    images: Tensor
    sizes: Tensor
    originals: Tensor
    counts: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    targets: Tensor
    indices: Tensor
    positions: Tensor
    epoch: int
    unreadable: tuple[tuple[int, str], ...]
    lost: str = ""

    def truths(self, seed: int, update: int, device: torch.device) -> list[Truth]:
        """What each image shows, on `device`, with the key of its draws."""
        found, counts = [], self.counts.tolist()
        sizes = [(height, width) for height, width in self.sizes.tolist()]
        areas = [count * padded(size)[0] * padded(size)[1] for count, size in zip(counts, sizes)]
        each = zip(self.boxes.to(device).split(counts), self.labels.to(device).split(counts),
                   self.masks.to(device).split(areas), sizes, self.positions.tolist())
        for box, label, mask, size, position in each:
            found.append(Truth(box, label, mask.view(len(box), *padded(size)), size,
                               (seed, update, position)))
        return found

    def network_input(self, device: torch.device) -> Tensor:
        """Normalised images float32 (B, 3, H, W), zeros around each."""
        return normalised(self.images.to(device, non_blocking=True), self.sizes.to(device))


class CocoImages(ImageDataset):
    """The images of a CocoSet, transformed for training or for evaluation.

    The draws of an image are keyed by seed, epoch and index, so that any number of processes and workers
    gives the same images and objects. Padding is a matter of the batch.
    """

    def __init__(self, rows: CocoSet, scales: Scales, seed: int = 0):
        self.rows, self.scales, self.seed = rows, scales, seed

    def __len__(self) -> int:
        return len(self.rows.photos)

    def path(self, index: int) -> str:
        """The image's file."""
        return self.rows.photos[index].path

    def sample(self, epoch: int, index: int, used: int) -> Sample:
        """Image `used` in place of `index`, in evaluation (epoch -1) without its objects.

        Raises BadImage for one that cannot be read or has another size than annotated.
        """
        image, size = self.rows.pixels(used), self.rows.photos[used].size
        if epoch < 0:
            return Sample(test_transform(image, self.scales), _nothing(), size)
        draws = numpy_generator(self.seed, "augment", epoch, index)
        return Sample(*train_transform(image, self.rows.objects(used), draws, self.scales), size)

    def __getitems__(self, items: Sequence[Item | int]) -> DetectionBatch:
        """A batch from (epoch, index, position) tuples in training or plain indices in evaluation."""
        rows = [item if isinstance(item, tuple) else (-1, item, -1) for item in items]
        bad: list[tuple[int, str]] = []
        samples = [self.first_readable(partial(self.sample, epoch, index), epoch, index, bad)
                   for epoch, index, _ in rows]
        targets = [UNREADABLE_TARGET if sample is None else 0 for sample in samples]
        indices, positions = torch.tensor([row[1:] for row in rows], dtype=torch.int64).T.contiguous()
        blank = [Sample(np.zeros((32, 32, 3), np.uint8), _nothing(), self.rows.photos[index].size)
                 for _, index, _ in rows]
        return DetectionBatch(**_together([sample or none for sample, none in zip(samples, blank)]),
                              targets=torch.tensor(targets), indices=indices, positions=positions,
                              epoch=rows[0][0], unreadable=tuple(bad))


def _together(samples: Sequence[Sample]) -> dict[str, Any]:
    """Images and objects of a batch, padded."""
    sizes = [(sample.image.shape[0], sample.image.shape[1]) for sample in samples]
    height, width = (max(sides) for sides in zip(*map(padded, sizes)))
    images, masks = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8), []
    for row, (h, w), sample in zip(images.numpy(), sizes, samples):
        row[:h, :w] = sample.image
        shown = np.zeros((len(sample.objects.boxes), *padded((h, w))), dtype=np.uint8)
        if len(shown):
            shown[:, :h, :w] = sample.objects.masks
        masks.append(shown.ravel())
    boxes, labels = (np.concatenate([getattr(sample.objects, name) for sample in samples])
                     for name in ("boxes", "labels"))
    return dict(
        images=images, sizes=torch.tensor(sizes), originals=torch.tensor([s.original for s in samples]),
        counts=torch.tensor([len(sample.objects.boxes) for sample in samples]),
        boxes=torch.from_numpy(boxes), labels=torch.from_numpy(labels),
        masks=torch.from_numpy(np.concatenate(masks)))


def network_input(image: np.ndarray, device: torch.device) -> Tensor:
    """One image uint8 (h, w, 3) as the network takes it, float32 (1, 3, H, W), padded."""
    size = padded((image.shape[0], image.shape[1]))
    canvas = torch.zeros(1, *size, 3, dtype=torch.uint8)
    canvas[0, :image.shape[0], :image.shape[1]] = torch.from_numpy(np.ascontiguousarray(image))
    return normalised(canvas.to(device), torch.tensor([image.shape[:2]], device=device))


def _nothing() -> Objects:
    return Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 1, 1), np.uint8))


class OrientedSampler(GlobalBatchSampler):
    """Global batches in which two neighbours are both landscapes or both not, so that padding costs little.

    As in its base, an epoch's order is a function of (seed, epoch) alone, whatever the number of processes.
    An image without a partner comes last.
    """

    def __init__(self, landscape: np.ndarray, *args, **kwargs):
        super().__init__(len(landscape), *args, **kwargs)
        self.landscape = landscape

    def order(self, epoch: int) -> np.ndarray:
        """The images of an epoch, int64 (images,)."""
        found = super().order(epoch)
        groups = [found[self.landscape[found] == kind] for kind in (False, True)]
        ends = [len(group) // TOGETHER * TOGETHER for group in groups]
        pairs = np.concatenate([group[:end].reshape(-1, TOGETHER) for group, end in zip(groups, ends)])
        pairs = pairs[numpy_generator(self.seed, "pairs", epoch).permutation(len(pairs))]
        return np.concatenate([pairs.ravel(), *(group[end:] for group, end in zip(groups, ends))])
