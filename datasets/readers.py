"""Where images come from: what every form of data gives, which forms there are, and which files make a split.

To add a form, write a module with `recognise(source) -> bool` and `scan(source) -> Index`, and name it in
FORMS. Where bytes are read otherwise than from an offset of a file, the module also has `Images`, a subclass
of `datasets.index.Indexed`.
"""
import importlib
import os
import re
from dataclasses import replace
from typing import Protocol

import numpy as np

from common.errors import UserError, kind_of
from common.text import duration, file_size, printable
from datasets.images import is_image, retried
from datasets.index import IndexCache, Indexed, Source, visible

# Modules of this package; the first that recognises a source reads it.
FORMS = ("originals", "webdataset", "tars", "parquet", "folders")

# Names of a split's folder, or words in the names of its files, in the order in which they are looked for.
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
_PACK_RATE, _PACK_IMAGES = 150e6, 4000  # bytes, and images, per second of `tools.data pack`
_CONTAINERS = (".tar", ".parquet")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


class Reader(Protocol):
    """Images of one split, in canonical order: by class, then file name without extension, then extension.

    root: the folder, for messages · form: what the images lie in, in words · labels: int32 (N,), positions in
    `classes` (sorted as text) · order: digest of classes and names in their order, the same for the same
    images in any form · left_out: how many files of which type (`.txt`) are no images · storage: int64 (N,),
    the images in the order in which they are stored, where no other is read fast; None where any is.
    """

    root: str
    form: str
    labels: np.ndarray
    classes: list[str]
    order: str
    left_out: dict[str, int]
    storage: np.ndarray | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where image `index` lies: the path of its file, or the container's path and the name in it."""
        ...

    def stem(self, index: int) -> str:
        """The name of image `index` below its class, without extension."""
        ...

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index` as stored; raises BadImage. Called in workers."""
        ...


def open_reader(source: Source, cache: IndexCache, order: str | None = None) -> Reader:
    """The images of `source` through the first form that recognises it; UserError when there are none.

    order: digest of the order that is wanted where there are two; "" is that of earlier versions, which
    sorted by the whole name; None the canonical one.
    """
    for form in FORMS:
        module = importlib.import_module(f"datasets.{form}")
        if module.recognise(source):
            _check_one_form(source)
            try:
                index = retried(lambda: cache.index(form, source, module.scan), source.root)
            except OSError as error:
                path = printable(os.fsdecode(error.filename or source.root))
                raise kind_of(error)(f"{path} cannot be read ({error.strerror or error}); check disk and "
                                     "permissions.", code="unreadable_data") from error
            if not len(index.labels):
                raise no_images(source.root, "holds no images in class folders, tar or parquet files; check "
                                             "the path")
            return getattr(module, "Images", Indexed)(index.in_order(order))
    raise no_images(source.root, "does not exist")


def _check_one_form(source: Source) -> None:
    """Images left beside the others would be missing in silence."""
    kinds = {ending for ending in _CONTAINERS if source.ending(ending)}
    beside = next((folder for folder in source.folders if kinds and not source.split and any(
        is_image(entry.name) for entry in visible(os.path.join(source.root, folder)))), None)
    if len(kinds) > 1 or beside:
        found = " and ".join([*(f"{kind} files" for kind in sorted(kinds)), *([f"folder {printable(beside)}"]
                                                                            if beside else [])])
        raise UserError(f"{printable(source.root)} holds images in more than one form: {found}; leave one.",
                        code="mixed_forms")


def find_split(data_path: str, part: str) -> Source | None:
    """The train or val images of a data set: a folder of that name, or the containers in `data_path` whose
    names say so, as one downloads them; None when there are none."""
    for name in SPLITS[part]:
        if os.path.isdir(os.path.join(data_path, name)):
            return Source.of(os.path.join(data_path, name))
    for root in (data_path, os.path.join(data_path, "data")):
        if os.path.isdir(root) and (source := source_of(root, part)).split:
            return source
    return None


def source_of(root: str, part: str) -> Source:
    """The images in the folder `root`; only the containers of one split where names tell splits apart."""
    source = Source.of(root)
    for name in SPLITS[part]:
        mine = [file for file in source.files if file.endswith(_CONTAINERS)
                and re.search(rf"(?<![a-z]){name}(?![a-z])", file, re.IGNORECASE)]
        if mine:
            others = [file for file in source.files if not file.endswith(_CONTAINERS)]
            return replace(source, files=tuple(mine + others), split=name)
    return source


def too_slow(source: Source, images: int) -> UserError:
    """The refusal to train from a form of which only the stored order is read fast."""
    size = sum(os.path.getsize(os.path.join(source.root, name)) for name in source.files)
    return UserError(f"{printable(source.root)} is read by groups of rows, too slowly for training in random "
                     f"order: `python -m tools.data pack {printable(source.root)} FOLDER` makes tars of it "
                     f"({file_size(size)}, about {duration(size / _PACK_RATE + images / _PACK_IMAGES)} on a "
                     "local disk), or train all the same with --allow_slow_parquet true.", code="slow_form")


def no_images(root: str, problem: str) -> UserError:
    """The error for a folder without images, with a hint where an archive lies in it or beside it."""
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    names += [os.path.basename(root) + ending for ending in _ARCHIVES if os.path.isfile(root + ending)]
    found = [name for name in names if name.endswith(_ARCHIVES)][:1]
    hint = "".join(f"; unpack {printable(name)}, or move plain .tar files into that folder" for name in found)
    return UserError(f"{printable(root)} {problem}{hint}.", code="missing_data")
