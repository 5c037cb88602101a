"""ImageNet's companions: ReaL labels for the validation set, and V2, -A, -R and -Sketch by their class
folders."""
import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath

from common.synsets import imagenet_synsets

_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.IGNORECASE)
_INFO = importlib.resources.files("timm.data") / "_info"


@dataclass(frozen=True)
class Subset:
    """How images of one of the sets are judged by a model with ImageNet-1k's 1000 logits.

    name: imagenet-val, imagenet-v2, imagenet-a, imagenet-r or imagenet-sketch · folders: class folders in the
    order of the logits that are kept · columns: indices of these logits, None for all 1000.
    """
    name: str
    folders: tuple[str, ...]
    columns: tuple[int, ...] | None = None


def recognise(folders: Sequence[str], images: Sequence[str] = ()) -> Subset | None:
    """The set that class `folders` and the names of some `images` belong to; None for any other data.

    -A and -R have 200 of the 1000 synsets each and are judged among these alone, as their authors do. V2's
    folders are the class indices 0 to 999 (sorted as text they would be other classes).
    """
    found, synsets = set(folders), imagenet_synsets()
    if len(found) == 1000 and found == {str(i) for i in range(1000)}:
        return Subset("imagenet-v2", tuple(str(i) for i in range(1000)))
    for name in ("imagenet-a", "imagenet-r"):
        columns = _columns(name)
        if found == {synsets[i] for i in columns}:
            return Subset(name, tuple(synsets[i] for i in columns), columns)
    if found and found <= set(synsets):
        names = [PurePath(image).name for image in images]
        if names and all(name.startswith("sketch_") for name in names):
            return Subset("imagenet-sketch", synsets)
        if len(found) == 1000 or names and all(map(_VAL_NAME.match, names)):
            return Subset("imagenet-val", synsets)
    return None


def recognise_folder(root: str) -> Subset | None:
    """`recognise` for a folder of class folders; reads the names of these and of a few images. None if
    unreadable."""
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        images = [next(entry.name for entry in os.scandir(os.path.join(root, folder))
                     if entry.is_file() and not entry.name.startswith("."))
                    for folder in folders[:3]]
    except (OSError, StopIteration):
        return None
    return recognise(folders, images)


@cache
def _columns(name: str) -> tuple[int, ...]:
    return tuple(int(line) for line in (_INFO / f"{name.replace('-', '_')}_indices.txt").read_text().split())


@cache
def _real_labels() -> list[list[int]]:
    return json.loads((_INFO / "imagenet_real_labels.json").read_text())


def real_labels(images: Sequence[str]) -> list[list[int]] | None:
    """ImageNet-ReaL's answers for validation images, by the number in their names; None when one has no such
    name.

    An empty list is an image that its annotators gave no label; it is left out of the ReaL accuracy
    (Beyer et al., 2020; the labels come with timm).
    """
    labels, found = _real_labels(), [_VAL_NAME.match(PurePath(image).name) for image in images]
    numbers = [int(match[1]) for match in found if match and 1 <= int(match[1]) <= len(labels)]
    return [labels[number - 1] for number in numbers] if numbers and len(numbers) == len(found) else None
