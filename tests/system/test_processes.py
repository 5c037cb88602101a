"""Dying and failing loader workers, as far as one process shows them; several processes have tests of their
own."""
import multiprocessing
import os
import signal

from common.ledger import Ledger
from tests.kits.faults import Row, at_the_end_of_epoch, check
from tests.kits.processes import wait_for


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def test_a_killed_loader_worker_is_one_sentence(place, capfd, monkeypatch):
    at_the_end_of_epoch(monkeypatch, 0, kill_workers)
    check(Row("killed", "--epochs 2 --num_workers 1", 1, ("--num_workers",)), place, capfd)
    assert Ledger(place.run).status()["state"] == "FAILED"
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
