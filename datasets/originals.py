"""The form of ImageNet's files as downloaded: ILSVRC2012_img_train.tar, a tar of one tar per class, and
ILSVRC2012_img_val.tar, whose labels are in ILSVRC2012_devkit_t12.tar.gz beside it; nothing is extracted."""
import gzip
import io
import os
import tarfile
from pathlib import PurePath

from common.errors import UserError
from datasets.index import Index, Rows, Source
from datasets.labels import devkit_synsets
from datasets.tars import image_path, members, readable
from datasets.tars import scan as scan_tars

_TRAIN, _VAL, _DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_LARGEST = 256 << 20  # bytes of the unpacked devkit


def recognise(source: Source) -> bool:
    """A folder with the original tar of its split."""
    return source.ending(".tar") in ([_TRAIN], [_VAL])


def scan(source: Source) -> Index:
    """The training images by the tar they are in; the validation images by the devkit's labels, or all of the
    class '' when there is none."""
    if source.ending(".tar") == [_TRAIN]:
        return scan_tars(source)
    rows, devkit, found = Rows(), _DEVKIT in source.files, []
    for _, member in members(os.path.join(source.root, _VAL)):
        if parts := image_path(member, rows):
            found.append((parts[-1], member.offset_data, member.size))
    found.sort()
    synsets = _synsets(os.path.join(source.root, _DEVKIT)) if devkit else [""] * len(found)
    if len(synsets) != len(found):
        raise UserError(f"{source.root}: {_DEVKIT} has {len(synsets)} labels and {_VAL} {len(found)} images; "
                        "download them again.", code="invalid_labels")
    for synset, (name, offset, size) in zip(synsets, found):
        rows.add(synset, name, 0, offset, size)
    return rows.index(source, _VAL, [_VAL, "", *[_DEVKIT] * devkit], members=True)


def _synsets(path: str) -> list[str]:
    """The synset of each validation image in the order of their names."""
    with readable(path, "the devkit of ILSVRC2012"):
        with gzip.open(path) as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = {PurePath(member.name).name: tar.extractfile(member) for member in tar if member.isreg()}
            truth, meta = (files[name] for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
            assert truth is not None and meta is not None
            try:
                return devkit_synsets([int(line) for line in truth.read().split()], meta.read())
            except Exception as error:  # loadmat raises many types for a damaged file
                raise ValueError(str(error)) from error
