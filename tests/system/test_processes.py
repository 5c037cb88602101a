"""Signals and dying processes, as far as one process shows them; several processes have tests of their
own."""
import json
import multiprocessing
import os
import signal

from common.outcome import Outcome
from run.log import Tracker
from tests.kits.faults import Row, check
from tests.kits.processes import wait_for


def after_epoch(monkeypatch, number: int, do) -> None:
    """`do()` when epoch `number` has been written down."""
    real = Tracker.end_epoch

    def end_epoch(self, progress, *rest, **named):
        line = real(self, progress, *rest, **named)
        if progress.epoch == number:
            do()
        return line
    monkeypatch.setattr(Tracker, "end_epoch", end_epoch)


def state(place) -> Outcome:
    return Outcome(json.loads((place.run / "status.json").read_text())["state"])


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def test_a_killed_loader_worker_is_one_sentence(place, capfd, monkeypatch):
    after_epoch(monkeypatch, 0, kill_workers)
    check(Row("killed", "--epochs 2 --num_workers 1", 1, ("--num_workers",)), place, capfd)
    assert state(place) is Outcome.FAILED
    monkeypatch.undo()
    check(Row("resumed", "--epochs 2 --num_workers 1", 0), place, capfd)
    wait_for(lambda: not multiprocessing.active_children(), 10)


def test_an_error_in_a_worker_is_the_same_sentence_as_without(place, capfd):
    for path in (place.data / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    check(Row("bad", "--num_workers 1", 1, ("{data}/train",)), place, capfd)
    (place.data / "val" / "cat" / "1.JPEG").write_bytes(b"")
    check(Row("bad in evaluation", "--num_workers 1 --resume {trained}/checkpoint-0.pth", "unreadable_image",
              ("{data}/val/cat/1.JPEG",), base="eval"), place, capfd)
