"""The data of a run from its options: what is where, which classes and labels; a look at a sample of it."""
import os
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import BatchSampler

from common.errors import UserError
from common.log import logger
from common.synsets import imagenet_synsets
from common.text import plural, printable
from config.options import Options
from datasets.cifar import read_cifar
from datasets.dataset import ImageDataset, ImageLoader, make_loader
from datasets.folders import class_folders
from datasets.images import unreadable
from datasets.labels import classes_of, map_folders, read_val_labels
from datasets.readers import IndexCache, Reader, open_reader
from datasets.sample import ensure_sample
from datasets.transforms import Erasing, eval_transform, train_transform


@dataclass(frozen=True)
class Data:
    """`train` and `val` (None when not asked for), the class names in logit order, and notes for the
    console."""

    train: ImageDataset | None
    val: ImageDataset | None
    class_names: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Number of logits the data wants."""
        return len(self.class_names)

    def describe(self) -> dict[str, object]:
        """Plain values for data.json in a run folder: classes, images per class, files left out, and
        notes."""
        found: dict[str, object] = {"classes": self.class_names, "notes": self.notes}
        for part, dataset in (("train", self.train), ("val", self.val)):
            if dataset is not None:
                counts = np.bincount(dataset.targets, minlength=self.num_classes).tolist()
                found[part] = {"images": len(dataset), "per_class": counts,
                               "left_out": dataset.reader.left_out}
        return found


@dataclass(frozen=True)
class _Split:
    """A reader, and the labels and classes that count: its own, or those of a label file (`noun` synset)."""

    part: str
    reader: Reader
    labels: np.ndarray
    classes: list[str]
    noun: str = "folder"


def build_data(options: Options, *, train: bool, evaluate: bool, class_names: list[str] | None = None,
               rank_zero: bool = True) -> Data:
    """Find the images and their classes.

    class_names: the checkpoint's list in logit order, which then decides; the data must fit it.
    rank_zero: only this process of a node writes the index cache.
    Raises UserError for everything the user can fix.
    """
    if options.data_set == "SAMPLE":
        ensure_sample(options.data_path)
    cache = IndexCache(options.index_cache, options.reindex, rank_zero)
    splits = [_split(options, part, cache) for part in ["train"] * train + ["val"] * evaluate]
    names, notes = class_names, []
    if names is None:
        names, notes = classes_of(
            _deciding_classes(options, splits[0]), options.nb_classes, evaluating=not train,
            imagenet_layout=options.data_set in ("IMNET", "SAMPLE"),
            allow_mismatch=options.allow_class_mismatch)
    built = {split.part: _dataset(options, split, names, notes) for split in splits}
    return Data(built.get("train"), built.get("val"), list(names), notes)


def _split(options: Options, part: str, cache: IndexCache) -> _Split:
    root, training = _root(options, part), part == "train"
    if options.data_set == "CIFAR":
        reader: Reader = read_cifar(root, options.nb_classes or 100, training)
    elif root:
        reader = open_reader(root, cache)
    else:
        raise UserError("The evaluation images are missing; give --eval_data_path FOLDER, or --disable_eval "
                        "true.", code="missing_data")
    shown = printable(reader.root)
    if reader.classes != [""]:
        if options.data_set == "image_folder" and {"train", "val"} <= set(reader.classes):
            raise UserError(f"{shown} holds train/ and val/, which are no classes; give --data_set IMNET, or "
                            f"--data_path {shown}/train --eval_data_path {shown}/val.",
                            code="no_class_folders")
        if options.val_labels and not training:
            logger.info("--val_labels has no effect: the images in %s lie in class folders.", shown)
        return _Split(part, reader, reader.labels, reader.classes)
    if training or not options.val_labels:
        raise UserError(f"{shown} holds images but no class folders; sort them into one folder per class, "
                        "or, for evaluation images, give --val_labels FILE (a CSV of file name,synset, or "
                        "the devkit's ILSVRC2012_validation_ground_truth.txt with meta.mat beside it).",
                        code="no_class_folders")
    file_names = [os.path.basename(reader.name(i)) for i in range(len(reader))]
    classes, labels = np.unique(read_val_labels(options.val_labels, file_names), return_inverse=True)
    return _Split(part, reader, labels.astype(np.int32), classes.tolist(), "synset")


def _root(options: Options, part: str) -> str:
    """The folder of a split; '' for one that the options do not name."""
    if part == "val" and (options.eval_data_path or options.data_set == "image_folder"):
        return options.eval_data_path or ""
    if not options.data_path or options.data_set in ("CIFAR", "image_folder"):
        return options.data_path
    return os.path.join(options.data_path, part)


def _deciding_classes(options: Options, split: _Split) -> list[str]:
    """The class folders that decide: those of the train folder when there is one, trained on or not."""
    root = _root(options, "train")
    here = split.part == "val" and options.data_set != "CIFAR" and os.path.isdir(root)
    return (class_folders(root) if here else []) or split.classes


def _dataset(options: Options, split: _Split, names: list[str], notes: list[str]) -> ImageDataset:
    """The data set of a split with its logit positions; what a person should know is added to `notes`."""
    part, reader, shown = split.part, split.reader, printable(split.reader.root)
    empty = np.flatnonzero(np.bincount(split.labels, minlength=len(split.classes)) == 0)
    if len(empty) and part == "train" and not options.allow_class_mismatch and options.data_set != "CIFAR":
        raise UserError(f"{plural(len(empty), 'class folder')} in {shown} without an image, such as "
                        f"{printable(split.classes[empty[0]])}; remove them, or train anyway with "
                        "--allow_class_mismatch true.", code="unexpected_classes")
    mapped = map_folders(split.classes, names, partial=set(names) >= set(imagenet_synsets()), noun=split.noun,
                         allow_mismatch=options.allow_class_mismatch, what=f"the {part} data ({shown})")
    targets = mapped[split.labels]
    known, found = int((targets >= 0).sum()), len(np.unique(targets[targets >= 0]))
    if len(names) < 2 or (part == "train" and found < 2):
        raise UserError(f"{shown} has images of one class only ({printable(split.classes[0])}), so any "
                        "network is correct without learning; give at least two class folders.",
                        code="one_class")
    if known < len(targets):
        notes.append(f"{part}: {len(targets) - known} images of {split.noun}s without a class are skipped")
    notes.append(f"{part}: {known} images in {found} of {len(names)} classes")
    if reader.left_out:
        types = Counter(reader.left_out).most_common()
        words = ", ".join(f"{count} {printable(kind)}" for kind, count in types)
        notes.append(f"{part}: skipped, not images: {words[:300]}")
    if part == "val" and tuple(names) == imagenet_synsets() and len(targets) != 50_000:
        notes.append(f"val: {len(targets)} images, the ImageNet validation set has 50000")
    size, training = options.input_size, part == "train"
    transform = train_transform(options) if training else eval_transform(size, options.crop_pct)
    erasing = Erasing(options.reprob, options.recount) if training and options.reprob > 0 else None
    return ImageDataset(reader, targets, transform, size, seed=options.seed, erasing=erasing,
                        exif_orientation=options.exif_orientation)


def eval_loader(data: Data, options: Options, rank: int = 0, world_size: int = 1, *,
                refuse_bad: bool = False) -> ImageLoader:
    """This rank's share of the validation images, each once over all ranks, in batches of 1.5 x batch_size.

    refuse_bad: an unreadable image is a UserError; otherwise it counts as incorrect and is kept in
    `bad_images`.
    """
    assert data.val is not None
    images = range(rank, len(data.val), world_size)
    batches = BatchSampler(images, max(1, int(1.5 * options.batch_size)), drop_last=False)
    return make_loader(data.val, options, batches, refuse_bad=refuse_bad)


def check_sample(dataset: ImageDataset, count: int = 64) -> tuple[float, list[str]]:
    """Seconds to load one image, and a sentence for each unreadable one of up to `count` spread evenly."""
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=np.int64).tolist()
    started = time.perf_counter()
    batch = dataset.__getitems__([(0, index, index) for index in chosen])
    return (time.perf_counter() - started) / len(chosen), [
        unreadable(dataset.path(index), reason) for index, reason in batch.unreadable]
