"""Where images come from: an indexed folder, tar shards (see shards.py) or arrays; NumPy arrays, never Python lists.

A list of 1.28 million paths costs every worker 250 MB once reference counts have touched its pages, arrays nothing.
"""
import hashlib
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.files import atomic_write
from common.log import logger
from datasets.images import EXTENSIONS, decode_path, from_array, read_path, show

_CACHE_FORMAT = 1
_RACY_SECONDS = 2.0


@dataclass
class FolderIndex:
    """All images below `root`: `labels[i]` is a position in `classes` (sorted as text) and `names[i]` the path below
    that class folder. `folders` and `mtimes` (ns) are the folders seen, which tell whether the index still holds."""

    root: str
    classes: list[str]
    names: "Strings"
    labels: np.ndarray
    folders: "Strings"
    mtimes: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Path of image `index`; bytes that are not UTF-8 as surrogates, as Python's own file functions have them."""
        return os.path.join(self.root, self.classes[self.labels[index]], self.names[index])


class Strings:
    """A list of strings in two arrays: the bytes of all, uint8, and where each ends, int64."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, strings: list[str]) -> "Strings":
        """From a list; surrogates stand for bytes that are not UTF-8."""
        encoded = [os.fsencode(string) for string in strings]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8),
                   np.cumsum([len(string) for string in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.blob[start:int(self.ends[index])].tobytes())

    def check(self) -> None:
        """Raise ValueError when the two arrays do not belong together."""
        if self.blob.dtype != np.uint8 or self.ends.dtype != np.int64 or (np.diff(self.ends, prepend=0) < 0).any() \
                or (len(self.ends) and self.ends[-1] != len(self.blob)) or (not len(self.ends) and len(self.blob)):
            raise ValueError("not a list of strings")


def index_folder(root: str, *, reindex: bool = False, cache_folder: str | None = None,
                 write_cache: bool = True) -> FolderIndex:
    """The images below `root`, one folder per class, from the cache when no folder has changed since.

    root: has class folders (links are followed, loops are not; names starting with a dot are left out), or images
        directly, which then form the one class ''.
    cache_folder: default `$XDG_CACHE_HOME/hornet` or `~/.cache/hornet`; never inside `root`.
    Raises UserError when `root` is no folder, cannot be read, or holds no images.
    """
    root = os.path.abspath(root)
    cache = cache_path(root, cache_folder)
    if cache is not None and not reindex and (index := _load_cache(cache, root)) is not None:
        return index
    started = time.time()
    index = _scan(root)
    # A folder changed within the clock's step of the scan could change again without another time: don't cache it.
    settled = index.mtimes.max() < (started - _RACY_SECONDS) * 1e9
    if cache is not None and write_cache and settled:
        _save_cache(cache, index)
    return index


def class_folders(root: str) -> list[str]:
    """The names of the folders directly in `root`, sorted as text; those starting with a dot are left out."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))


def _scan(root: str) -> FolderIndex:
    if not os.path.isdir(root):
        raise UserError(f"There is no folder {show(root)}; --data_path must hold train/ and val/ with one folder per "
                        "class (with --data_set image_folder it is the train folder itself).")
    classes, names, labels, folders = [], [], [], [""]
    try:
        for name in class_folders(root) or [""]:
            found = []
            _walk(os.path.join(root, name), "", found, folders, name, set())
            classes.append(name)
            names += found
            labels += [len(classes) - 1] * len(found)
        mtimes = np.array([os.stat(os.path.join(root, folder)).st_mtime_ns for folder in folders], dtype=np.int64)
    except OSError as error:
        raise UserError(f"{show(os.fsdecode(error.filename or root))} cannot be read ({error.strerror}); check the "
                        "permissions of the data folder.") from error
    if not names:
        raise UserError(f"{show(root)} holds no images ({', '.join(EXTENSIONS)}) in class folders; check the path.")
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        logger.warning("%s: %d class folders hold no image, the first is %s", show(root), len(empty),
                       show(classes[empty[0]]))
    return FolderIndex(root, classes, Strings.of(names), np.array(labels, dtype=np.int32), Strings.of(folders), mtimes)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A loop of links is no folder.
        return False


def _walk(folder: str, below: str, names: list[str], folders: list[str], top: str, above: set) -> None:
    """Append what lies in `folder` in sorted order; `above` holds the folders on the way, so a link loop ends."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    if top or below:
        folders.append(os.path.join(top, below))
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        # A link that leads nowhere stays in the index: evaluation must not pass over it in silence.
        if _is_folder(entry):
            if top and not entry.name.startswith("."):
                _walk(entry.path, os.path.join(below, entry.name), names, folders, top, above | {here})
        elif entry.name.lower().endswith(EXTENSIONS):
            names.append(os.path.join(below, entry.name))


def cache_path(root: str, cache_folder: str | None, kind: str = "index") -> Path | None:
    """Where the index of `root` is kept; None when that would be inside `root`."""
    base = cache_folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hornet")
    base, real = os.path.realpath(base), os.path.realpath(root)
    if os.path.commonpath([base, real]) == real:
        return None
    return Path(base) / f"{kind}-{hashlib.blake2b(os.fsencode(real), digest_size=12).hexdigest()}.npz"


def _save_cache(path: Path, index: FolderIndex) -> None:
    classes = Strings.of(index.classes)
    arrays = dict(format=np.array(_CACHE_FORMAT), labels=index.labels, mtimes=index.mtimes,
                  root=np.frombuffer(os.fsencode(os.path.realpath(index.root)), dtype=np.uint8),
                  classes=classes.blob, class_ends=classes.ends, names=index.names.blob, name_ends=index.names.ends,
                  folders=index.folders.blob, folder_ends=index.folders.ends)
    save_arrays(path, arrays, index.root)


def save_arrays(path: Path, arrays: dict[str, np.ndarray], root: str) -> None:
    """Keep an index of `root` in `path`, whole or not at all; where that cannot be, the log says so."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(buffer.getbuffer()))
    except OSError as error:
        logger.info("the index of %s is not kept (%s: %s); the next start scans the folder again", show(root), path,
                    error.strerror)


def _load_cache(path: Path, root: str) -> FolderIndex | None:
    """The stored index, or None when there is none, it is damaged, or a folder has changed since."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            data = {name: stored[name] for name in stored.files}
        names, folders = Strings(data["names"], data["name_ends"]), Strings(data["folders"], data["folder_ends"])
        classes = Strings(data["classes"], data["class_ends"])
        labels, mtimes = data["labels"], data["mtimes"]
        for strings in (names, folders, classes):
            strings.check()
        if int(data["format"]) != _CACHE_FORMAT or data["root"].tobytes() != os.fsencode(os.path.realpath(root)) \
                or len(labels) != len(names) or len(mtimes) != len(folders) or not len(labels) \
                or labels.dtype != np.int32 or labels.min() < 0 or labels.max() >= len(classes):
            return None
        for i in range(len(folders)):
            if os.stat(os.path.join(root, folders[i])).st_mtime_ns != mtimes[i]:
                return None
    except Exception:  # Whatever a damaged file raises, scanning again is the answer.
        return None
    return FolderIndex(root, [classes[i] for i in range(len(classes))], names, labels, folders, mtimes)


class FolderReader:
    """Images of an index; `image(i)` raises BadImage."""

    def __init__(self, index: FolderIndex):
        self.index = index
        self.labels = index.labels
        self.classes = index.classes

    def __len__(self) -> int:
        return len(self.index)

    def path(self, index: int) -> str:
        """Path of image `index`."""
        return self.index.path(index)

    def image(self, index: int) -> Image.Image:
        """Image `index` as RGB."""
        return decode_path(self.index.path(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`'s file."""
        return read_path(self.index.path(index))


class ArrayReader:
    """Images held in memory, uint8 (N, height, width, 3), with `labels` (N,) as positions in `classes`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: list[str], source: str):
        self.pixels, self.labels, self.classes, self.source = pixels, labels.astype(np.int32), classes, source

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """File and position of image `index`."""
        return f"{self.source}[{index}]"

    def image(self, index: int) -> Image.Image:
        """Image `index` as RGB."""
        return from_array(self.pixels[index])
