"""ADE20K's layout: images and their label maps, as samples of training and of evaluation."""
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from common.errors import UserError
from common.random import numpy_generator
from common.text import plural, printable
from datasets.build import Data, check_sample
from datasets.dataset import UNREADABLE_TARGET, Batch, ImageDataset
from datasets.images import BadImage, decode, extensions, read_file
from datasets.sample import ensure_sample
from datasets.sampler import GlobalBatchSampler, Item
from dense.inference import scaled_boxes
from dense.options import SegmentationOptions
from dense.pixels import Draws, distort, fitted, opencv, resize, resize_labels
from dense.scenes import write_segmentation
from dense.segmentor import IGNORED

MS_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
FOLDERS = {"train": ("training", "train"), "val": ("validation", "val")}
MOST_OF_ONE_CLASS = 0.75  # of a crop's labelled pixels
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Pairs:
    """A split's files: `images[i]` belongs to `labels[i]`, "" where there are no labels."""
    images: list[str]
    labels: list[str]


def find_pairs(options: SegmentationOptions, part: str) -> Pairs:
    """The images of "train" or "val" with their label maps (PNG of the same name). Raises UserError for a
    folder or label map that is missing."""
    images = _split(Path(options.data_path) / ("" if options.label_path else "images"), part)
    labels = _split(Path(options.label_path or Path(options.data_path) / "annotations"), part)
    endings = extensions()
    found = sorted(path for path in images.rglob("*") if path.name.lower().endswith(endings)
                   and not path.name.startswith("."))
    maps = [labels / path.relative_to(images).with_suffix(".png") for path in found]
    missing = [path for path in maps if not path.is_file()]
    if missing or not found:
        what = (f"{plural(len(missing), 'label map')} of {plural(len(found), 'image')} missing, such as "
                f"{printable(str(missing[0]))}" if missing else f"{printable(str(images))} holds no images")
        raise UserError(f"{what}; give --data_path, and --label_path where the label maps lie elsewhere.",
                        code="missing_data")
    return Pairs([*map(str, found)], [*map(str, maps)])


def _split(root: Path, part: str) -> Path:
    for name in FOLDERS[part]:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{printable(str(root))} has no folder {' or '.join(FOLDERS[part])}; give --data_path "
                    "FOLDER with images/ and annotations/.", code="missing_data")


def class_names(options: SegmentationOptions) -> list[str]:
    """The names in `--classes`, else of ADE20K's list (objectInfo150.txt) where it lies beside the data, else
    the numbers from 1 to 150."""
    listed = Path(options.data_path) / "objectInfo150.txt"
    try:
        if options.classes:
            names = [line.strip() for line in Path(options.classes).read_text("utf-8").splitlines()]
        elif listed.is_file():
            names = [line.split("\t")[-1].strip() for line in listed.read_text("utf-8").splitlines()[1:]]
        else:
            names = [str(number) for number in range(1, 151)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {options.classes or listed} cannot be read "
                        f"({getattr(error, 'strerror', None) or 'it is no text'}); give a file with one name "
                        "per line.", code="missing_data") from None
    names = [name for name in names if name]
    if not 2 <= len(names) <= IGNORED or len(set(names)) < len(names):
        raise UserError(f"--classes {options.classes or listed} has {plural(len(names), 'name')}, of which "
                        f"{len(set(names))} differ; give from 2 to {IGNORED} different ones, one per line.",
                        code="unexpected_classes")
    return names


class LabelledImages(ImageDataset):
    """Images and label maps of a split.

    In training an item gives a Batch of crops: images uint8 (B, crop, crop, 3), targets int16 (B, crop,
    crop) with 255 where there is no class, boxes int32 (B, 1, 4) with each crop's height and width (the rest
    is padding) in the last two places. In evaluation a Batch of one image: `images` is a list of uint8
    (h, w, 3), one for each scale, and targets int16 (1, H, W) at the original size.
    """

    def __init__(self, pairs: Pairs, classes: int, options: SegmentationOptions):
        self.pairs, self.classes, self.options, self.seed = pairs, classes, options, options.seed

    def __len__(self) -> int:
        return len(self.pairs.images)

    def path(self, index: int) -> str:
        """The image's file."""
        return self.pairs.images[index]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3), turned as its EXIF entry says, and labels int16 (H, W), 255 for none.

        Raises BadImage for what cannot be read or does not fit.
        """
        image = np.array(decode(read_file(self.path(index)), exif_orientation=True))
        labels = read_labels(self.pairs.labels[index], self.classes, self.options.zero_ignored)
        if labels.shape != image.shape[:2]:
            raise BadImage("its label map has {1}x{0} pixels, the image {3}x{2}".format(
                *labels.shape, *image.shape[:2]))
        return image, labels

    def __getitems__(self, items: Sequence[Item | int]) -> Batch:
        """A Batch from (epoch, index, position) tuples in training or one plain index in evaluation."""
        if isinstance(items[0], int):
            return self._whole(items[0])
        count, side = len(items), self.options.crop_size
        images = torch.empty(count, side, side, 3, dtype=torch.uint8)
        targets = torch.empty(count, side, side, dtype=torch.int16)
        for tensor in (images, targets) if get_worker_info() is not None else ():
            tensor.share_memory_()  # while still empty: filled in place, it is not copied on its way out
        boxes, unreadable = torch.zeros(count, 1, 4, dtype=torch.int32), []
        rows = [item for item in items if isinstance(item, tuple)]
        for row, (epoch, index, _) in enumerate(rows):
            draws = numpy_generator(self.seed, "augment", epoch, index)
            pair = self.first_readable(self.read, epoch, index, unreadable)
            if pair is None:
                targets[row] = UNREADABLE_TARGET
                continue
            image, labels = sample(*pair, draws, self.options)
            boxes[row, 0, 2:] = torch.tensor(labels.shape)
            pad_into(images.numpy()[row], image, 0)
            pad_into(targets.numpy()[row], labels, IGNORED)
        indices, positions = torch.tensor([row[1:] for row in rows], dtype=torch.int64).T.contiguous()
        return Batch(images, targets, indices, positions, boxes, rows[0][0], tuple(unreadable))

    def _whole(self, index: int) -> Batch:
        indices, unreadable = torch.tensor([index]), ()
        try:
            image, labels = self.read(index)
            scaled = at_scales(image, self.options)
        except BadImage as error:
            scaled, unreadable = [], ((index, str(error)),)
            labels = np.zeros((0, 0), np.int16)
            with suppress(BadImage):  # then its pixels count as incorrect
                labels = read_labels(self.pairs.labels[index], self.classes, self.options.zero_ignored)
        none = torch.zeros(0)
        target = torch.from_numpy(labels)[None]
        return Batch(scaled, target, indices, none, none, -1, unreadable)  # type: ignore[arg-type]


def at_scales(image: np.ndarray, options: SegmentationOptions) -> list[torch.Tensor]:
    """The image at each scale of an evaluation, uint8 (h, w, 3). Raises BadImage for one too small."""
    ratios = MS_RATIOS if options.ms_flip else (1.0,)
    sizes = [fitted(image.shape[:2], box) for box in scaled_boxes(options.image_scale, ratios)]
    if min(map(min, sizes)) < SMALLEST_SIDE:
        raise BadImage(f"{min(sizes)} pixels when scaled, and the network needs {SMALLEST_SIDE}")
    return [torch.from_numpy(np.array(resize(image, size))) for size in sizes]


def read_labels(path: str, classes: int, zero_ignored: bool) -> np.ndarray:
    """A label map, int16 (H, W), classes from 0 on and 255 for none. Raises BadImage."""
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P", "1", "I", "I;16"):
                raise BadImage(f"its label map has the mode {file.mode}: one number per pixel is needed")
            labels = np.array(file).astype(np.int32)
    except BadImage:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise BadImage(f"its label map: {' '.join(str(error).split())[:150]}") from error
    if zero_ignored:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    outside = (labels >= classes) & (labels != IGNORED)
    if outside.any():
        raise BadImage(f"its label map has the label {labels[outside][0] + zero_ignored}, outside the "
                       f"{classes} classes")
    return labels.astype(np.int16)


def sample(image: np.ndarray, labels: np.ndarray, draws: Draws, options: SegmentationOptions
           ) -> tuple[np.ndarray, np.ndarray]:
    """A training sample: scaled, cropped to at most `crop_size`, flipped, distorted; uint8 and int16."""
    ratio = draws.uniform(*options.jitter)
    size = fitted(labels.shape, scaled_boxes(options.image_scale, [ratio])[0])
    labels = resize_labels(labels, size)
    top, left = crop_place(labels, draws, options.crop_size)
    window = slice(top, top + options.crop_size), slice(left, left + options.crop_size)
    image, labels = resize(image, size)[window], labels[window]
    if draws.uniform(0, 1) < 0.5:
        image, labels = np.ascontiguousarray(image[:, ::-1]), labels[:, ::-1]
    return distort(image, draws), labels


def crop_place(labels: np.ndarray, draws: Draws, crop: int) -> tuple[int, int]:
    """Top and left of a crop with more than one class, none with 75 % of the labelled pixels; of up to eleven
    draws the last is taken as it is."""
    top = left = 0
    for _ in range(11):
        top, left = (int(draws.integers(0, max(side - crop, 0) + 1)) for side in labels.shape)
        counts = np.bincount(labels[top:top + crop, left:left + crop].ravel(), minlength=IGNORED)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < MOST_OF_ONE_CLASS:
            break
    return top, left


def pad_into(target: np.ndarray, values: np.ndarray, fill: int) -> None:
    """Write `values` to the top left of `target`, `fill` to the right and below."""
    target[:] = fill
    target[:values.shape[0], :values.shape[1]] = values


class UpdateSampler(GlobalBatchSampler):
    """Global batches one after the other through as many passes over the images as it takes: an "epoch" is
    `updates` updates and may end anywhere in a pass, of which nothing is left out."""

    def __init__(self, *arguments, updates: int):
        super().__init__(*arguments)
        self.updates = updates

    @property
    def updates_per_epoch(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[list[Item]]:
        order, current = np.zeros(0, np.int64), -1
        for update in range(self.first_update, self.updates):
            start = ((self.epoch * self.updates + update) * self.global_batch
                     + self.rank * self.batch_size * self.update_freq)
            for first in range(start, start + self.batch_size * self.update_freq, self.batch_size):
                items = []
                for position in range(first, first + self.batch_size):
                    turn, place = divmod(position, self.num_images)
                    if turn != current:
                        order, current = self.order(turn), turn
                    items.append((turn, int(order[place]), position))
                yield items


@dataclass(frozen=True)
class SceneData(Data):
    """Data whose splits hold label maps or objects."""

    def describe(self) -> dict[str, object]:
        """Plain values for data.json."""
        found: dict[str, object] = {"classes": self.class_names, "notes": self.notes}
        for part, dataset in (("train", self.train), ("val", self.val)):
            found |= {} if dataset is None else {part: {"images": len(dataset)}}
        return found


def find_data(options: SegmentationOptions, classes: list[str] | None, train: bool, evaluate: bool
              ) -> SceneData:
    """The splits that are wanted; `classes` are those of a checkpoint. A few pairs of each are read, so that
    label maps of another kind are refused at the start."""
    if options.data_set == "SAMPLE":
        ensure_sample(options.data_path, write_segmentation, ("images", "annotations"), "drawn scenes")
        options.classes = os.path.join(options.data_path, "classes.txt")
    opencv()  # asked once, before loader processes are forked
    names = class_names(options)
    if classes and len(classes) != len(names):
        raise UserError(f"the checkpoint has {plural(len(classes), 'class')}, --classes {len(names)}; give "
                        "the list it was trained with.", code="other_classes")
    notes, found = [], {}
    for part in ["train"] * train + ["val"] * evaluate:
        dataset = LabelledImages(find_pairs(options, part), len(names), options)
        notes.append(f"{part}: {len(dataset)} images, {len(names)} classes")
        bad = sorted(set(check_sample(dataset, 5)[1]))
        if len(bad) > 2:
            raise UserError(f"Of a few images {bad[0]}, and it is not the only one; see --classes, "
                            "--zero_ignored and --label_path.", code="unreadable_image")
        found[part] = dataset
    return SceneData(found.get("train"), found.get("val"), list(classes or names), notes)
