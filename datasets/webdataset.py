"""The form of WebDataset tars: `key.jpg`, `key.cls` and `key.json` stand together and make a sample.

A class is called by the folder of the original file names in the .json members, where each label has its own;
else 1000 labels are ImageNet's synsets in their order; else it is a number.
"""
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from tarfile import TarInfo

from common.errors import UserError
from common.files import read_json
from common.synsets import imagenet_synsets
from common.text import plural, printable
from datasets.images import is_image, readable
from datasets.index import Index, Rows, Source
from datasets.readers import SPLITS
from datasets.tars import count_beside, members

INFO = ("_info.json", "info.json")
_LARGEST = 1 << 20  # bytes of a .cls or .json member


def recognise(source: Source) -> bool:
    """Tars whose first members have an image with a label beside it among them."""
    try:
        first = [member.name.rpartition(".") for tar in source.ending(".tar")[:1]
                 for _, member in islice(members(os.path.join(source.root, tar)), 12)]
    except UserError:  # whichever form it is, reading it will say why
        return False
    images = {key for key, _, kind in first if is_image(f"x.{kind}")}
    return any(kind in ("cls", "json") and key in images for key, _, kind in first)


def scan(source: Source) -> Index:
    """All samples with an image. Raises UserError for a sample without a label, and for tars that are not
    those of `_info.json`."""
    tars, rows, folders = source.ending(".tar"), Rows(), {}
    info = [name for name in INFO if name in source.files][:1]
    counts = _listed(source, info[0]) if info else {}
    count_beside(source, rows)
    for number, tar in enumerate(tars):
        path, before = os.path.join(source.root, tar), len(rows)
        with readable(path, "a WebDataset tar"), open(path, "rb") as file:
            for key, parts in _samples(path):
                _add(rows, file.fileno(), number, key, parts, folders)
            found, expected = len(rows) - before, counts.get(tar)
            if expected not in (None, found):
                raise ValueError(f"{found} images of the {expected} in {info[0]}")
    rows.classes = class_names(source.root, rows.classes, folders)
    return rows.index(source, f"WebDataset tars ({plural(len(tars), 'file')})", [*tars, "", *info])


def class_names(root: str, labels: dict[str, int], folders: dict[str, set[str]],
                listed: Sequence[str] = ()) -> dict[str, int]:
    """`labels` (label as text → its number in order of appearance) by the names of their classes.

    folders: those of each label's images, which name the classes where each label has one of its own. listed:
    names by label, for the rest. Raises UserError for labels below 0 or beyond a list.
    """
    highest = len(listed) or 10 ** 6
    odd = [label for label in labels if not 0 <= int(label) < highest]
    if odd:
        raise UserError(f"{printable(root)} has label {odd[0]}, and classes are 0 to {highest - 1}; give a "
                        "split with labels of these.", code="invalid_labels")
    own = {label: "".join(folders[label]) for label in labels if len(folders.get(label, ())) == 1}
    if len({*own.values()} - {""}) == len(labels):
        return {own[label]: number for label, number in labels.items()}
    if max(len(labels), len(listed)) == 1000:
        listed = imagenet_synsets()
    width = len(max(labels, key=len, default=""))
    names = listed if len({*listed}) == len(listed) else ()
    return {names[int(label)] if names else label.zfill(width): number for label, number in labels.items()}


def _samples(path: str) -> Iterator[tuple[str, dict[str, TarInfo]]]:
    """The key of each sample, and its members by what follows the key's dot."""
    def key(member: TarInfo) -> str:
        above, slash, name = member.name.removeprefix("./").rpartition("/")
        return above + slash + name.partition(".")[0]

    plain = (member for _, member in members(path) if member.isreg() and not member.issparse()
             and not os.path.basename(member.name).startswith("."))
    for sample, group in groupby(plain, key):
        parts = {}
        for member in group:
            kind = os.path.basename(member.name).partition(".")[2].lower()
            if parts.setdefault(kind, member) is not member:
                raise ValueError(f"{member.name} is there twice")
        yield sample, parts


def _add(rows: Rows, file: int, container: int, key: str, parts: dict[str, TarInfo],
         folders: dict[str, set[str]]) -> None:
    """Add the image of a sample, of the class that is its label as text."""
    def read(kind: str) -> bytes:
        if kind in parts and parts[kind].size > _LARGEST:
            raise ValueError(f"{parts[kind].name} has {parts[kind].size} bytes")
        return os.pread(file, parts[kind].size, parts[kind].offset_data) if kind in parts else b""

    images = [kind for kind in parts if is_image(f"x.{kind}")]
    if not images:
        rows.left_out["samples without an image"] += 1
        return
    rows.left_out["further images of a sample"] += len(images) - 1
    about = json.loads(read("json") or b"{}")
    number = read("cls") or about.get("label")
    if number is None:
        raise ValueError(f"{key} has no label")
    label, original = str(int(number)), str(about.get("filename") or "")
    above, name = os.path.split(original)
    above = os.path.basename(above)
    if "class" in about and original.startswith(f"{about['class']}/"):  # as tools.data writes it
        above, name = about["class"], original[len(about["class"]) + 1:]
    folders.setdefault(label, set()).add(above)
    image = parts[images[0]]
    rows.add(label, name or f"{os.path.basename(key)}.{images[0]}", container, image.offset_data, image.size)


def _listed(source: Source, info: str) -> dict[str, int | None]:
    """The number of images in each tar of the split as `_info.json` has it, {} where it doesn't list the
    split; UserError where it lists other tars."""
    here = source.ending(".tar")
    with readable(os.path.join(source.root, info), "the list of these tars"):
        splits = read_json(os.path.join(source.root, info))["splits"]
        named = source.split or os.path.basename(source.root)
        same = next((names for names in SPLITS.values() if named in names), ())
        split = next((splits[name] for name in (named, *same) if name in splits), None)
        if split is None:
            return {}
        files = [os.path.basename(name) for name in split["filenames"]]
        counts = split.get("shard_lengths") or [None] * len(files)
        if sorted(files) != here:
            other = min({*files} ^ {*here}, default="one")
            raise ValueError(f"{len(here)} tars are here and {len(files)} listed, not both times {other}")
        return dict(zip(files, counts, strict=True))
