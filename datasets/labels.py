"""From folder names to logit positions: ImageNet's own order, the 22k order, one's own classes, flat val folders."""
import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.synsets import imagenet_synsets, published_22k_synsets
from datasets.images import show


@dataclass
class ClassMap:
    """`names` in logit order, and what a person should know about how they were found."""

    names: list[str]
    notes: list[str] = field(default_factory=list)


def classes_of(folders: list[str], nb_classes: int | None, *, imagenet_layout: bool, allow_mismatch: bool = False,
               evaluating: bool = False) -> ClassMap:
    """The class list, in logit order, that class folders `folders` (sorted as text) stand for.

    Synset folders of ImageNet-1k with a 1000-class model (`nb_classes` 1000, or not given in the ImageNet layout) get
    ImageNet's own order, so that a part of ImageNet is labelled rightly; those of the 22k set get the published one.
    Otherwise the folders' own order as text. Raises UserError when `nb_classes` does not fit.
    """
    for listed, wanted in ((imagenet_synsets(), imagenet_layout), (published_22k_synsets(), len(folders) == 10459)):
        if nb_classes == len(listed) or (nb_classes is None and wanted):
            strays = sorted(set(folders) - set(listed))
            if not strays or (allow_mismatch and len(strays) < len(folders)):
                note = [] if len(folders) == len(listed) else [
                    f"{len(folders) - len(strays)} of {len(listed)} classes have a folder; the order is ImageNet's own"]
                return ClassMap(list(listed), note)
            if len(strays) * 10 <= len(folders):
                raise UserError(f"{_some(strays)} among {len(folders)} synset folders are none of the {len(listed)} "
                                "classes; remove them, or leave them out with --allow_class_mismatch true.")
    if nb_classes is not None and nb_classes != len(folders):
        raise UserError(f"--nb_classes {nb_classes} does not fit the {len(folders)} class folders found "
                        f"({_some(folders)}); give --nb_classes {len(folders)} or check the data path.")
    return ClassMap(list(folders), _numbered(folders, evaluating and not allow_mismatch))


def _numbered(folders: list[str], strict: bool) -> list[str]:
    """Folders 0, 1, …, 10 sorted as text put folder 10 at index 2: explained, refused where that decides a result."""
    if not all(name.isascii() and name.isdigit() for name in folders) or folders == sorted(folders, key=int):
        return []
    by_number = sorted(folders, key=int)
    at = next(i for i, folder in enumerate(folders) if folder != by_number[i])
    sentence = (f"class folders are numbers and sort as text, so folder '{folders[at]}' is class {at}")
    if strict:
        raise UserError(f"The {sentence}, and the checkpoint names no classes to compare with; rename the folders with "
                        "leading zeros or to synsets, or accept this order with --allow_class_mismatch true.")
    return [sentence + "; the class names are kept in the checkpoint, and evaluation goes by them"]


def map_folders(folders: list[str], names: list[str], *, partial: bool, allow_mismatch: bool, what: str) -> np.ndarray:
    """Logit index of each folder, int64 (folders,), -1 for folders of no class (only with `allow_mismatch`).

    partial: some classes may have no folder (a part of ImageNet); otherwise that is an error too.
    Raises UserError naming the missing and extra classes.
    """
    position = {name: i for i, name in enumerate(names)}
    found = np.array([position.get(folder, -1) for folder in folders], dtype=np.int64)
    extra = [folder for folder in folders if folder not in position]
    missing = sorted(set(names) - set(folders))
    if not (found >= 0).any():
        raise UserError(f"None of the {len(folders)} class folders in {what} ({_some(folders)}) is one of the "
                        f"{len(names)} classes ({_some(names)}); check the path.")
    problems = ([f"has folders of no known class: {_some(extra)}"] if extra else []) + (
        [f"has no folder for {_some(missing)}"] if missing and not partial else [])
    if problems and not allow_mismatch:
        raise UserError(f"{what[:1].upper()}{what[1:]} {' and '.join(problems)}; mend the folders, or go on with the "
                        "common classes by --allow_class_mismatch true.")
    return found


def _some(names: list[str], shown: int = 3) -> str:
    listed = ", ".join(show(str(name)) for name in names[:shown])
    return listed if len(names) <= shown else f"{listed}, … ({len(names)} in all)"


def read_val_labels(path: str, file_names: list[str]) -> list[str]:
    """The class name of each file of a flat val folder, from a CSV of file name and synset (a header and further
    columns are allowed) or the devkit's ground truth (one ILSVRC2012_ID per line) with meta.mat beside it.

    Raises UserError when the file is not readable as either, or an image has no label.
    """
    try:
        rows = [row for row in csv.reader(Path(path).read_text(encoding="utf-8").splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--val_labels {path} cannot be read ({error}); give a CSV of file name,synset or "
                        "ILSVRC2012_validation_ground_truth.txt.") from error
    if rows and all(len(row) == 1 and row[0].strip().isdigit() for row in rows):
        return _devkit_labels(Path(path), [int(row[0]) for row in rows], file_names)
    table = {Path(row[0].strip()).stem: row[1].split()[0] for row in rows if len(row) > 1 and row[1].strip()}
    unnamed = [name for name in file_names if Path(name).stem not in table]
    if unnamed:
        raise UserError(f"--val_labels {path} has no line for {len(unnamed)} of {len(file_names)} images, such as "
                        f"{show(unnamed[0])}; each image needs a line `file name,synset`.")
    return [table[Path(name).stem] for name in file_names]


def _devkit_labels(path: Path, ids: list[int], file_names: list[str]) -> list[str]:
    if len(ids) != len(file_names):
        raise UserError(f"--val_labels {path} has {len(ids)} labels for {len(file_names)} images; the devkit's "
                        "file has one for each of the 50,000 images in the order of their names.")
    meta = path.parent / "meta.mat"
    if not meta.is_file():
        raise UserError(f"{path.name} needs the devkit's meta.mat in {path.parent}, which says what its numbers mean; "
                        "copy it there.")
    from scipy.io import loadmat
    try:
        entries = loadmat(meta, squeeze_me=True)["synsets"]
        synsets = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in np.atleast_1d(entries)}
        return [synsets[number] for number in ids]
    except Exception as error:  # loadmat raises many types for a damaged file; all mean the same here.
        raise UserError(f"{meta} does not explain the numbers in {path.name} ({error!r}); take both files from one "
                        "devkit.") from error
