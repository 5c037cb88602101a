"""Any form of data → plain tars in the WebDataset layout, `_info.json` and the index: bytes unchanged."""
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote

from PIL import Image, ImageOps
from tqdm import tqdm

from common.errors import UserError
from common.files import append_json_line, atomic_write, read_json_lines, write_json
from common.text import file_size, plural, printable
from datasets.images import BadImage, decode, is_image, unreadable
from datasets.index import IndexCache
from datasets.readers import SPLITS, Reader, find_split, open_reader, source_of

PUBLIC = {"train": "train", "val": "validation"}  # the names of splits in other people's readers
_PLAIN = re.compile(r"[\w +@()=,~-]+(/[\w +@()=,~-]+)*")
_OURS = re.compile(r"\..*|_info\.json|_\w+\.index|(train|validation)-\d+\.tar")
_SLICE, _THREADS_IN_ORDER = 32, 4  # images per task; threads where only the stored order is read fast
_T = TypeVar("_T")


def splits_in(path: str, cache: IndexCache) -> dict[str, Reader]:
    """The images of each split below `path`, or of `path` itself as one split. Raises UserError."""
    found = {part: source for part in SPLITS if (source := find_split(path, part))}
    if not found:
        name = os.path.basename(os.path.abspath(path))
        part = next((part for part, names in SPLITS.items() if name in names), "train")
        found = {part: source_of(path, part)}
    return {part: open_reader(source, cache) for part, source in found.items()}


def in_threads(reader: Reader, work: Callable[[int], _T], what: str, start: int = 0
               ) -> Iterator[tuple[int, _T]]:
    """(image, `work(image)`) for the images from the `start`-th on in stored order, on all cores, with a
    progress bar; a few hundred results at a time are in memory."""
    order, cores = reader.stored_order()[start:], len(os.sched_getaffinity(0))
    threads = min(cores, _THREADS_IN_ORDER) if reader.sequential else cores
    slices = (order[i:i + _SLICE].tolist() for i in range(0, len(order), _SLICE))
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(reader), initial=start, desc=what, unit="image",
                                                   disable=None) as bar:
        while some := list(islice(slices, 2 * threads)):
            for images, results in zip(some, pool.map(lambda images: [*map(work, images)], some)):
                yield from zip(images, results)
                bar.update(len(images))


def pack(source: str, folder: str, *, tar_bytes: int, resize: int, cache: IndexCache) -> list[str]:
    """Pack all splits of `source` into tars of about `tar_bytes` in `folder`; a sentence on each. Images with
    a short side above `resize` (unless 0) are made smaller. What an earlier call was stopped at continues
    with the next tar. Ends by reading what was written and comparing the orders' digests. UserError."""
    readers, target = splits_in(source, cache), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if not all(_OURS.fullmatch(path.name) for path in target.iterdir()):
        raise UserError(f"{printable(folder)} holds other files; name a new folder.", "unwritable_folder")
    done = {part: _pack_split(part, reader, target, tar_bytes, resize) for part, reader in readers.items()}
    write_json(target / "_info.json", {"name": Path(source).absolute().name, "splits": {
        PUBLIC[part]: {"name": PUBLIC[part], "num_samples": len(readers[part]), "alt_label": ""} | {
            key: [record[name] for record in records] for key, name in (
                ("filenames", "file"), ("shard_lengths", "images"), ("sha256", "sha256"))}
        for part, records in done.items()}})
    sentences = []
    for part, reader in readers.items():
        written = open_reader(source_of(folder, part), IndexCache("/dev/null/none", reindex=True))
        if written.order != reader.order:
            raise UserError(f"{printable(folder)} has another order than {part} had; pack again into a new "
                            "folder.", code="unreadable_data")
        written.index.write(target / f"_{PUBLIC[part]}.index")
        size = file_size(sum(record["bytes"] for record in done[part]))
        changed = f"; short sides of at most {resize}: the pixels have changed" if resize else ""
        sentences.append(f"{part}: {len(reader):,} images in {plural(len(done[part]), 'tar')}, {size}, order "
                         f"{reader.order[:8]} as before{changed}")
    return sentences


def _pack_split(part: str, reader: Reader, folder: Path, tar_bytes: int, resize: int) -> list[dict]:
    """Write the tars that are missing; a record (file, images, bytes, sha256) of each."""
    ledger = folder / f".pack-{part}.jsonl"
    header = {"order": reader.order, "tar_bytes": tar_bytes, "resize": resize}
    lines = read_json_lines(ledger)
    first, *done = lines or [header]
    if first != header or any((folder / record["file"]).stat().st_size != record["bytes"] for record in done):
        raise UserError(f"{folder} holds tars of other data; name a new folder.", code="folder_in_use")
    if not lines:
        append_json_line(ledger, header)

    def read(image: int) -> bytes:
        try:
            data = reader.encoded(image)
            return _smaller(data, resize) if resize else data
        except BadImage as error:
            raise UserError(f"{unreadable(reader.name(image), str(error))}; fix or remove it and start "
                            "again.", code="unreadable_image") from error

    start = sum(record["images"] for record in done)
    images = in_threads(reader, read, f"pack {part}", start)
    while start < len(reader):
        name, counts = f"{PUBLIC[part]}-{len(done):05d}.tar", []
        digest, size = atomic_write(folder / name,
                                    lambda file: counts.append(_fill(file, reader, images, tar_bytes)))
        done.append({"file": name, "images": counts[0], "bytes": size, "sha256": digest})
        append_json_line(ledger, done[-1])
        start += counts[0]
    return done


def _fill(file: BinaryIO, reader: Reader, images: Iterator[tuple[int, bytes]], tar_bytes: int) -> int:
    """Samples until the tar is large enough; their number."""
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for image, data in images:
            count += 1
            for name, content in _members(reader, image, data):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            if tar.offset >= tar_bytes:
                break
    return count


def _members(reader: Reader, image: int, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a sample. Its key is class/stem; where that is not unique or no plain name, the
    whole name, quoted."""
    label, stem = int(reader.labels[image]), reader.stem(image)
    folder, ending = reader.classes[label], os.path.splitext(reader.name(image))[1]
    tie = any(0 <= i < len(reader) and reader.labels[i] == label and reader.stem(i) == stem
              for i in (image - 1, image + 1))
    key = f"{_quoted(folder)}/{_quoted(stem + ending if tie else stem, tie)}"
    about = {"label": label, "class": folder, "filename": f"{folder}/{stem}{ending}"}
    yield f"{key}.{ending[1:].lower() if is_image('x' + ending) else 'jpg'}", data
    yield f"{key}.cls", str(label).encode()
    yield f"{key}.json", json.dumps(about).encode()


def _quoted(name: str, always: bool = False) -> str:
    plain = _PLAIN.fullmatch(name) and not always
    return name if plain else quote(name, safe=" ", errors="surrogateescape").replace(".", "%2E")


def _smaller(data: bytes, side: int) -> bytes:
    image, buffer = decode(data), io.BytesIO()
    if min(image.size) <= side:
        return data
    image = ImageOps.scale(image, side / min(image.size), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
