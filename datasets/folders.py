"""The form of class folders: one folder per class, images anywhere below it."""
import os
from collections import Counter
from collections.abc import Iterator

from common.errors import UserError
from common.text import printable
from datasets.images import extensions, is_image, read_file
from datasets.readers import Index, IndexCache, Indexed, no_images


def recognise(root: str) -> bool:
    """Any folder."""
    return os.path.isdir(root)


def read(root: str, cache: IndexCache) -> "Folders":
    """The images below `root`: in class folders, or directly in it, where they form the one class ''.

    Links are followed, loops are not; names starting with a dot are left out. Raises UserError when the
    folder cannot be read or holds no images.
    """
    return Folders(cache.index("folders", root, _scan))


class Folders(Indexed):
    """Images that are files of their own; a Reader."""

    def name(self, index: int) -> str:
        """Path of image `index`; bytes that are not UTF-8 as surrogates, as Python's file functions have
        them."""
        return os.path.join(self.root, self.classes[self.labels[index]], self.index.names[index])

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`'s file; raises BadImage."""
        return read_file(self.name(index))


def class_folders(root: str) -> list[str]:
    """The names of the folders directly in `root`, sorted as text; those starting with a dot are left out."""
    return [entry.name for entry in visible(root) if is_folder(entry)]


def visible(folder: str) -> list[os.DirEntry]:
    """What lies in `folder`, sorted by name, without names that start with a dot."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; a loop of links is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def file_type(name: str) -> str:
    """The ending of a file's name, as the count of files that are left out calls it."""
    return os.path.splitext(name)[1].lower() or "without an ending"


def _scan(root: str) -> Index:
    names: list[str] = []
    labels: list[int] = []
    seen: list[str] = []
    left_out: Counter[str] = Counter()
    try:
        classes = class_folders(root)
        if classes:
            seen.append("")
            left_out.update(f"{file_type(entry.name)} beside the class folders" for entry in visible(root)
                            if not is_folder(entry))
        for number, name in enumerate(classes or [""]):
            found = list(_walk(os.path.join(root, name), name, frozenset(), seen, left_out))
            names += [path[len(name) + bool(name):] for path in found]
            labels += [number] * len(found)
        index = Index.of(root, classes=classes or [""], labels=labels, names=names, seen=seen,
                         left_out=left_out)
    except OSError as error:
        path = printable(os.fsdecode(error.filename or root))
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.",
                        code="unreadable_data") from error
    if not names:
        raise no_images(root, f"holds no images ({', '.join(extensions())}) in class folders; check the path")
    return index


def _walk(folder: str, below: str, above: frozenset, seen: list[str],
          left_out: Counter[str]) -> Iterator[str]:
    """The images in `folder` and its folders, as paths below the root; `above` ends a loop of links."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    seen.append(below)
    for entry in visible(folder):
        path = os.path.join(below, entry.name)
        if is_folder(entry):
            yield from _walk(entry.path, path, above | {here}, seen, left_out)
        elif is_image(entry.name):  # a link that leads nowhere too: it must not be skipped in silence
            yield path
        else:
            left_out[file_type(entry.name)] += 1
