"""Signals and dying processes, as far as one process shows them; several processes have tests of their own."""
import json
import multiprocessing
import os
import signal

import pytest

from run.log import Tracker
from tests.kits.faults import Row, check


def after_epoch(monkeypatch, number: int, do) -> None:
    """`do()` when epoch `number` has been written down."""
    real = Tracker.end_epoch

    def end_epoch(self, progress, *rest, **named):
        line = real(self, progress, *rest, **named)
        if progress.epoch == number:
            do()
        return line
    monkeypatch.setattr(Tracker, "end_epoch", end_epoch)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_stops_in_order_and_the_same_command_goes_on(name, place, capfd, monkeypatch):
    after_epoch(monkeypatch, 0, lambda: os.kill(os.getpid(), getattr(signal, name)))
    check(Row("stopped", "--epochs 2", 75,
        ("Stopped at update ", name, "the same command goes on from there")), place, capfd)
    assert json.loads((place.run / "status.json").read_text())["state"] == "PREEMPTED"
    monkeypatch.undo()
    check(Row("going on", "--epochs 2", 0, ("Going on at epoch 2, update ", "epoch 2/2 done")), place, capfd)
    assert [json.loads(line)["epoch"] for line in (place.run / "log.txt").read_text().splitlines()] == [0, 1]


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def test_a_killed_loader_worker_is_one_sentence(place, capfd, monkeypatch):
    after_epoch(monkeypatch, 0, kill_workers)
    check(Row("killed", "--epochs 2 --num_workers 1", 1, ("a loader process was killed", "memory", "--num_workers",
                                                         "goes on with the same command")), place, capfd)
    assert json.loads((place.run / "status.json").read_text())["state"] == "FAILED"
    monkeypatch.undo()
    check(Row("going on", "--epochs 2 --num_workers 1", 0, ("Going on at epoch 2, update 2",)), place, capfd)
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_is_the_same_sentence_as_without(place, capfd):
    for picture in (place.data / "train").rglob("*.JPEG"):
        picture.write_bytes(b"")
    check(Row("bad", "--num_workers 1", 2, ("images in a row are unreadable",)), place, capfd)
    check(Row("bad in evaluation", "--num_workers 1 --resume {trained}/checkpoint-0.pth", 2, ("cannot be read",),
              lambda place: (place.data / "val" / "cat" / "1.JPEG").write_bytes(b""), base="eval"), place, capfd)
