"""The form of tar files, read where they lie: an index of offsets, nothing is ever extracted.

`train/` and `val/` hold `*.tar`. An image's class is the folder before its name inside the tar, or the tar's
own name where there is no folder (one tar per class). Order and labels are those of the unpacked folder.
"""
import io
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath

import numpy as np

from common.errors import UserError
from common.text import printable
from datasets.folders import file_type, is_folder, visible
from datasets.images import LARGEST_FILE, BadImage, extensions, is_image
from datasets.readers import Index, IndexCache, Indexed, no_images

_LARGEST_HEADER = 1 << 20  # bytes of a long name or of PAX records


def tars_in(root: str) -> list[str]:
    """The names of the tar files directly in `root`, sorted; [] when there are none."""
    return [entry.name for entry in visible(root) if entry.name.endswith(".tar") and not is_folder(entry)]


def recognise(root: str) -> bool:
    """A folder with tar files directly in it."""
    return os.path.isdir(root) and bool(tars_in(root))


def read(root: str, cache: IndexCache) -> "Tars":
    """The images in the tar files of `root`; raises UserError for a damaged tar and when there is no
    image."""
    return Tars(cache.index("tars", root, _scan))


class Tars(Indexed):
    """Images inside tar files; a Reader."""

    def name(self, index: int) -> str:
        """The tar's path, a slash, and the path inside it."""
        return os.path.join(self.root, self.index.seen[self.index.places[index, 0]], self.index.names[index])

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`; BadImage when the tar has become shorter."""
        tar, start, size = self.index.places[index].tolist()
        file = _opened(os.path.join(self.root, self.index.seen[tar]), int(self.index.stamps[tar, 0]))
        # pread needs no position, so that forked workers can share the file.
        data = b"" if size > LARGEST_FILE else os.pread(file.fileno(), size, start)
        if len(data) != size:
            raise BadImage("the tar ends before the image does, or it is larger than any image")
        return data


@lru_cache(maxsize=64)
def _opened(path: str, changed: int) -> io.FileIO:
    """The file, which closes itself when it is the one of 64 that was not used for longest."""
    return io.FileIO(path)


def _scan(root: str) -> Index:
    tars, found = tars_in(root), []
    left_out = Counter(f"{'folders' if is_folder(entry) else file_type(entry.name)} beside the tar files"
                       for entry in visible(root) if entry.name not in tars)
    for number, tar in enumerate(tars, start=1):
        try:
            for member in members(os.path.join(root, tar)):
                path = PurePosixPath(member.name)
                if member.isdir() or any(part.startswith(".") and part != ".." for part in path.parts):
                    continue
                if not member.isreg() or member.issparse():
                    left_out["links and other special members"] += 1
                elif is_image(path.name):
                    folder = path.parent.name or tar.removesuffix(".tar")
                    found.append((folder, member.name, number, member.offset_data, member.size))
                else:
                    left_out[file_type(path.name)] += 1
        except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
            path = printable(os.path.join(root, tar))
            raise UserError(f"{path} cannot be read as an uncompressed tar ({error}); copy or make it again.",
                            code="unreadable_data") from error
    if not found:
        raise no_images(root, f"holds no images ({', '.join(extensions())}) in its tar files; check the path")
    found.sort()
    classes, labels = np.unique(np.array([entry[0] for entry in found], dtype=object), return_inverse=True)
    return Index.of(root, classes=classes.tolist(), labels=labels.tolist(), seen=["", *tars],
                    left_out=left_out, names=[entry[1] for entry in found],
                    places=[entry[2:] for entry in found])


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """What a tar holds, in order; raises ValueError, OSError, RecursionError or TarError for a damaged one.

    Python's reader alone takes a header of any claimed size into memory, follows negative sizes backwards,
    and ends in silence where a header is damaged.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0:
                raise ValueError("a negative size")
            yield member
            vars(tar)["members"] = []  # Otherwise it keeps every header it has met.
        block = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise ValueError(f"damaged or cut short at byte {tar.offset}")


class _Bounded(io.FileIO):
    def read(self, size: int | None = -1, /) -> bytes:
        """As FileIO's, for the sizes of sensible headers."""
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return super().read(size) or b""
