"""From class folders to logit positions: ImageNet's own order, the 22k order, one's own classes, flat val
folders; ImageNet's companions V2, -A, -R and -Sketch, and ReaL's labels for its validation set."""
import csv
import importlib.resources
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from common.errors import UserError
from common.synsets import imagenet_synsets, published_22k_synsets
from common.text import printable
from datasets.images import read_file, readable
from datasets.readers import Reader

_LARGEST = 256 << 20  # bytes; 1.28 million lines have 40 MB
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.IGNORECASE)
_INFO = importlib.resources.files("timm.data") / "_info"


def classes_of(folders: list[str], nb_classes: int | None, *, imagenet_layout: bool,
               allow_mismatch: bool = False) -> list[str]:
    """The classes in logit order that class folders `folders` (sorted as text) stand for.

    Synset folders of ImageNet-1k with a 1000-class model (`nb_classes` 1000, or not given in the ImageNet
    layout) get ImageNet's own order, so that a part of ImageNet gets its labels; those of the 22k set get the
    published one. Otherwise the folders' own order as text. Raises UserError when `nb_classes` does not fit.
    """
    for known, wanted in ((imagenet_synsets(), imagenet_layout),
                          (published_22k_synsets(), len(folders) == 10459)):
        if nb_classes == len(known) or (nb_classes is None and wanted):
            unknown = sorted(set(folders) - set(known))
            if not unknown or (allow_mismatch and len(unknown) < len(folders)):
                return list(known)
            if len(unknown) * 10 <= len(folders):
                raise UserError(f"{_some(unknown)}: folders of none of {len(known)} synsets; remove or skip "
                                "them (--allow_class_mismatch true).", code="unexpected_classes")
    if nb_classes is not None and nb_classes != len(folders):
        raise UserError(f"--nb_classes {nb_classes}, and the class folders are {_some(folders)}; give "
                        f"--nb_classes {len(folders)} or check the data path.", code="unexpected_classes")
    return list(folders)


def numbered(folders: list[str], strict: bool) -> list[str]:
    """Folders 0, 1, …, 10 sorted as text put folder 10 at index 2: a note on it, refused where `strict`,
    because it decides a result."""
    numbers = all(name.isascii() and name.isdigit() for name in folders)
    pairs = zip(folders, sorted(folders, key=int)) if numbers else ()
    at = next((i for i, (folder, by_number) in enumerate(pairs) if folder != by_number), None)
    if at is None:
        return []
    sentence = f"class folders are numbers and sort as text, so folder '{folders[at]}' is class {at}"
    if strict:
        raise UserError(f"The {sentence}, and the checkpoint names no classes; rename with leading zeros, or "
                        "accept this order with --allow_class_mismatch true.", code="unexpected_classes")
    return [sentence + "; the class names are kept in the checkpoint, and evaluation goes by them"]


def map_folders(found: list[str], names: list[str], *, partial: bool, allow_mismatch: bool, what: str
                ) -> np.ndarray:
    """Logit index of each class `found`, int64 (found,), -1 for those of no class (only with
    `allow_mismatch`).

    partial: some classes may be missing (a part of ImageNet); otherwise that is an error too. what: the data,
    for the sentence. Raises UserError naming the missing and extra classes.
    """
    position = {name: i for i, name in enumerate(names)}
    mapped = np.array([position.get(name, -1) for name in found], dtype=np.int64)
    extra = [name for name in found if name not in position]
    missing = sorted(set(names) - set(found))
    problems = [f"unknown classes: {_some(extra)}"] * bool(extra)
    problems += [f"no class {_some(missing)}"] * bool(missing and not partial)
    if problems and not ((common := (mapped >= 0).any()) and allow_mismatch):
        common_alone = ", or use the common classes alone with --allow_class_mismatch true" * bool(common)
        raise UserError(f"{what} has {' and '.join(problems)}; check the path{common_alone}.",
                        code="unexpected_classes")
    return mapped


def _some(names: list[str], shown: int = 3) -> str:
    listed = ", ".join(printable(str(name)) for name in names[:shown])
    return listed if len(names) <= shown else f"{listed}, … ({len(names)} in all)"


def read_val_labels(path: str, file_names: list[str]) -> list[str]:
    """The class name of each file of a flat val folder, from a CSV of file name and synset (a header and
    further columns are allowed, endings may differ) or the devkit's ground truth (one ILSVRC2012_ID per line)
    with meta.mat beside it.

    Raises UserError when the file is not readable as either, names a file twice, or an image has no label.
    """
    with readable(path, "--val_labels, a CSV of file name,synset or the devkit's ground truth beside its "
                  "meta.mat", code="invalid_labels"):
        rows = [row for row in csv.reader(read_file(path, _LARGEST).decode().splitlines()) if row]
        if rows and all(len(row) == 1 and row[0].strip().isdigit() for row in rows):
            meta = read_file(str(Path(path).with_name("meta.mat")), _LARGEST)
            return devkit_synsets([int(row[0]) for row in rows], meta, len(file_names))
    labelled = [(Path(row[0].strip()).name, row[1].split()[0]) for row in rows if row[1:] and row[1].strip()]
    stems = {name: Path(name).stem for name in (*file_names, *(name for name, _ in labelled))}
    keys = stems if len({stems[name] for name in file_names}) == len(file_names) else dict(zip(stems, stems))
    table = {keys[name]: label for name, label in labelled}
    counts = Counter(keys[name] for name, _ in labelled)
    twice = [name for name, _ in labelled if counts[keys[name]] > 1]
    if twice:
        raise UserError(f"--val_labels {path} names {printable(twice[0])} twice; remove one.",
                        code="invalid_labels")
    unnamed = [name for name in file_names if keys[name] not in table]
    if unnamed:
        raise UserError(f"--val_labels {path} lacks {len(unnamed)} of {len(file_names)} images, such as "
                        f"{printable(unnamed[0])}; each needs a line `file name,synset`.", "invalid_labels")
    return [table[keys[name]] for name in file_names]


def devkit_synsets(ids: list[int], meta: bytes, images: int) -> list[str]:
    """The synset of each of `images` by its ILSVRC2012_ID, from the devkit's meta.mat; raises anything for a
    damaged one, and ValueError when there are more or fewer numbers."""
    from scipy.io import loadmat
    if len(ids) != images:
        raise ValueError(f"{len(ids)} labels for {images} images")
    entries = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    synsets = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in np.atleast_1d(entries)}
    return [synsets[number] for number in ids]


@dataclass(frozen=True)
class Subset:
    """How images of one of the sets are judged by a model with ImageNet-1k's 1000 logits.

    name: imagenet-val, imagenet-v2, imagenet-a, imagenet-r or imagenet-sketch · folders: class folders in the
    order of the logits that are kept · columns: indices of these logits, None for all 1000.
    """
    name: str
    folders: tuple[str, ...]
    columns: tuple[int, ...] | None = None


def recognise(reader: Reader) -> Subset | None:
    """The set that a reader's images are, by their classes and the names of a few; None for any other data.

    -A and -R have 200 of the 1000 synsets each and are judged among these alone, as their authors do. V2's
    folders are the class indices 0 to 999 (sorted as text they would be other classes).
    """
    found, synsets = set(reader.classes), imagenet_synsets()
    firsts = np.searchsorted(reader.labels, np.arange(min(3, len(found)))).tolist()
    names = [os.path.basename(reader.name(min(i, len(reader) - 1))) for i in firsts]
    if found == {str(i) for i in range(1000)}:
        return Subset("imagenet-v2", tuple(str(i) for i in range(1000)))
    for name in ("imagenet-a", "imagenet-r"):
        columns = tuple(map(int, (_INFO / f"{name.replace('-', '_')}_indices.txt").read_text().split()))
        if found == {synsets[i] for i in columns}:
            return Subset(name, tuple(synsets[i] for i in columns), columns)
    if not found <= set(synsets):
        return None
    if all(name.startswith("sketch_") for name in names):
        return Subset("imagenet-sketch", synsets)
    return Subset("imagenet-val", synsets) if len(found) == 1000 or all(map(_VAL_NAME.match, names)) else None


def real_labels(images: Sequence[str]) -> list[list[int]] | None:
    """ImageNet-ReaL's answers for validation images, by the number in their names; None when one has no such
    name.

    An empty list is an image that its annotators gave no label; it is left out of the ReaL accuracy
    (Beyer et al., 2020; the labels come with timm).
    """
    labels = json.loads((_INFO / "imagenet_real_labels.json").read_text())
    found = [_VAL_NAME.match(PurePath(image).name) for image in images]
    numbers = [int(match[1]) for match in found if match and 1 <= int(match[1]) <= len(labels)]
    return [labels[number - 1] for number in numbers] if numbers and len(numbers) == len(found) else None
