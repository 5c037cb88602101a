"""The form of class folders: one folder per class, images anywhere below it."""
import os
from collections import Counter

from common.errors import UserError
from common.log import logger
from common.text import printable
from datasets.images import is_image, read_file
from datasets.readers import Index, IndexCache, no_images


def recognise(root: str) -> bool:
    """Any folder."""
    return os.path.isdir(root)


def read(root: str, cache: IndexCache) -> "Folders":
    """The images below `root`: in class folders, or directly in it, where they form the one class ''.

    Links are followed, loops are not; names starting with a dot are left out. Raises UserError when the folder cannot
    be read or holds no images.
    """
    return Folders(cache.index("folders", root, _scan))


class Folders:
    """Images that are files of their own; a Reader."""

    def __init__(self, index: Index):
        self.index, self.root, self.left_out = index, index.root, index.left_out
        self.labels, self.classes = index.labels, index.classes

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Path of image `index`; bytes that are not UTF-8 as surrogates, as Python's own file functions have them."""
        return os.path.join(self.root, self.classes[self.labels[index]], self.index.names[index])

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`'s file; raises BadImage."""
        return read_file(self.name(index))


def class_folders(root: str) -> list[str]:
    """The names of the folders directly in `root`, sorted as text; those starting with a dot are left out."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and is_folder(entry))


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; a loop of links is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _scan(root: str) -> Index:
    walk = _Walk(root)
    try:
        classes = class_folders(root)
        if classes:
            walk.count_loose_files()
        for name in classes or [""]:
            walk.enter_class(name)
        index = Index.of(root, classes=classes or [""], labels=walk.labels, names=walk.names, seen=walk.folders,
                         left_out=dict(walk.left_out))
    except OSError as error:
        raise UserError(f"{printable(os.fsdecode(error.filename or root))} cannot be read ({error.strerror}); check the "
                        "permissions of the data folder.", code="unreadable_data") from error
    if not walk.names:
        raise no_images(root, "class folders")
    empty = sorted(set(range(len(classes))) - set(walk.labels))
    if empty:
        logger.warning("%s: %d class folders hold no image, the first is %s", printable(root), len(empty),
                       printable(classes[empty[0]]))
    return index


class _Walk:
    """A walk through class folders, in sorted order: what it has found so far."""

    def __init__(self, root: str):
        self.root, self.number = root, -1
        self.names: list[str] = []
        self.labels: list[int] = []
        self.folders = [""]
        self.left_out: Counter[str] = Counter()

    def count_loose_files(self) -> None:
        """Files beside the class folders belong to no class."""
        with os.scandir(self.root) as entries:
            self.left_out.update(f"{_type(entry.name)} beside the class folders" for entry in entries
                                 if not entry.name.startswith(".") and not is_folder(entry))

    def enter_class(self, name: str) -> None:
        self.number += 1
        self._enter(os.path.join(self.root, name), name, "", frozenset())

    def _enter(self, folder: str, top: str, below: str, above: frozenset[tuple[int, int]]) -> None:
        """Take what lies in `folder`; `above` holds the folders on the way, so that a loop of links ends."""
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        if top:
            self.folders.append(os.path.join(top, below))
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A link that leads nowhere stays in the index: evaluation must not pass over it in silence.
            if is_folder(entry):
                if top:
                    self._enter(entry.path, top, os.path.join(below, entry.name), above | {here})
            elif is_image(entry.name):
                self.names.append(os.path.join(below, entry.name))
                self.labels.append(self.number)
            else:
                self.left_out[_type(entry.name)] += 1


def _type(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"
