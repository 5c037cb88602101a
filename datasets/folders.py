"""The form of class folders: one folder per class, images anywhere below it."""
import os
from collections.abc import Iterator

from datasets.images import is_image
from datasets.index import Index, Rows, Source, file_type, is_folder, visible


def recognise(source: Source) -> bool:
    """Any folder."""
    return os.path.isdir(source.root)


def scan(source: Source) -> Index:
    """The images in class folders, or directly in the root, where they form the one class ''.

    Links are followed, loops are not; names starting with a dot are left out.
    """
    rows, seen = Rows(), [""] if source.folders else []
    if source.folders:
        rows.left_out.update(f"{file_type(name)} beside the class folders" for name in source.files)
    for name in source.folders or ("",):
        rows.classes[name] = len(rows.classes)
        for path in _walk(os.path.join(source.root, name), name, frozenset(), seen, rows):
            rows.add(name, path[len(name) + bool(name):])
    return rows.index(source, "class folders" if source.folders else "one folder", seen)


def _walk(folder: str, below: str, above: frozenset, seen: list[str], rows: Rows) -> Iterator[str]:
    """The images in `folder` and its folders, as paths below the root; `above` ends a loop of links."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    seen.append(below)
    for entry in visible(folder):
        path = os.path.join(below, entry.name)
        if is_folder(entry):
            yield from _walk(entry.path, path, above | {here}, seen, rows)
        elif is_image(entry.name):  # a link that leads nowhere too: it must not be skipped in silence
            yield path
        else:
            rows.left_out[file_type(entry.name)] += 1
