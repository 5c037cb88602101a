"""The data of a run from its options: what is where, which classes and labels; a look at a sample of it."""
import errno
import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from torch.utils.data import BatchSampler

from common.errors import UserError, kind_of
from common.log import logger
from common.synsets import imagenet_synsets
from common.text import duration, file_size, plural, printable
from config.options import Options
from datasets.cifar import read_cifar
from datasets.dataset import ImageDataset, ImageLoader, make_loader
from datasets.images import retried, unreadable
from datasets.index import IndexCache, Source
from datasets.labels import Subset, classes_of, map_folders, numbered, read_val_labels, recognise
from datasets.readers import SPLITS, Reader, find_split, no_images, open_reader, source_of
from datasets.sample import ensure_sample
from datasets.transforms import Erasing, eval_transform, train_transform

_PACK_RATE, _PACK_IMAGES = 150e6, 4000  # bytes, and images, per second of `tools.data pack`


@dataclass(frozen=True)
class Data:
    """`train` and `val` (None when not asked for), the class names in logit order, notes for the console, and
    which of ImageNet's validation sets `val` is, where that was asked for."""

    train: ImageDataset | None
    val: ImageDataset | None
    class_names: list[str]
    notes: list[str] = field(default_factory=list)
    subset: Subset | None = None

    @property
    def num_classes(self) -> int:
        """Number of logits the data wants."""
        return len(self.class_names)

    def describe(self) -> dict[str, object]:
        """Plain values for data.json in a run folder: classes, form, order, images per class, files left
        out, and notes."""
        found: dict[str, object] = {"classes": self.class_names, "notes": self.notes}
        for part, dataset in (("train", self.train), ("val", self.val)):
            if dataset is not None:
                counts = np.bincount(dataset.targets, minlength=self.num_classes).tolist()
                found[part] = {"images": len(dataset), "form": dataset.reader.form, "order": dataset.order,
                               "per_class": counts, "left_out": dataset.reader.left_out}
        return found


@dataclass(frozen=True)
class _Split:
    """A reader, and the labels and classes that count: its own, or those of a label file; label -1 for images
    that belong to the other split."""

    part: str
    reader: Reader
    labels: np.ndarray
    classes: list[str]


def build_data(options: Options, *, train: bool, evaluate: bool, class_names: list[str] | None = None,
               rank_zero: bool = True, order: str | None = None, companions: bool = False) -> Data:
    """Find the images and their classes.

    class_names: the checkpoint's list in logit order, which then decides; the data must fit it. rank_zero:
    only this process of a node writes the index cache. order: of a run to resume, its `train.order`, "" when
    its checkpoint has none; None for a new run. companions: ImageNet's V2, -A, -R and -Sketch, which are
    recognised, keep their own class folders, to be judged by a model with ImageNet's classes.
    Raises UserError for everything the user can fix; Failure for data of a resumed run that are not there.
    """
    if options.data_set == "SAMPLE":
        ensure_sample(options.data_path)
    cache = IndexCache(options.index_cache, options.reindex, rank_zero)
    notes: list[str] = []
    splits = [_split(options, part, cache, order, notes) for part in ["train"] * train + ["val"] * evaluate]
    subset = _companion(options, splits[0], class_names) if companions else None
    names = list(subset.folders) if subset else class_names
    if names is None:
        names = classes_of(_deciding_classes(options, splits[0]), options.nb_classes,
                           imagenet_layout=options.data_set in ("IMNET", "SAMPLE"),
                           allow_mismatch=options.allow_class_mismatch)
        notes += numbered(names, strict=not train and not options.allow_class_mismatch)
    built = {split.part: _dataset(options, split, names, notes) for split in splits}
    if subset and subset.columns:
        notes.append(f"val: {subset.name}, evaluated among its {len(subset.columns)} classes alone")
    return Data(built.get("train"), built.get("val"), list(names), notes, subset)


def _companion(options: Options, split: _Split, classes: list[str] | None) -> Subset | None:
    """The one of ImageNet's validation sets that `split` is, if its 1000 classes are the model's (`classes`)
    or among them (ImageNet-22k's); None for any other data, and for images held back from a train folder."""
    if options.data_set != "IMNET" or options.val_labels or options.nb_classes not in (None, 1000):
        return None
    if (split.labels < 0).any() or classes and not {*classes} >= {*imagenet_synsets()}:
        return None
    return recognise(split.reader)


def _split(options: Options, part: str, cache: IndexCache, order: str | None, notes: list[str]) -> _Split:
    # Where there are evaluation images, --val_fraction is not needed.
    missing = options.val_fraction and options.data_set != "CIFAR" and _source(options, "val", False) is None
    held_back = options.val_fraction if missing else 0.0
    source = _source(options, "train" if held_back else part, order is not None)
    if options.data_set == "CIFAR":
        reader: Reader = read_cifar(options.data_path, options.nb_classes or 100, part == "train")
    elif source is not None:
        reader = open_reader(source, cache, order if part == "train" else None)
        if part == "train" and reader.sequential and not options.allow_slow_parquet:
            root = printable(source.root)
            size = sum(os.path.getsize(os.path.join(source.root, name)) for name in source.files)
            took = duration(size / _PACK_RATE + len(reader) / _PACK_IMAGES)
            raise UserError(f"{root} is too slow for training; `python -m tools.data pack {root} FOLDER` "
                            f"makes tars ({file_size(size)}, about {took}), or give --allow_slow_parquet "
                            "true.", code="slow_form")
    else:
        raise UserError("The evaluation images are missing; give --eval_data_path FOLDER, --val_fraction 0.1 "
                        "or --disable_eval true.", code="missing_data")
    split = _labelled(options, part, reader)
    if not held_back:
        return split
    if part == "val":
        notes.append(f"val: {100 * held_back:g} % of each class of the training images, held back")
    mine = _held_back(reader, held_back) == (part == "val")
    return replace(split, labels=np.where(mine, split.labels, -1).astype(np.int32))


def _labelled(options: Options, part: str, reader: Reader) -> _Split:
    shown, training = printable(reader.root), part == "train"
    if reader.classes != [""]:
        if options.data_set == "image_folder" and {"train", "val"} <= set(reader.classes):
            raise UserError(f"{shown} holds train/ and val/, which are no classes; give --data_set IMNET, or "
                            f"--data_path {shown}/train.", code="no_class_folders")
        if options.val_labels and not training:
            logger.info("--val_labels has no effect: the images in %s lie in class folders.", shown)
        return _Split(part, reader, reader.labels, reader.classes)
    if training or not options.val_labels:
        raise UserError(f"{shown} has images but no class folders; make one per class or, to evaluate, give "
                        "--val_labels FILE (CSV of name,synset; or the devkit's).", code="no_class_folders")
    file_names = [os.path.basename(reader.name(i)) for i in range(len(reader))]
    classes, labels = np.unique(read_val_labels(options.val_labels, file_names), return_inverse=True)
    return _Split(part, reader, labels.astype(np.int32), classes.tolist())


def _source(options: Options, part: str, resumed: bool) -> Source | None:
    """Where a split lies; None for evaluation images that are nowhere. Those of a resumed run are waited for,
    because they were there."""
    own = options.data_set in ("CIFAR", "image_folder")
    given = options.eval_data_path if part == "val" else options.data_path if own else None
    if options.data_set == "CIFAR" or (part == "val" and own and not given):
        return None
    path = given or os.path.join(options.data_path, part)

    def look() -> Source:
        found = source_of(given, part) if given else find_split(options.data_path, part)
        if found is None or not os.path.isdir(found.root):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if resumed and not found.folders and not found.files:
            raise OSError(errno.ENODEV, "empty: is its disk mounted?", path)
        return found

    try:
        return retried(look, path) if resumed else look()
    except FileNotFoundError:
        if part == "val" and options.val_fraction and not given:
            return None
        raise no_images(os.path.abspath(path), "does not exist; --data_path must hold train/ and val/ with "
                        "one folder per class, or the tar or parquet files of both") from None
    except OSError as error:
        raise kind_of(error)(f"{printable(path)} cannot be read ({error.strerror}).",
                             code="data_lost") from error


def _held_back(reader: Reader, fraction: float) -> np.ndarray:
    """bool (N,): the images of each class whose names have the lowest hashes, so that neither the form nor
    the seed nor new images move others from one part to the other."""
    names = (f"{reader.classes[label]}/{reader.stem(i)}" for i, label in enumerate(reader.labels.tolist()))
    draws = np.array([int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"),
                                                     digest_size=7).digest()) for name in names])
    counts = np.bincount(reader.labels, minlength=len(reader.classes))
    rank = np.argsort(np.lexsort((draws, reader.labels)))
    held = np.minimum(np.maximum(1, np.round(counts * fraction)), counts - 1)
    return rank - (np.cumsum(counts) - counts)[reader.labels] < held[reader.labels]


def _deciding_classes(options: Options, split: _Split) -> list[str]:
    """The class folders that decide: those of the train folder when there is one, trained on or not."""
    if split.part == "train" or options.data_set == "CIFAR":
        return split.classes
    below = "" if options.data_set == "image_folder" else "train"
    folders = Source.of(os.path.join(options.data_path, below)).folders if options.data_path else ()
    return list(folders) or split.classes


def _dataset(options: Options, split: _Split, names: list[str], notes: list[str]) -> ImageDataset:
    """The data set of a split with its logit positions; what a person should know is added to `notes`."""
    part, reader, shown = split.part, split.reader, printable(split.reader.root)
    mine = split.labels[split.labels >= 0]
    empty = np.flatnonzero(np.bincount(mine, minlength=len(split.classes)) == 0)
    if len(empty) and part == "train" and not options.allow_class_mismatch and options.data_set != "CIFAR":
        raise UserError(f"{shown}: {plural(len(empty), 'class folder')} without an image, such as "
                        f"{printable(split.classes[empty[0]])}; remove or allow them "
                        "(--allow_class_mismatch true).", code="unexpected_classes")
    mapped = map_folders(split.classes, names, partial=set(names) >= set(imagenet_synsets()),
                         allow_mismatch=options.allow_class_mismatch, what=f"The {part} data ({shown})")
    targets = np.where(split.labels >= 0, mapped[split.labels], -1)
    known, found = int((targets >= 0).sum()), len(np.unique(targets[targets >= 0]))
    if len(names) < 2 or (part == "train" and found < 2):
        raise UserError(f"{shown} has images of one class only ({printable(split.classes[0])}); a network "
                        "needs at least two to learn anything.", code="one_class")
    if known < len(mine):
        notes.append(f"{part}: {len(mine) - known} images of unknown classes are skipped")
    size, training = options.input_size, part == "train"
    transform = train_transform(options) if training else eval_transform(size, options.crop_pct)
    erases = training and options.reprob > 0
    erasing = Erasing(options.reprob, options.recount, options.remode) if erases else None
    dataset = ImageDataset(reader, targets, transform, size, seed=options.seed, erasing=erasing,
                           exif_orientation=options.exif_orientation)
    classes = f"{found:,} classes" if found == len(names) else f"{found:,} of {len(names):,} classes"
    folder = os.path.basename(reader.root)
    alias = f" in {folder}/, as there is no {part}/" if folder in SPLITS[part][1:] else ""
    notes.append(f"{part}: {known:,} images in {classes}, {reader.form}{alias}, order {dataset.order[:8]}")
    if reader.left_out:
        types = Counter(reader.left_out).most_common()
        words = ", ".join(f"{count} {printable(kind)}" for kind, count in types)
        notes.append(f"{part}: skipped, not images: {words[:300]}")
    if part == "val" and tuple(names) == imagenet_synsets() and len(mine) != 50_000:
        notes.append(f"val: {known} images, the ImageNet validation set has 50000")
    return dataset


def eval_loader(data: Data, options: Options, rank: int = 0, world_size: int = 1, *,
                refuse_bad: bool = False) -> ImageLoader:
    """This rank's share of the validation images, each once over all ranks, in batches of 1.5 x batch_size.

    refuse_bad: an unreadable image is a UserError; otherwise it counts as incorrect and is kept in
    `bad_images`.
    """
    assert data.val is not None
    images = data.val.share(rank, world_size)
    batches = BatchSampler(images, max(1, int(1.5 * options.batch_size)), drop_last=False)
    return make_loader(data.val, options, batches, refuse_bad=refuse_bad)


def check_sample(dataset: ImageDataset, count: int = 64) -> tuple[float, list[str]]:
    """Seconds to load one image, and a sentence for each unreadable one of up to `count` spread evenly."""
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=np.int64).tolist()
    started = time.perf_counter()
    batch = dataset.__getitems__([(0, index, index) for index in chosen])
    return (time.perf_counter() - started) / len(chosen), [
        unreadable(dataset.path(index), reason) for index, reason in batch.unreadable]
