"""Where images come from: what every form gives, the forms, and the flat index that is kept between starts.

To add a form, write a module with `recognise(root) -> bool` and `read(root, cache) -> Reader`; name it in
FORMS.
"""
import hashlib
import importlib
import io
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError
from common.files import atomic_write
from common.log import logger
from common.text import printable

FORMS = ("tars", "folders")  # modules of this package; the first that recognises a folder reads it

_CACHE_FORMAT = 2
_RACY_SECONDS = 2.0
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


class Reader(Protocol):
    """Images of one split, in the order of class and name.

    root: the folder, for messages · labels: int32 (N,), positions in `classes` (sorted as text) · left_out:
    how many files of which type (`.txt`) are no images.
    """

    root: str
    labels: np.ndarray
    classes: list[str]
    left_out: dict[str, int]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where image `index` lies: the path of its file, or the container's path and the name in it."""
        ...

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index` as stored; raises BadImage. Called in workers."""
        ...


def open_reader(root: str, cache: "IndexCache") -> Reader:
    """The images below `root` through the first form that recognises them; UserError when there are none."""
    root = os.path.abspath(root)
    for form in FORMS:
        module = importlib.import_module(f"datasets.{form}")
        if module.recognise(root):
            return module.read(root, cache)
    raise no_images(root, "does not exist; --data_path must hold train/ and val/ with one folder per class "
                          "(it is the train folder itself with --data_set image_folder)")


def no_images(root: str, problem: str) -> UserError:
    """The error for a folder without images, with a hint where an archive lies in it or beside it."""
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    names += [os.path.basename(root) + ending for ending in _ARCHIVES if os.path.isfile(root + ending)]
    found = [name for name in names if name.endswith(_ARCHIVES)][:1]
    hint = "".join(f"; unpack {printable(name)}, or move plain .tar files into that folder" for name in found)
    return UserError(f"{printable(root)} {problem}{hint}.", code="missing_data")


class Strings:
    """A list of strings in two arrays, the bytes of all (uint8) and where each ends (int64).

    A Python list of 1.28 million paths costs every worker 250 MB once reference counts have touched its
    pages.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """From a list; surrogates stand for bytes that are not UTF-8."""
        encoded = [os.fsencode(string) for string in strings]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8),
                   np.cumsum([len(string) for string in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.blob[start:int(self.ends[index])].tobytes())


@dataclass(frozen=True)
class Index:
    """What a form found below `root`, as flat arrays that forked workers share.

    labels: int32 (N,), positions in `classes` · names: path of each image below its class folder, or in its
    container · places: int64 (N, 3), the container as a position in `seen`, offset and size of the bytes; (0,
    3) for images that are files · seen: the folders and containers below `root` · stamps: int64 (K, 2), their
    times in ns and sizes, which tell whether the index still holds.
    """

    root: str
    classes: list[str]
    labels: np.ndarray
    names: Strings
    places: np.ndarray
    seen: Strings
    stamps: np.ndarray
    left_out: dict[str, int]

    @classmethod
    def of(cls, root: str, *, classes: list[str], labels: Sequence[int], names: list[str], seen: list[str],
           left_out: dict[str, int], places: Sequence[tuple[int, int, int]] = ()) -> "Index":
        """From lists; raises OSError when something of `seen` has gone meanwhile."""
        return cls(root=root, classes=classes, labels=np.array(labels, dtype=np.int32),
                   names=Strings.of(names), places=np.array(places, dtype=np.int64).reshape(-1, 3),
                   seen=Strings.of(seen), stamps=_stamps(root, seen), left_out=dict(left_out))


class Indexed:
    """What readers of an index have in common."""

    def __init__(self, index: Index):
        self.index, self.root, self.left_out = index, index.root, index.left_out
        self.labels, self.classes = index.labels, index.classes

    def __len__(self) -> int:
        return len(self.labels)


def _stamps(root: str, seen: Iterable[str]) -> np.ndarray:
    found = [os.stat(os.path.join(root, name)) for name in seen]
    return np.array([(status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size)
                     for status in found], dtype=np.int64)


@dataclass(frozen=True)
class IndexCache:
    """Where indices are kept between starts: in `folder` (None: `$XDG_CACHE_HOME/hornet` or
    `~/.cache/hornet`), never inside the data. `reindex` scans all the same; without `write` nothing is
    stored."""

    folder: str | None = None
    reindex: bool = False
    write: bool = True

    def index(self, form: str, root: str, scan: Callable[[str], Index]) -> Index:
        """The stored index of `root`, or `scan(root)` when there is none or anything has changed since."""
        path = self.path(form, root)
        if path is not None and not self.reindex and (stored := _load(path, root)) is not None:
            return stored
        started = time.time()
        index = scan(root)
        # What changed within the clock's step of the scan could change again unseen: don't keep it.
        if path is not None and self.write and index.stamps[:, 0].max() < (started - _RACY_SECONDS) * 1e9:
            save_index(path, index)
        return index

    def path(self, form: str, root: str) -> Path | None:
        """The file of an index; None when that would be inside `root`."""
        user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base, real = os.path.realpath(self.folder or os.path.join(user, "hornet")), os.path.realpath(root)
        digest = hashlib.blake2b(os.fsencode(real), digest_size=12).hexdigest()
        return None if os.path.commonpath([base, real]) == real else Path(base) / f"{form}-{digest}.npz"


def save_index(path: Path, index: Index) -> None:
    """Store an index, whole or not at all; where that is impossible, the log says so."""
    strings = {"root": Strings.of([os.path.realpath(index.root)]), "classes": Strings.of(index.classes),
               "names": index.names, "seen": index.seen, "types": Strings.of(index.left_out)}
    arrays = {"format": np.array(_CACHE_FORMAT), "labels": index.labels, "places": index.places,
              "stamps": index.stamps, "counts": np.array(list(index.left_out.values()), dtype=np.int64)}
    for name, value in strings.items():
        arrays |= {name: value.blob, f"{name}_ends": value.ends}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(buffer.getbuffer()))
    except OSError as error:
        logger.info("the index of %s is not kept (%s: %s); the next start scans the folder again",
                    printable(index.root), path, error.strerror)


def _load(path: Path, root: str) -> Index | None:
    """The stored index, or None when there is none, it is damaged (zip's checksums tell), or anything of
    `seen` has changed since."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            data = {name: stored[name] for name in stored.files}
        real, classes, names, seen, types = (Strings(data[name], data[f"{name}_ends"])
                                             for name in ("root", "classes", "names", "seen", "types"))
        if int(data["format"]) != _CACHE_FORMAT or real[0] != os.path.realpath(root) \
                or not np.array_equal(data["stamps"], _stamps(root, seen)):
            return None
        labels, places = data["labels"].astype(np.int32), data["places"].astype(np.int64).reshape(-1, 3)
        # Places lie within their containers, whose sizes are in the stamps.
        if len(labels) != len(names) or len(places) not in (0, len(labels)) \
                or labels.min() < 0 or labels.max() >= len(classes) \
                or (np.diff(names.ends, prepend=0) < 0).any() or (places < 0).any() \
                or (places[:, 1:].astype(float).sum(1) > data["stamps"][places[:, 0], 1]).any():
            return None
        return Index(root=root, classes=list(classes), labels=labels, names=names, places=places, seen=seen,
                     stamps=data["stamps"], left_out=dict(zip(types, data["counts"].tolist(), strict=True)))
    except Exception:  # Whatever a damaged file raises, scanning again is the answer.
        return None
