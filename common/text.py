"""Words for people: sizes, durations, counts, odd texts and paths in one line, the nearest known name."""
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta


def file_size(size: float) -> str:
    """Bytes (decimal units) as `1.2 MB` or `3.41 GB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as `0:03:05` or `2 days, 3:04:00`."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "unknown"


def plural(count: int, word: str) -> str:
    """`1 worker`, `2 processes`, `3 classes`."""
    many = f"{word[:-1]}ies" if word.endswith("ry") else f"{word}es" if word.endswith("s") else f"{word}s"
    return f"{count} {word if count == 1 else many}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """An aligned Markdown table, for reading and pasting, with the keys of the first row as its head."""
    cells = [[*rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in cells)


def quote(text: str) -> str:
    """`text` in quotes, on one line, without control characters, at most 80 characters of it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def plain(text: str, longest: int = 80) -> str:
    """`text` as it is where it is printable and not too long, else quoted and shortened."""
    return text if text.isprintable() and len(text) <= longest else quote(text)


def printable(path: str) -> str:
    """The whole `path` on one line: bytes that are not UTF-8 and control characters appear as escapes."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(word: str, known: Iterable[str], form: str = "{}") -> str:
    """`; did you mean NAME?` for a misspelt `word`, "" when nothing known is near.

    `form` shows the name as it is written there, such as `--{}` or `recipes/{}.yaml`.
    """
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {form.format(near[0])}?" if near else ""
