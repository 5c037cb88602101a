"""The data of a run from its options: what is where, which classes, which labels."""
import os
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import BatchSampler

from common.errors import UserError
from common.log import logger
from common.synsets import imagenet_synsets
from datasets import labels as label_maps
from datasets.cifar import read_cifar
from datasets.dataset import ImageDataset, ImageLoader, Reader, make_loader
from datasets.images import show
from datasets.readers import FolderReader, class_folders, index_folder
from datasets.sample import ensure_sample
from datasets.sampler import ExactEvalSampler, GlobalBatchSampler
from datasets.shards import ShardReader, shards_in
from datasets.transforms import Erasing, eval_transform, train_transform


@dataclass
class Data:
    """`train` and `val` (None when not asked for), the class names in logit order, and notes for the console."""

    train: ImageDataset | None
    val: ImageDataset | None
    class_names: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Number of logits the data wants."""
        return len(self.class_names)

    def describe(self) -> dict[str, object]:
        """Plain values for data.json in a run folder: classes, images per class and notes."""
        return {"classes": self.class_names, "notes": self.notes} | {part: {
            "images": len(dataset), "per_class": np.bincount(dataset.targets, minlength=self.num_classes).tolist()}
            for part, dataset in (("train", self.train), ("val", self.val)) if dataset}


def build_data(options, *, train: bool, evaluate: bool, class_names: list[str] | None = None,
               rank_zero: bool = True) -> Data:
    """Find the images and their classes.

    options: data_set (IMNET, image_folder, CIFAR, SAMPLE), data_path, eval_data_path, nb_classes, val_labels,
        allow_class_mismatch, reindex and the transform options.
    class_names: the checkpoint's list in logit order, which then decides; the data must fit it.
    rank_zero: only this process of a node writes the index cache.
    Raises UserError for everything the user can mend.
    """
    if options.data_set not in ("IMNET", "image_folder", "CIFAR", "SAMPLE"):
        raise UserError(f"--data_set {options.data_set} is not one of IMNET, image_folder, CIFAR, SAMPLE.")
    if options.data_set == "SAMPLE":
        ensure_sample(options.data_path)
    notes: list[str] = []
    train_reader, val_reader = _readers(options, train, evaluate, rank_zero)
    names = class_names
    if names is None:
        found = label_maps.classes_of(
            _class_folders(options, train_reader, val_reader), options.nb_classes,
            imagenet_layout=options.data_set in ("IMNET", "SAMPLE"), allow_mismatch=options.allow_class_mismatch,
            evaluating=not train)
        names, notes = found.names, found.notes
    parts = []
    for reader, part in ((train_reader if train else None, "train"), (val_reader, "val")):
        parts.append(None if reader is None else _dataset(options, reader, list(names), part, notes))
    return Data(*parts, list(names), notes)


def _roots(options) -> tuple[str, str]:
    """Train and val folder; '' for one that the options do not name."""
    if options.data_set == "image_folder":
        return options.data_path, options.eval_data_path or ""
    below = options.data_path and os.path.join(options.data_path, "")
    return below and below + "train", options.eval_data_path or (below and below + "val")


def _class_folders(options, train: Reader | None, val: Reader | None) -> list[str]:
    """The class folders that decide: those of the train folder when there is one, trained on or not."""
    if train is not None:
        return train.classes
    root = "" if options.data_set == "CIFAR" else _roots(options)[0]
    return (class_folders(root) if root and os.path.isdir(root) else []) or val.classes


def _readers(options, train: bool, evaluate: bool, write: bool) -> tuple[Reader | None, Reader | None]:
    if options.data_set == "CIFAR":
        classes = options.nb_classes or 100
        return (read_cifar(options.data_path, classes, True) if train else None,
                read_cifar(options.eval_data_path or options.data_path, classes, False) if evaluate else None)
    train_root, val_root = _roots(options)
    if evaluate and not val_root:
        raise UserError("The evaluation images are not named; give --eval_data_path FOLDER with the validation "
                        "classes, or --disable_eval true.")
    arguments = dict(reindex=options.reindex, cache_folder=options.index_cache, write_cache=write)
    train_reader = val_reader = None
    if train:
        train_reader = _pictures_in(train_root, arguments)
        _check_classes(train_reader, options.allow_class_mismatch, options.data_set == "image_folder")
    if evaluate:
        val_reader = _pictures_in(val_root, arguments)
        if val_reader.classes == [""]:
            val_reader = _flat(val_reader, options.val_labels)
        elif options.val_labels:
            logger.info("--val_labels has no effect: the images in %s lie in class folders.", show(val_root))
    return train_reader, val_reader


def _pictures_in(root: str, arguments: dict) -> FolderReader | ShardReader:
    return ShardReader(root, **arguments) if shards_in(root) else FolderReader(index_folder(root, **arguments))


def _check_classes(train: FolderReader | ShardReader, allow_empty: bool, image_folder: bool) -> None:
    root = show(_source(train))
    if train.classes == [""]:
        raise UserError(f"{root} holds images but no class folders; sort them into one folder per class.")
    if image_folder and {"train", "val"} <= set(train.classes):
        raise UserError(f"{root} holds train/ and val/, which are no classes; with --data_set image_folder --data_path is the "
                        f"train folder itself: give --data_path {root}/train --eval_data_path {root}/val, or --data_set IMNET.")
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(empty) and not allow_empty:
        raise UserError(f"{len(empty)} class folders in {root} hold no image, such as "
                        f"{show(train.classes[empty[0]])}; remove them, or train on with --allow_class_mismatch true.")


def _flat(reader: FolderReader, val_labels: str | None) -> FolderReader:
    """Give the images of a flat val folder the classes of the label file."""
    if not val_labels:
        raise UserError(f"{show(reader.index.root)} holds images but no class folders; give their classes with "
                        "--val_labels FILE (a CSV of file name,synset, or the devkit's "
                        "ILSVRC2012_validation_ground_truth.txt with meta.mat beside it), or sort them into one folder "
                        "per class.")
    found = label_maps.read_val_labels(val_labels, [os.path.basename(reader.path(i)) for i in range(len(reader))])
    reader.classes, places = (part.tolist() for part in np.unique(found, return_inverse=True))
    reader.labels = np.array(places, dtype=np.int32)
    return reader


def _dataset(options, reader: Reader, names: list[str], part: str, notes: list[str]) -> ImageDataset:
    training = part == "train"
    places = label_maps.map_folders(
        reader.classes, names, partial=set(names) >= set(imagenet_synsets()),
        allow_mismatch=options.allow_class_mismatch, what=f"the {part} data ({show(_source(reader))})")
    targets = places[reader.labels]
    left_out = int((targets < 0).sum())
    if left_out:
        notes.append(f"{part}: {left_out} images of folders without a class are left out")
    found = len(np.unique(targets[targets >= 0]))
    notes.append(f"{part}: {len(targets) - left_out} images in {found} of {len(names)} classes")
    if not training and tuple(names) == imagenet_synsets() and len(targets) != 50_000:
        notes.append(f"val: {len(targets)} images, the ImageNet validation set has 50000")
    size = options.input_size
    if training:
        erasing = Erasing(options.reprob, options.recount) if options.reprob > 0 else None
        return ImageDataset(reader, targets, train_transform(options), size, seed=options.seed, erasing=erasing)
    return ImageDataset(reader, targets, eval_transform(size, options.crop_pct), size)


def _source(reader: Reader) -> str:
    return reader.index.root if isinstance(reader, FolderReader) else reader.source


def train_loader(data: Data, options, sampler: GlobalBatchSampler) -> ImageLoader:
    """One loader for the whole run; call `sampler.set_start(epoch, update)` before each iteration."""
    return make_loader(data.train, options, sampler)


def eval_loader(data: Data, options, rank: int = 0, world_size: int = 1) -> ImageLoader:
    """This rank's share of the validation images, each once over all ranks, in batches of 1.5 x batch_size."""
    sampler = ExactEvalSampler(len(data.val), rank, world_size)
    batches = BatchSampler(sampler, max(1, int(1.5 * options.batch_size)), drop_last=False)
    return make_loader(data.val, options, batches, refuse_bad=not options.allow_bad_images)
