"""Where images come from: what every form of data gives, which forms there are, and which files make a split.

To add a form, write a module with `recognise(source) -> bool` and `scan(source) -> Index`, and name it in
FORMS. Where bytes are read otherwise than from an offset of a file, the module also has `Images`, a subclass
of `Reader`.
"""
import importlib
import io
import os
import re
from dataclasses import replace
from functools import lru_cache

import numpy as np

from common.errors import UserError, kind_of
from common.text import printable
from datasets.images import LARGEST_FILE, BadImage, is_image, read_file, retried
from datasets.index import Index, IndexCache, Source, visible

# Modules of this package; the first that recognises a source reads it.
FORMS = ("webdataset", "tars", "parquet", "folders")
# Names of a split's folder, or words in the names of its files, in the order in which they are looked for.
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
_CONTAINERS = (".tar", ".parquet")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


class Reader:
    """Images of one split, files or parts of containers, in canonical order: by class, then file name without
    extension, then extension.

    root: the folder, for messages · form: what the images lie in, in words · labels: int32 (N,), positions in
    `classes` (sorted as text) · order: digest of classes and names in their order, the same for the same
    images in any form · left_out: how many files of which type (`.txt`) are no images.
    """

    sequential = False  # whether only the stored order is read fast

    def __init__(self, index: Index):
        self.root, self.form, self.left_out, self.index = index.root, index.form, index.left_out, index
        self.labels, self.classes, self.order = index.arrays["labels"], index.classes, index.order
        self.stamps = index.arrays["stamps"].reshape(-1, 2)
        self.containers, self.offsets = index.arrays["containers"], index.arrays["offsets"]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file, or the container, a slash, and the name inside; bytes that are not UTF-8 as surrogates,
        as Python's file functions have them."""
        above = self.container(index) if len(self.containers) else os.path.join(
            self.root, self.classes[self.labels[index]])
        return os.path.join(above, self.index.name(index))

    def stem(self, index: int) -> str:
        """The name of image `index` below its class, without extension."""
        return self.index.canonical(self.index.name(index))[0]

    def container(self, index: int) -> str:
        """The path of the file that image `index` lies in."""
        return os.path.join(self.root, self.index.seen[self.containers[index]])

    def stored_order(self) -> np.ndarray:
        """The images in the order in which they lie on the disk, int64 (N,)."""
        return np.lexsort((self.offsets, self.containers)) if len(self.containers) else np.arange(len(self))

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index` as stored; BadImage when its container has changed since the start.
        Called in workers."""
        if not len(self.containers):
            path = self.name(index)
            return read_file(path, there=os.path.dirname(path))
        path, stamp = self.container(index), self.stamps[self.containers[index]].tolist()
        start, size = int(self.offsets[index]), int(self.index.arrays["lengths"][index])
        if size > LARGEST_FILE:
            raise BadImage("larger than any image")
        # pread needs no position, so that forked workers can share the file.
        data = retried(lambda: os.pread(_opened(path, *stamp).fileno(), size, start), path)
        if len(data) != size:
            raise BadImage("its container ends before the image does")
        return data


@lru_cache(maxsize=64)
def _opened(path: str, changed: int, size: int) -> io.FileIO:
    """The file, which closes itself when it is the one of 64 that was not used for longest."""
    check_unchanged(path, changed, size)
    return io.FileIO(path)


def check_unchanged(path: str, changed: int, size: int) -> None:
    """BadImage when a container is not the one that was indexed."""
    status = os.stat(path)
    if (status.st_mtime_ns, status.st_size) != (changed, size):
        raise BadImage("its container has changed since the start")


def open_reader(source: Source, cache: IndexCache, order: str | None = None) -> Reader:
    """The images of `source` through the first form that recognises it; UserError when there are none.

    order: digest of the order that is wanted where there are two; "" is that of earlier versions, which
    sorted by the whole name; None the canonical one.
    """
    forms = (importlib.import_module(f"datasets.{form}") for form in FORMS)
    form = next((form for form in forms if form.recognise(source)), None)
    if form is None:
        raise no_images(source.root, "does not exist")
    _check_one_form(source)
    try:
        index = retried(lambda: cache.index(form.__name__.rpartition(".")[2], source, form.scan), source.root)
    except OSError as error:
        path = printable(os.fsdecode(error.filename or source.root))
        raise kind_of(error)(f"{path} cannot be read ({error.strerror or error}); check disk and "
                             "permissions.", code="unreadable_data") from error
    if not len(index.arrays["labels"]):
        raise no_images(source.root, "holds no images in class folders, tar or parquet files")
    return getattr(form, "Images", Reader)(index.in_order(order))


def _check_one_form(source: Source) -> None:
    """Images left beside the others would be missing in silence."""
    kinds = [f"{ending} files" for ending in _CONTAINERS if source.ending(ending)]
    beside = source.folders if kinds and not source.split else ()
    kinds += [f"folder {printable(folder)}" for folder in beside if any(
        is_image(entry.name) for entry in visible(os.path.join(source.root, folder)))][:1]
    if len(kinds) > 1:
        raise UserError(f"{printable(source.root)} holds images in more than one form ({', '.join(kinds)}); "
                        "leave one.", code="mixed_forms")


def find_split(data_path: str, part: str) -> Source | None:
    """The train or val images of a data set: a folder of that name, or the containers in `data_path` whose
    names say so, as one downloads them; None when there are none."""
    for name in SPLITS[part]:
        if os.path.isdir(os.path.join(data_path, name)):
            return Source.of(os.path.join(data_path, name))
    found = (source_of(root, part) for root in (data_path, os.path.join(data_path, "data")))
    return next((source for source in found if source.split), None)


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


def no_images(root: str, problem: str) -> UserError:
    """The error for a folder without images, with a hint where an archive lies in it or beside it."""
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    names += [os.path.basename(root) + ending for ending in _ARCHIVES if os.path.isfile(root + ending)]
    found = [name for name in names if name.endswith(_ARCHIVES)][:1]
    hint = "".join(f"; unpack {printable(name)}, or move plain .tar files into that folder" for name in found)
    return UserError(f"{printable(root)} {problem}{hint}.", code="missing_data")
