"""The index of a split: flat arrays in one file, mapped by every process, in an order that no form changes.

A Python list of 1.28 million paths costs every worker 250 MB once reference counts have touched its pages; a
mapped file costs nothing that is not shared.
"""
import hashlib
import json
import os
import stat
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_write
from common.log import logger
from common.text import printable

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
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


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
        kinds = [(entry.name, is_folder(entry)) for entry in (visible(root) if os.path.isdir(root) else [])]
        return cls(root, tuple(name for name, folder in kinds if not folder),
                   tuple(name for name, folder in kinds if folder))

    def ending(self, ending: str) -> list[str]:
        """The files with this ending."""
        return [name for name in self.files if name.endswith(ending)]


class Rows:
    """What a scan finds, a row per image: flat arrays, so that 14 million images take a gigabyte.

    classes: class → its number in order of appearance; one without images may be among them.
    """

    def __init__(self) -> None:
        self.classes: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()
        self.labels, self.ends, self.blob = array("i"), array("q"), bytearray()
        self.places = array("i"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, folder: str, name: str, *place: int) -> None:
        """Image `name` of class `folder`; place: container, offset and length for one that is no file."""
        self.labels.append(self.classes.setdefault(folder, len(self.classes)))
        self.blob += os.fsencode(name)
        self.ends.append(len(self.blob))
        for column, value in zip(self.places, place):
            column.append(value)

    def index(self, source: Source, form: str, seen: Sequence[str], members: bool = False) -> "Index":
        """The index of all rows in canonical order. seen: containers in their order, then whatever else the
        index depends on. Raises UserError for an image that is there twice."""
        classes = sorted(self.classes)
        rank = np.argsort([self.classes[name] for name in classes])  # class by appearance → its place as text
        columns = (rank[np.array(self.labels, np.int32)], self.blob, self.ends, *self.places,
                   stamps(source.root, seen).ravel())
        found = Index(root=source.root, form=form, classes=classes, members=members, order="",
                      left_out=dict(+self.left_out), seen=list(seen),
                      arrays={name: np.array(column, kind)
                              for (name, kind), column in zip(_ARRAYS.items(), columns)})
        return found.arranged(found.canonical, unique=True)


@dataclass(frozen=True)
class Index:
    """What a form found below `root`.

    order: see Reader · seen: paths below `root` on which it depends, containers first · members: names are
    whole paths in a container, of which only the last part counts. arrays: labels int32 (N,), positions in
    `classes` · blob and ends: the names below the class, one after the other · containers int32 (positions in
    `seen`), offsets and lengths int64 (N,); (0,) for images that are files · stamps: int64 (2 K,), times in
    ns and sizes of `seen`, which tell whether the index still holds.
    """

    root: str
    form: str
    classes: list[str]
    order: str
    left_out: dict[str, int]
    seen: list[str]
    members: bool
    arrays: dict[str, np.ndarray]

    def name(self, i: int) -> str:
        """The name of image `i`; surrogates stand for bytes that are not UTF-8."""
        ends = self.arrays["ends"]
        return os.fsdecode(self.arrays["blob"][ends[i - 1] if i else 0:ends[i]].tobytes())

    def canonical(self, name: str) -> tuple[str, str]:
        """(name without extension, extension) within a class."""
        return os.path.splitext(name.rpartition("/")[2] if self.members else name)

    def in_order(self, wanted: str | None) -> "Index":
        """Itself, or arranged as earlier versions did, by whole names, where that gives the digest `wanted`
        or where `wanted` is "", as in their checkpoints."""
        if wanted is None or wanted == self.order:
            return self
        before = self.arranged(lambda name: (name,) if self.members else (*name.split("/"),))
        return before if wanted in ("", before.order) else self

    def arranged(self, key: Callable[[str], tuple[str, ...]], unique: bool = False) -> "Index":
        """Sorted by class and `key(name)`; classes are sorted one by one, so that few names are in memory."""
        labels = self.arrays["labels"]
        order, place = np.argsort(labels, kind="stable"), 0
        digest, blob, ends = hashlib.blake2b(digest_size=16), bytearray(), array("q")
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        for folder, count in zip(self.classes, counts, strict=True):
            found = [(self.name(i), i) for i in order[place:place + count].tolist()]
            mine = sorted(found, key=lambda entry: key(entry[0]))  # stable: by place where keys are equal
            plain = [self.canonical(name) for name, _ in mine]
            twice = next((a for a, b in zip(plain, plain[1:]) if a == b), None) if unique else None
            if twice:
                name = printable(f"{folder}/{''.join(twice)}")
                raise UserError(f"{printable(self.root)} holds {name} twice; remove one.", "duplicate_names")
            digest.update("\0".join([folder, *(stem for stem, _ in plain), "\n"]).encode(
                "utf-8", "surrogateescape"))
            order[place:place + count] = [i for _, i in mine]
            place += count
            for name, _ in mine:
                blob += os.fsencode(name)
                ends.append(len(blob))
        columns = {name: self.arrays[name] for name in ("labels", "containers", "offsets", "lengths")}
        return replace(self, order=digest.hexdigest(), arrays=self.arrays | {
            name: values[order] if len(values) else values for name, values in columns.items()}
            | {"blob": np.array(blob, np.uint8), "ends": np.array(ends, np.int64)})

    def write(self, path: str | os.PathLike) -> None:
        """Store it, whole or not at all. Three numbers (magic, checksum of what follows, length of the
        header), a header in JSON, the arrays; each part at a multiple of 8 bytes."""
        sizes = [len(self.arrays[name]) for name in _ARRAYS]
        header = json.dumps({name: getattr(self, name) for name in _PLAIN} | {
            "root": os.path.realpath(self.root), "sizes": sizes}).encode()
        parts: list[bytes | memoryview] = [header + b" " * (-len(header) % 8)]
        for name, kind in _ARRAYS.items():
            values = np.ascontiguousarray(self.arrays[name], kind)
            parts += [values.data.cast("B"), bytes(-values.nbytes % 8)]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        parts.insert(0, np.array([_MAGIC, checksum, len(parts[0])], np.int64).tobytes())
        atomic_write(path, lambda file: file.writelines(parts))

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Index":
        """Map a stored index; any exception when it is damaged, hostile or of another version."""
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        magic, checksum, length = data[:24].view(np.int64).tolist()
        if magic != _MAGIC or zlib.crc32(data[24:].data) != checksum:
            raise ValueError("damaged")
        header, at, arrays = json.loads(data[24:24 + length].tobytes()), 24 + length, {}
        for (name, kind), count in zip(_ARRAYS.items(), header["sizes"], strict=True):
            size = count * np.dtype(kind).itemsize
            arrays[name] = data[at:at + size].view(kind)
            at += size + -size % 8
        found = cls(root=header["root"], arrays=arrays, **{name: header[name] for name in _PLAIN})
        found._check()
        return found

    def _check(self) -> None:
        labels, blob, ends, containers, offsets, lengths, stamps = (self.arrays[name] for name in _ARRAYS)
        sizes = stamps.reshape(-1, 2)[:, 1]
        if not (len(labels) == len(ends) and labels.min() >= 0 and labels.max() < len(self.classes)
                and (np.diff(ends, prepend=0) >= 0).all() and ends[-1] <= len(blob)
                and len(sizes) == len(self.seen)
                and len(containers) == len(offsets) == len(lengths) and len(containers) in (0, len(labels))
                and not any((column < 0).any() for column in (containers, offsets, lengths))
                # Places lie within their containers.
                and (not len(containers) or (offsets <= sizes[containers] - lengths).all())):
            raise ValueError("its parts don't fit")


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
        packed = Path(source.root, f"_{source.split}.index")  # of tools.data
        stored = None if self.reindex else (path and _load(path, source)) or _load(packed, source, True)
        if stored is not None:
            return stored
        started = time.time()
        index = scan(source)
        # What changed within the clock's step of the scan could change again unseen: don't keep it.
        if path is None or not self.write or not len(index.arrays["labels"]) \
                or index.arrays["stamps"][::2].max() >= (started - _RACY_SECONDS) * 1e9:
            return index
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            index.write(path)
        except OSError as error:
            logger.info("the index of %s is not kept (%s: %s); the next start scans the folder again",
                        printable(index.root), path, error.strerror)
        return _load(path, source) or index  # mapped: processes of a node share it

    def path(self, form: str, source: Source) -> Path | None:
        """The file of an index; None when that would be inside the data."""
        user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base = os.path.realpath(self.folder or os.path.join(user, "hornet"))
        real = os.path.realpath(source.root)
        digest = hashlib.blake2b(os.fsencode(f"{real}\0{source.split}"), digest_size=12).hexdigest()
        return None if os.path.commonpath([base, real]) == real else Path(base) / f"{form}-{digest}.index"


def _load(path: Path, source: Source, packed: bool = False) -> Index | None:
    """The stored index, or None when there is none, it is damaged, or anything of `seen` has changed. One
    that was packed with its tars may have been copied: these need the same sizes and no later times."""
    with suppress(Exception):  # Whatever a damaged file raises, scanning again is the answer.
        index = Index.read(path)
        now, before, tars = stamps(source.root, index.seen), index.arrays["stamps"], source.ending(".tar")
        if packed:
            own, was = now[:len(tars)], before.reshape(-1, 2)[:len(tars)]
            same = index.seen == [*tars, "", "_info.json"] and np.array_equal(own[:, 1], was[:, 1]) \
                and (own[:, 0] <= path.stat().st_mtime_ns).all()
        else:
            same = index.root == os.path.realpath(source.root) and np.array_equal(before, now.ravel())
        if same:
            return replace(index, root=source.root, arrays=index.arrays | {"stamps": now.ravel()})
    return None
