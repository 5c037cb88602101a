"""Images read out of tar files where they lie: an index of offsets, nothing is ever extracted.

`train/` and `val/` may hold `*.tar` instead of class folders. An image's class is the folder before its name inside
the tar, or the tar's own name where there is no folder (the published ImageNet has one tar per class). Order and
labels are those of the unpacked folder.
"""
import io
import os
import tarfile
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from common.errors import UserError
from datasets.images import EXTENSIONS, BadImage, decode, show
from datasets.readers import Strings, cache_path, save_arrays

_FORMAT = 1
_OPEN_FILES = 64


def shards_in(root: str) -> list[str]:
    """The names of the tar files directly in `root`, sorted; [] when there are none."""
    if not os.path.isdir(root):
        return []
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.name.endswith(".tar") and not entry.name.startswith("."))


class ShardReader:
    """Images of the tar files in `root`; `labels` int32 (N,) are positions in `classes`.

    reindex, cache_folder, write_cache: as for `index_folder`. The index is made again when a tar's size or time has
    changed. Raises UserError for a damaged tar and when there is no image.
    """

    def __init__(self, root: str, *, reindex: bool = False, cache_folder: str | None = None, write_cache: bool = True):
        self.source = os.path.abspath(root)
        self.shards = shards_in(root)
        seen = [os.stat(os.path.join(root, name)) for name in self.shards]
        state = np.array([[status.st_size, status.st_mtime_ns] for status in seen], dtype=np.int64)
        cache = cache_path(self.source, cache_folder, "shards")
        data = None if reindex or cache is None else _load(cache, self.shards, state)
        if data is None:
            data = _scan(self.source, self.shards) | {"state": state, "format": np.array(_FORMAT)}
            if cache is not None and write_cache:
                save_arrays(cache, data, self.source)
        self.names = Strings(data["names"], data["name_ends"])
        classes = Strings(data["classes"], data["class_ends"])
        self.classes, self.labels = [classes[i] for i in range(len(classes))], data["labels"]
        self._places, self._files = data["places"], {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The tar's path, a slash, and the path inside it."""
        return os.path.join(self.source, self.shards[self._places[index, 0]], self.names[index])

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`; BadImage when the tar has become shorter."""
        shard, start, size = self._places[index].tolist()
        data = os.pread(self._file(shard), size, start)  # needs no position, so forked workers can share the file
        if len(data) != size:
            raise BadImage("the tar ends before the image does")
        return data

    def image(self, index: int) -> Image.Image:
        """Image `index` as RGB."""
        return decode(io.BytesIO(self.encoded(index)))

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(os.path.join(self.source, self.shards[shard]), os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]


def _scan(root: str, shards: list[str]) -> dict[str, np.ndarray]:
    found = []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(os.path.join(root, shard), "r:", errorlevel=2) as tar:
                for member in tar:
                    if member.isreg() and not member.issparse() and member.name.lower().endswith(EXTENSIONS):
                        folder = PurePosixPath(member.name).parent.name or shard.removesuffix(".tar")
                        found.append((folder, member.name, number, member.offset_data, member.size))
                    tar.members = []  # Otherwise it keeps every header it has met.
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{show(os.path.join(root, shard))} cannot be read as an uncompressed tar ({error}); copy "
                            "or make it again.") from error
    if not found:
        raise UserError(f"The tar files in {show(root)} hold no images ({', '.join(EXTENSIONS)}); check the path.")
    found.sort()
    classes, labels = np.unique(np.array([entry[0] for entry in found], dtype=object), return_inverse=True)
    names, folders = Strings.of([entry[1] for entry in found]), Strings.of(classes.tolist())
    listed = Strings.of(shards)
    return {"names": names.blob, "name_ends": names.ends, "classes": folders.blob, "class_ends": folders.ends,
            "shards": listed.blob, "shard_ends": listed.ends, "labels": labels.astype(np.int32),
            "places": np.array([entry[2:] for entry in found], dtype=np.int64)}


def _load(path, shards: list[str], state: np.ndarray) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            data = {name: stored[name] for name in stored.files}
        listed, names, classes = (Strings(data[blob], data[ends]) for blob, ends in (
            ("shards", "shard_ends"), ("names", "name_ends"), ("classes", "class_ends")))
        for strings in (listed, names, classes):
            strings.check()
        places, labels = data["places"], data["labels"]
        fits = int(data["format"]) == _FORMAT and np.array_equal(data["state"], state) \
            and [listed[i] for i in range(len(listed))] == shards and len(names) == len(labels) == len(places) \
            and labels.dtype == np.int32 and 0 <= labels.min() and labels.max() < len(classes) \
            and places.dtype == np.int64 and places.min() >= 0 \
            and (places[:, 1] + places[:, 2] <= state[places[:, 0], 0]).all()
        return data if fits else None
    except Exception:  # Whatever a damaged file raises, scanning again is the answer.
        return None
