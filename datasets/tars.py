"""The form of tar files, read where they lie: an index of offsets, nothing is ever extracted.

`train/` and `val/` hold `*.tar`. An image's class is the folder before its name inside the tar, or the tar's own name
where there is no folder (one tar per class). Order and labels are those of the unpacked folder.
"""
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.text import file_size, printable
from datasets.folders import is_folder
from datasets.images import LARGEST_FILE, BadImage, is_image
from datasets.readers import Index, IndexCache, no_images

_OPEN_FILES = 64
_BLOCK = 512
_LARGEST_HEADER = 1 << 20  # of a long name or of PAX records
_HEADERS_IN_A_ROW = 8
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *_PAX_TYPES)
_WITHOUT_DATA = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


def tars_in(root: str) -> list[str]:
    """The names of the tar files directly in `root`, sorted; [] when there are none."""
    if not os.path.isdir(root):
        return []
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries
                      if entry.name.endswith(".tar") and not entry.name.startswith(".") and not is_folder(entry))


def recognise(root: str) -> bool:
    """A folder with tar files directly in it."""
    return bool(tars_in(root))


def read(root: str, cache: IndexCache) -> "Tars":
    """The images in the tar files of `root`; raises UserError for a damaged tar and when there is no image."""
    return Tars(cache.index("tars", root, _scan))


class Tars:
    """Images inside tar files; a Reader."""

    def __init__(self, index: Index):
        self.index, self.root, self.left_out = index, index.root, index.left_out
        self.labels, self.classes = index.labels, index.classes
        self._files: dict[int, int] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The tar's path, a slash, and the path inside it."""
        return os.path.join(self.root, self.index.seen[self.index.places[index, 0]], self.index.names[index])

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`; BadImage when the tar has become shorter."""
        tar, start, size = self.index.places[index].tolist()
        if size > LARGEST_FILE:
            raise BadImage(f"larger than {file_size(LARGEST_FILE)}")
        data = os.pread(self._file(tar), size, start)  # needs no position, so that forked workers can share the file
        if len(data) != size:
            raise BadImage("the tar ends before the image does")
        return data

    def _file(self, tar: int) -> int:
        if tar not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[tar] = os.open(os.path.join(self.root, self.index.seen[tar]), os.O_RDONLY | os.O_CLOEXEC)
        return self._files[tar]


def _scan(root: str) -> Index:
    tars, found = tars_in(root), []
    with os.scandir(root) as entries:
        left_out = Counter("folders beside the tar files" if is_folder(entry) else "files beside the tar files"
                           for entry in entries if not entry.name.startswith(".") and entry.name not in tars)
    for number, tar in enumerate(tars, start=1):
        try:
            for member in members(os.path.join(root, tar)):
                path = PurePosixPath(member.name)
                if any(part.startswith(".") and part != ".." for part in path.parts):
                    continue
                if not member.plain:
                    left_out["links, sparse files and other special members"] += 1
                elif is_image(path.name):
                    found.append((path.parent.name or tar.removesuffix(".tar"), member.name, number, member.offset,
                                  member.size))
                else:
                    left_out[path.suffix.lower() or "without an ending"] += 1
        except (tarfile.TarError, OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{printable(os.path.join(root, tar))} cannot be read as an uncompressed tar ({reason}); "
                            "copy or make it again.", code="unreadable_data") from error
    if not found:
        raise no_images(root, "its tar files")
    found.sort()
    classes, labels = np.unique(np.array([entry[0] for entry in found], dtype=object), return_inverse=True)
    return Index.of(root, classes=classes.tolist(), labels=labels.tolist(), names=[entry[1] for entry in found],
                    seen=["", *tars], left_out=dict(left_out), places=[entry[2:] for entry in found])


class Member(NamedTuple):
    """One file in a tar: where its bytes lie; `plain` is False for links, devices and sparse files."""
    name: str
    offset: int
    size: int
    plain: bool


def members(path: str) -> Iterator[Member]:
    """What a tar holds except folders, in order; raises ValueError, OSError or TarError for a damaged one.

    Python's own reader takes a header of any claimed size into memory, follows chains of headers recursively and
    negative sizes backwards, and ends in silence where a header is damaged.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb", buffering=0) as file:
        position, in_a_row = 0, 0
        name, size, sparse = None, None, False  # as an extended header gives them for the member after it
        while True:
            block = os.pread(file.fileno(), _BLOCK, position)
            if len(block) < _BLOCK:
                raise ValueError("it has no end mark, so it was cut short")
            if not any(block):
                return
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            start, length = position + _BLOCK, header.size if size is None else size
            if header.type in _WITHOUT_DATA:
                length = 0
            if length < 0 or start + length > status.st_size:
                raise ValueError(f"{printable(header.name[:80])} has {length} bytes by its header, more than there are")
            while header.type == tarfile.GNUTYPE_SPARSE and block[-8 if start > position + _BLOCK else 482]:
                block, start = os.pread(file.fileno(), _BLOCK, start), start + _BLOCK  # the map of holes goes on
            position = start + -(-length // _BLOCK) * _BLOCK
            if header.type not in _EXTENDED:
                plain = header.isreg() and header.type != tarfile.GNUTYPE_SPARSE and not sparse
                if header.type != tarfile.DIRTYPE:
                    yield Member(name or header.name, start, length, plain)
                name, size, sparse, in_a_row = None, None, False, 0
                continue
            in_a_row += 1
            if length > _LARGEST_HEADER or in_a_row > _HEADERS_IN_A_ROW:
                raise ValueError("a header for a long name is larger or more often repeated than any path needs")
            content = os.pread(file.fileno(), length, start)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = os.fsdecode(content.partition(b"\0")[0])
            elif header.type in _PAX_TYPES:
                records = _pax(content)
                name = os.fsdecode(records[b"path"]) if b"path" in records else name
                size = int(records[b"size"]) if b"size" in records else size
                sparse = any(key.startswith(b"GNU.sparse") for key in records)


def _pax(content: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header, each `LENGTH KEY=VALUE` and a line's end."""
    records, at = {}, 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at, at + 20)
        end = at + int(content[at:space])
        if not space < end <= len(content):
            raise ValueError("a PAX header is damaged")
        key, _, value = content[space + 1:end - 1].partition(b"=")
        records[key], at = value, end
    return records
