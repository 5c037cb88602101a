"""The index of a split: flat arrays in one file, mapped by every process, in an order that no form changes.

A Python list of 1.28 million paths costs every worker 250 MB once reference counts have touched its pages; a
mapped file costs nothing that is not shared.
"""
import hashlib
import io
import json
import os
import stat
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_write
from common.log import logger
from common.text import printable
from datasets.images import LARGEST_FILE, BadImage, read_file, retried

_MAGIC = int.from_bytes(b"hornet-3", "little")
_RACY_SECONDS = 2.0
_ARRAYS = {"labels": np.int32, "blob": np.uint8, "ends": np.int64, "containers": np.int32,
           "offsets": np.int64, "lengths": np.int64, "stamps": np.int64}
_PLAIN = ("form", "classes", "order", "left_out", "seen", "members")


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


@dataclass(frozen=True)
class Source:
    """Where the images of one split may lie: visible `files` and `folders` directly in `root`, sorted as
    text. `split`: the name of the split whose containers `files` are; "" when all of `root` is one split."""

    root: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    split: str = ""

    @classmethod
    def of(cls, root: str) -> "Source":
        """All of a folder; nothing of one that is missing."""
        root = os.path.abspath(root)
        entries = visible(root) if os.path.isdir(root) else []
        folders = tuple(entry.name for entry in entries if is_folder(entry))
        return cls(root, tuple(entry.name for entry in entries if entry.name not in {*folders}), folders)

    def ending(self, ending: str) -> list[str]:
        """The files with this ending."""
        return [name for name in self.files if name.endswith(ending)]


class Strings:
    """A list of strings in two arrays, the bytes of all (uint8) and where each ends (int64)."""

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


class Rows:
    """What a scan finds, a row per image: flat arrays, so that 14 million images take a gigabyte.

    classes: class → its number in order of appearance; one without images may be among them.
    """

    def __init__(self) -> None:
        self.classes: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()
        self.labels, self.ends, self.blob = array("i"), array("q"), bytearray()
        self.containers, self.offsets, self.lengths = array("i"), array("q"), array("q")

    def add_class(self, name: str) -> int:
        """The number of class `name`."""
        return self.classes.setdefault(name, len(self.classes))

    def add(self, folder: str, name: str, *place: int) -> None:
        """Image `name` of class `folder`; place: container, offset and length for one that is no file."""
        self.labels.append(self.add_class(folder))
        self.blob += os.fsencode(name)
        self.ends.append(len(self.blob))
        for column, value in zip((self.containers, self.offsets, self.lengths), place):
            column.append(value)

    def index(self, source: Source, form: str, seen: Sequence[str], members: bool = False) -> "Index":
        """The index of all rows in canonical order. seen: containers in their order, then whatever else the
        index depends on. Raises UserError for an image that is there twice."""
        classes = sorted(self.classes)
        rank = np.zeros(len(classes), dtype=np.int32)
        rank[[self.classes[name] for name in classes]] = np.arange(len(classes))
        labels = rank[np.frombuffer(self.labels, dtype=np.int32)] if self.labels else rank[:0]
        columns = {name: np.frombuffer(getattr(self, name), dtype=kind) if getattr(self, name)
                   else np.empty(0, kind) for name, kind in _ARRAYS.items() if hasattr(self, name)}
        found = Index(root=source.root, form=form, classes=classes, members=members, order="",
                      left_out=dict(+self.left_out), seen=list(seen), stamps=stamps(source.root, seen),
                      labels=labels, names=Strings(columns["blob"], columns["ends"]),
                      containers=columns["containers"], offsets=columns["offsets"],
                      lengths=columns["lengths"])
        return found.arranged(found.canonical, unique=True)


@dataclass(frozen=True)
class Index:
    """What a form found below `root`.

    labels: int32 (N,), positions in `classes` · names: of each image, below its class, or with `members` its
    whole path in a container, whose last part counts · containers int32, offsets and lengths int64 (N,):
    positions in `seen` and bytes; (0,) for images that are files · stamps: int64 (K, 2), times in ns and
    sizes of `seen` (paths below `root`), which tell whether the index still holds · order: see Reader.
    """

    root: str
    form: str
    classes: list[str]
    order: str
    left_out: dict[str, int]
    seen: list[str]
    members: bool
    labels: np.ndarray
    names: Strings
    containers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    stamps: np.ndarray

    def canonical(self, name: str) -> tuple[str, str]:
        """(name without extension, extension) within a class."""
        return os.path.splitext(name.rpartition("/")[2] if self.members else name)

    def in_order(self, wanted: str | None) -> "Index":
        """Itself, or arranged as earlier versions did, by whole names, where that gives the digest `wanted`
        or where `wanted` is "", as in their checkpoints."""
        if wanted is None or wanted == self.order:
            return self
        before = self.arranged((lambda name: name) if self.members else (lambda name: name.split("/")))
        return before if wanted in ("", before.order) else self

    def arranged(self, key: Callable[[str], object], unique: bool = False) -> "Index":
        """Sorted by class and `key(name)`; classes are sorted one by one, so that few names are in memory."""
        by_class = np.argsort(self.labels, kind="stable")
        edges = np.searchsorted(self.labels[by_class], np.arange(len(self.classes) + 1)).tolist()
        digest, order = hashlib.blake2b(digest_size=16), np.empty(len(by_class), dtype=np.int64)
        blob, ends = bytearray(), array("q")
        for number, folder in enumerate(self.classes):
            mine = by_class[edges[number]:edges[number + 1]].tolist()
            found = {i: self.names[i] for i in mine}
            mine.sort(key=lambda i: key(found[i]))  # stable: by place where the keys are equal
            plain = [self.canonical(found[i]) for i in mine]
            twice = next((a for a, b in zip(plain, plain[1:]) if a == b), None) if unique else None
            if twice:
                raise UserError(f"{printable(self.root)} holds {printable(''.join(twice))} of class "
                                f"{printable(folder)} twice; remove one.", code="duplicate_names")
            digest.update("\0".join([folder, *(stem for stem, _ in plain), "\n"]).encode(
                "utf-8", "surrogateescape"))
            order[edges[number]:edges[number + 1]] = mine
            for i in mine:
                blob += os.fsencode(found[i])
                ends.append(len(blob))
        columns = {name: getattr(self, name) for name in ("labels", "containers", "offsets", "lengths")}
        return replace(self, order=digest.hexdigest(), **{
            name: values[order] if len(values) else values for name, values in columns.items()},
            names=Strings(np.frombuffer(blob, np.uint8), np.array(ends, np.int64)))

    def write(self, path: str | os.PathLike) -> None:
        """Store it, whole or not at all. Three numbers (magic, checksum of what follows, length of the
        header), a header in JSON, the arrays; each part at a multiple of 8 bytes."""
        arrays = {"labels": self.labels, "blob": self.names.blob, "ends": self.names.ends,
                  "containers": self.containers, "offsets": self.offsets, "lengths": self.lengths,
                  "stamps": self.stamps.ravel()}
        sizes = {name: len(values) for name, values in arrays.items()}
        plain = {name: getattr(self, name) for name in _PLAIN}
        header = json.dumps({**plain, "root": os.path.realpath(self.root), "sizes": sizes}).encode()
        parts: list[bytes | memoryview] = [header + b" " * (-len(header) % 8)]
        for name, values in arrays.items():
            parts += [values.astype(_ARRAYS[name], order="C", copy=False).data.cast("B"),
                      bytes(-values.nbytes % 8)]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        parts.insert(0, np.array([_MAGIC, checksum, len(parts[0])], np.int64).tobytes())
        atomic_write(path, lambda file: file.writelines(parts))

    @classmethod
    def read(cls, path: str | os.PathLike, root: str) -> "Index":
        """Map a stored index; any exception when it is damaged, hostile or of another version."""
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        magic, checksum, length = data[:24].view(np.int64).tolist()
        if magic != _MAGIC or zlib.crc32(data[24:].data) != checksum:
            raise ValueError("damaged")
        header, at, arrays = json.loads(data[24:24 + length].tobytes()), 24 + length, {}
        for name, kind in _ARRAYS.items():
            size = header["sizes"][name] * np.dtype(kind).itemsize
            arrays[name] = data[at:at + size].view(kind)
            at += size + -size % 8
        found = cls(root=root, names=Strings(arrays.pop("blob"), arrays.pop("ends")),
                    stamps=arrays.pop("stamps").reshape(-1, 2), **arrays,
                    **{name: header[name] for name in _PLAIN})
        found._check()
        return replace(found, root=header["root"])

    def _check(self) -> None:
        count, columns = len(self.labels), (self.containers, self.offsets, self.lengths)
        if not (count == len(self.names) and self.labels.min() >= 0 and self.labels.max() < len(self.classes)
                and (np.diff(self.names.ends, prepend=0) >= 0).all()
                and self.names.ends[-1] <= len(self.names.blob) and len(self.stamps) == len(self.seen)
                and {len(column) for column in columns} <= {len(self.containers)} <= {0, count}
                and not any(len(column) and column.min() < 0 for column in columns)):
            raise ValueError("its parts don't fit")
        # Places lie within their containers, whose sizes are in the stamps.
        if len(self.containers) and (self.offsets > self.stamps[self.containers, 1] - self.lengths).any():
            raise ValueError("places outside of containers")


def stamps(root: str, seen: Iterable[str]) -> np.ndarray:
    """Time in ns and size (0 for folders) of each path below `root`, int64 (K, 2); raises OSError."""
    found = [os.stat(os.path.join(root, name)) for name in seen]
    return np.array([(status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size)
                     for status in found], dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class IndexCache:
    """Where indices are kept between starts: in `folder` (None: `$XDG_CACHE_HOME/hornet` or
    `~/.cache/hornet`), never inside the data. `reindex` scans all the same; without `write` nothing is
    stored."""

    folder: str | None = None
    reindex: bool = False
    write: bool = True

    def index(self, form: str, source: Source, scan: Callable[[Source], Index]) -> Index:
        """The stored index of `source`, or `scan(source)` when there is none or anything has changed."""
        path = self.path(form, source)
        packed = os.path.join(source.root, f"_{source.split}.index")  # of tools.data
        stored = None if self.reindex else (path and _load(path, source)) or _load(packed, source, True)
        if stored is not None:
            return stored
        started = time.time()
        index = scan(source)
        # What changed within the clock's step of the scan could change again unseen: don't keep it.
        if path is None or not self.write or not len(index.labels) \
                or index.stamps[:, 0].max() >= (started - _RACY_SECONDS) * 1e9:
            return index
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            index.write(path)
        except OSError as error:
            logger.info("the index of %s is not kept (%s: %s); the next start scans the folder again",
                        printable(index.root), path, error.strerror)
            return index
        return _load(path, source) or index  # mapped: processes of a node share it

    def path(self, form: str, source: Source) -> Path | None:
        """The file of an index; None when that would be inside the data."""
        user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base = os.path.realpath(self.folder or os.path.join(user, "hornet"))
        real = os.path.realpath(source.root)
        digest = hashlib.blake2b(os.fsencode(f"{real}\0{source.split}"), digest_size=12).hexdigest()
        return None if os.path.commonpath([base, real]) == real else Path(base) / f"{form}-{digest}.index"


def _load(path: str | os.PathLike, source: Source, packed: bool = False) -> Index | None:
    """The stored index, or None when there is none, it is damaged, or anything of `seen` has changed. One
    that was packed with its tars may have been copied: these need the same sizes and no later times."""
    try:
        index = Index.read(path, source.root)
        now, tars = stamps(source.root, index.seen), source.ending(".tar")
        if packed:
            times, sizes = now[:len(tars)].T
            same = index.seen == [*tars, "", "_info.json"] and (times <= os.stat(path).st_mtime_ns).all() \
                and np.array_equal(sizes, index.stamps[:len(tars), 1])
        else:
            same = index.root == os.path.realpath(source.root) and np.array_equal(index.stamps, now)
        if same:
            return replace(index, root=source.root, stamps=now)
    except Exception:  # Whatever a damaged file raises, scanning again is the answer.
        pass
    return None


class Indexed:
    """Images that are files, or lie uncompressed in containers; a Reader."""

    def __init__(self, index: Index):
        self.index, self.root, self.form, self.left_out = index, index.root, index.form, index.left_out
        self.labels, self.classes, self.order = index.labels, index.classes, index.order
        self.storage: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file, or the container, a slash, and the name inside; bytes that are not UTF-8 as surrogates,
        as Python's file functions have them."""
        inside = len(self.index.containers)
        above = self.container(index) if inside else os.path.join(self.root, self.classes[self.labels[index]])
        return os.path.join(above, self.index.names[index])

    def stem(self, index: int) -> str:
        """The name below the class, without extension."""
        return self.index.canonical(self.index.names[index])[0]

    def container(self, index: int) -> str:
        """The path of the file that image `index` lies in."""
        return os.path.join(self.root, self.index.seen[self.index.containers[index]])

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`; BadImage when its container has changed since the start."""
        if not len(self.index.containers):
            path = self.name(index)
            return read_file(path, there=os.path.dirname(path))
        start, size = int(self.index.offsets[index]), int(self.index.lengths[index])
        number, path = self.index.containers[index], self.container(index)
        if size > LARGEST_FILE:
            raise BadImage("larger than any image")
        # pread needs no position, so that forked workers can share the file.
        data = retried(lambda: os.pread(_opened(path, *self.index.stamps[number].tolist()).fileno(), size,
                                        start), path)
        if len(data) != size:
            raise BadImage("its container ends before the image does")
        return data


@lru_cache(maxsize=64)
def _opened(path: str, changed: int, size: int) -> io.FileIO:
    """The file, which closes itself when it is the one of 64 that was not used for longest."""
    file = io.FileIO(path)
    status = os.fstat(file.fileno())
    if (status.st_mtime_ns, status.st_size) != (changed, size):
        raise BadImage("its container has changed since the start")
    return file
