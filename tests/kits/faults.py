"""What the tables of faults share: tiny images, one trained run, and `main.main` with its code and last
words.

A row runs in this process, because a start costs seconds and tests the same.
"""
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

import main
from common.log import logger
from run.log import Tracker
from tests.kits.images import fill_folder

MODEL = "hornet_pico_7x7"
# Whatever a row does not say: two updates of eight images, without workers, mixing or erasing.
TRAIN = {"model": MODEL, "data_path": "{data}", "output_dir": "{run}", "device": "cpu", "input_size": "32",
         "batch_size": "8", "epochs": "1", "warmup_epochs": "0", "num_workers": "0", "mixup": "0",
         "cutmix": "0", "reprob": "0", "aa": "none", "color_jitter": "0", "hang_timeout": "60",
         "index_cache": "{cache}"}
EVAL = {"eval": "true", "data_path": "{data}", "device": "cpu", "input_size": "32", "batch_size": "8",
        "num_workers": "0", "hang_timeout": "60", "index_cache": "{cache}"}


class Place:
    """One row's own folder, with the places its command line may name: `{data}`, `{run}`, `{cache}`,
    `{here}`."""

    def __init__(self, here: Path, trained: Path | None = None):
        self.here, self.trained = here, trained
        self.data, self.run, self.cache = here / "data", here / "run", here / "cache"

    def fill(self, text: str) -> str:
        """`text` with the places in it."""
        return text.format(here=self.here, data=self.data, run=self.run, cache=self.cache,
                           trained=self.trained)

    def images(self, train: int = 8, val: int = 4, classes: Sequence[str] = ("cat", "dog")) -> Path:
        """data/train/… and data/val/… with so many JPEGs per class."""
        for part, count in (("train", train), ("val", val)):
            for name in classes:
                fill_folder(self.data / part / name, count)
        return self.data

    def trained_run(self) -> Path:
        """A copy of a finished run of one epoch in run/."""
        shutil.copytree(self.trained, self.run)
        return self.run


@dataclass(frozen=True)
class Row:
    """One fault: the command `argv` (added to the defaults of `base`) and how it ends.

    `end` is the code of the UserError that ends it with exit code 2, or another exit code. `names` all stand
    in what a person reads (for a UserError in its one sentence): flags, paths, values, the fix; `absent` must
    not. `prepare(place)` makes the fault; `after(place)` looks at what is left.
    """
    name: str
    argv: str
    end: str | int
    names: tuple[str, ...] = ()
    prepare: Callable[[Place], object] | None = None
    after: Callable[[Place], object] | None = None
    base: str = "train"
    absent: tuple[str, ...] = ()


def table(*rows: Row):
    """Parametrize a test with rows, named by them."""
    return pytest.mark.parametrize("row", rows, ids=[re.sub(r"\W+", "_", row.name) for row in rows])


def command(base: dict[str, str] | str, argv: str, place: Place) -> list[str]:
    """The command line: defaults of `base`, overridden by the row's flags."""
    base = {"train": TRAIN, "eval": EVAL}.get(base, base) if isinstance(base, str) else base
    given = [place.fill(word) for word in argv.split()]
    kept = {name: value for name, value in base.items() if f"--{name}" not in given}
    return [word for name, value in kept.items() for word in (f"--{name}", place.fill(value))] + given


def start(argv: Sequence[str], capture) -> tuple[int, str]:
    """`main.main(argv)`: its exit code and everything a person reads, standard error and output together."""
    capture.readouterr()
    code = int(main.main(list(argv)))
    out, err = capture.readouterr()
    return code, err + out


def check(row: Row, place: Place, capture) -> str:
    """Run a row and compare; returns the text."""
    if row.prepare is not None:
        row.prepare(place)
    with patch.object(logger, "error", wraps=logger.error) as logged:
        code, text = start(command(row.base, row.argv, place), capture)
    assert code == (2 if isinstance(row.end, str) else row.end), text
    read = text
    if code == 2:
        # One sentence, and it is the last thing on the screen.
        read = text[text.index("error: "):].removeprefix("error: ").rstrip()
        error = logged.call_args.args[-1]
        assert len(read.splitlines()) == 1 and (str(error), error.code) == (read, row.end), text
    for words in row.names:
        assert place.fill(words) in read, f"{words!r} is not in:\n{text}"
    for words in ("Traceback", *row.absent):
        assert words not in text, text
    if row.after is not None:
        row.after(place)
    return text


def at_the_end_of_epoch(monkeypatch, number: int, do: Callable[[], object]) -> None:
    """`do()` just before the files of epoch `number` are written."""
    real = Tracker.end_epoch

    def end_epoch(self, progress, *rest, **named):
        if progress.epoch == number:
            do()
        return real(self, progress, *rest, **named)
    monkeypatch.setattr(Tracker, "end_epoch", end_epoch)
