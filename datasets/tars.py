"""The form of tar files, read where they lie: an index of offsets, nothing is ever extracted.

An image's class is the folder before its name inside the tar, or the tar's own name where there is no folder
(one tar per class, also one inside another tar, as ILSVRC2012_img_train.tar has them). The images of
ILSVRC2012_img_val.tar get theirs from ILSVRC2012_devkit_t12.tar.gz beside it.
"""
import io
import os
import stat
import tarfile
from collections.abc import Iterator

from common.errors import UserError
from common.text import plural, printable
from datasets.images import is_image, read_file, readable, unzipped
from datasets.index import Index, Rows, Source, file_type
from datasets.labels import devkit_synsets

_LARGEST_HEADER, _LARGEST_DEVKIT = 1 << 20, 256 << 20  # bytes of a long name or PAX records; unpacked
_VAL, _DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def recognise(source: Source) -> bool:
    """A folder with tar files directly in it."""
    return bool(source.ending(".tar"))


def scan(source: Source) -> Index:
    """All images of all tars; raises UserError for a damaged tar."""
    tars, rows, own_folder = source.ending(".tar"), Rows(), False
    if tars == [_VAL]:
        return _scan_val(source, rows)
    count_beside(source, rows)
    for number, tar in enumerate(tars):
        for inner, member in members(os.path.join(source.root, tar)):
            parts = image_path(member, rows)
            if parts:
                own_folder |= len(parts) > 1
                folder = parts[-2] if len(parts) > 1 else (inner or tar).rpartition("/")[2][:-len(".tar")]
                rows.add(folder, member.name, number, member.offset_data, member.size)
    if rows.left_out[".cls"]:
        raise UserError(f"{printable(source.root)} mixes WebDataset tars with others; keep one form in a "
                        "folder.", code="mixed_forms")
    kind = "tar files" if own_folder else "a tar per class"
    return rows.index(source, f"{kind} ({plural(len(tars), 'file')})", [*tars, ""], members=True)


def _scan_val(source: Source, rows: Rows) -> Index:
    """The validation images by the devkit's labels, or all of the class '' when there is none."""
    found = [(parts[-1], member.offset_data, member.size) for _, member in members(
        os.path.join(source.root, _VAL)) if (parts := image_path(member, rows))]
    given = [_DEVKIT] if _DEVKIT in source.files else []
    synsets = _devkit(os.path.join(source.root, _DEVKIT), len(found)) if given else [""] * len(found)
    for synset, (name, offset, size) in zip(synsets, sorted(found)):
        rows.add(synset, name, 0, offset, size)
    return rows.index(source, _VAL, [_VAL, "", *given], members=True)


def _devkit(path: str, images: int) -> list[str]:
    """The synset of each validation image in the order of their names."""
    with readable(path, "the devkit of ILSVRC2012"):
        content = unzipped(read_file(path), _LARGEST_DEVKIT)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = {os.path.basename(member.name): tar.extractfile(member) for member in tar}
            truth, meta = (files[name] for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
            assert truth is not None and meta is not None
            ids = [int(line) for line in truth.read().split()]
            return devkit_synsets(ids, meta.read(), images)


def count_beside(source: Source, rows: Rows, kind: str = "tar") -> None:
    """Count what lies beside the tar or parquet files of a folder that is one split."""
    others = [file_type(name) for name in source.files if not name.endswith(f".{kind}")]
    rows.left_out.update(f"{other} beside the {kind} files" for other in (
        () if source.split else ["folders" for _ in source.folders] + others))


def image_path(member: tarfile.TarInfo, rows: Rows) -> list[str]:
    """The parts of an image's path; [] for any other member, counted unless it is a folder or hidden."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.isdir() or not parts or any(part.startswith(".") and part != ".." for part in parts):
        return []
    if not member.isreg() or member.issparse():
        rows.left_out["links and other special members"] += 1
    elif is_image(parts[-1]):
        return parts
    else:
        rows.left_out[file_type(parts[-1])] += 1
    return []


def members(path: str) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """What a tar holds, in order, each with "" or the name of the inner tar it is in. UserError for a damaged
    one.

    Python's reader alone takes a header of any claimed size into memory, follows negative sizes backwards,
    and ends in silence where a header is damaged.
    """
    with readable(path, "an uncompressed tar"):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        with _Bounded(path) as file:
            yield from _members(file, 0, status.st_size, "")


def _members(file: "_Bounded", start: int, end: int, inner: str) -> Iterator[tuple[str, tarfile.TarInfo]]:
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            last = member.offset_data + (0 if member.issparse() else member.size)
            if member.size < 0 or last > end:
                raise ValueError(f"a size of {member.size} bytes at byte {member.offset}")
            if member.isreg() and member.name.endswith(".tar") and not inner:
                yield from _members(file, member.offset_data, last, member.name)
            else:
                yield inner, member
            vars(tar)["members"] = []  # Otherwise it keeps every header it has met.
        block = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
        if len(block) < tarfile.BLOCKSIZE or any(block) or tar.offset + tarfile.BLOCKSIZE > end:
            raise ValueError(f"damaged or cut short at byte {tar.offset}")


class _Bounded(io.FileIO):
    def read(self, size: int | None = -1, /) -> bytes:
        """As FileIO's, for the sizes of sensible headers."""
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return super().read(size) or b""
