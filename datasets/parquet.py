"""The form of Hugging Face's parquet files: columns `image` (bytes, path) and `label`, read in place.

Rows come in groups of about a hundred, and a group is read as a whole: fast in the stored order, as in
evaluation, and slow in the random order of training. Needs pyarrow.
"""
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from common.errors import UserError
from common.text import listed, plural, printable
from datasets.images import LARGEST_FILE, BadImage, failures_are_the_images, readable, retried
from datasets.index import Index, Rows, Source
from datasets.readers import Reader, check_unchanged
from datasets.tars import count_beside
from datasets.webdataset import class_names

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_IMAGES, _LABELS = ("image", "img", "jpeg", "jpg"), ("label", "labels", "cls", "fine_label")
_WITH_SYNSET = re.compile(r"(?P<base>.+?)_(?P<synset>n\d{8})(?P<ending>\.\w+)")
_LARGEST_GROUP, _GROUPS = 4 << 30, 4  # bytes of a group of rows; how many of them a process keeps


def recognise(source: Source) -> bool:
    """A folder with parquet files directly in it."""
    return bool(source.ending(".parquet"))


def scan(source: Source) -> Index:
    """All rows. Raises UserError for damaged files, other columns, and labels without a class."""
    files, rows, folders, listed = source.ending(".parquet"), Rows(), {}, []
    count_beside(source, rows, "parquet")
    for number, name in enumerate(files):
        path = os.path.join(source.root, name)
        with readable(path, "parquet with images"), opened(path) as file:
            listed = _names(file) or listed
            for group, row, label, given in _labels_and_paths(file):
                match = _WITH_SYNSET.fullmatch(os.path.basename(given or ""))
                folders.setdefault(str(label), set()).add(match["synset"] if match else "")
                plain = match["base"] + match["ending"] if match else os.path.basename(given or "")
                plain = plain or f"{name.removesuffix('.parquet')}-{group:06d}-{row:06d}"
                rows.add(str(label), plain, number, group, row)
    rows.classes = class_names(source.root, rows.classes, folders, listed)
    return rows.index(source, f"parquet ({plural(len(files), 'file')})", [*files, ""])


class Images(Reader):
    """Images in parquet files: `offsets` are groups of rows and `lengths` rows in them."""

    sequential = True

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`, read with its group of rows; BadImage when that is damaged."""
        path, stamp = self.container(index), self.stamps[self.containers[index]].tolist()
        group, row = int(self.offsets[index]), int(self.index.arrays["lengths"][index])
        with failures_are_the_images():
            data = retried(lambda: _group(path, group, *stamp), path)[row].as_py()
        if not data or len(data) > LARGEST_FILE:
            raise BadImage("no bytes, or more than any image has")
        return data


@lru_cache(maxsize=_GROUPS)
def _group(path: str, group: int, changed: int, size: int):
    check_unchanged(path, changed, size)
    with opened(path) as file:
        column = _column(file, _IMAGES)
        nested = file.schema_arrow.field(column).type.num_fields > 0
        table = file.read_row_group(group, [f"{column}.bytes" if nested else column], use_threads=False)
        found = table.column(0).combine_chunks()
        return found.field("bytes") if nested else found


def opened(path: str) -> "ParquetFile":
    """A parquet file whose footer claims no more than the file can hold. Raises UserError without pyarrow,
    ValueError or OSError for other files."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install pyarrow.", code="missing_package") from error
    size = os.stat(path).st_size
    limit = min(max(size, 1), 2 ** 31 - 1)
    file = parquet.ParquetFile(path, pre_buffer=False, thrift_string_size_limit=limit,
                               thrift_container_size_limit=limit)
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    columns = [group.column(column) for group in groups for column in range(file.metadata.num_columns)]
    rows, packed = [group.num_rows for group in groups], [column.total_compressed_size for column in columns]
    plain = [column.total_uncompressed_size for column in columns]
    if min([*rows, *packed], default=0) < 0 or not (
            sum(rows) == file.metadata.num_rows <= size >= sum(packed)) or any(
            large > min(_LARGEST_GROUP, 1000 * small + 65536) for large, small in zip(plain, packed)):
        raise ValueError("its footer claims more than the file holds")
    return file


def _column(file: "ParquetFile", names: tuple[str, ...]) -> str:
    found = [name for name in names if name in file.schema_arrow.names]
    if not found:
        raise ValueError(f"no column is called {listed(names)}")
    return found[0]


def _labels_and_paths(file: "ParquetFile") -> Iterator[tuple[int, int, int, str | None]]:
    image, label = _column(file, _IMAGES), _column(file, _LABELS)
    inside = file.schema_arrow.field(image).type
    paths = [f"{image}.path"] * any(inside.field(i).name == "path" for i in range(inside.num_fields))
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group, [label, *paths], use_threads=False)
        labels = table.column(label).to_pylist()
        images = table.column(image).to_pylist() if paths else [{}] * len(labels)
        for row, (number, entry) in enumerate(zip(labels, images)):
            yield group, row, int(number), (entry or {}).get("path")


def _names(file: "ParquetFile") -> list[str]:
    """The class names of the schema's metadata, as Hugging Face's `datasets` writes them; [] without."""
    about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    feature = about.get("info", {}).get("features", {}).get(_column(file, _LABELS), {})
    return [printable(str(name)) for name in feature.get("names", ())]
