"""A real run of two processes, one of which is killed or fails: the other ends, and says why last. So it is
when a loader worker is killed."""
import multiprocessing
import os
import signal
import time
from datetime import datetime

import pytest

from common.ledger import Ledger
from tests.kits.faults import Row, at_the_end_of_epoch, check
from tests.kits.processes import assert_gone, codes, descendants, wait_for
from tests.kits.runs import UPDATES, arguments, now, start

AGAIN = UPDATES + 2
SLOW = [("forward", AGAIN, 0), ("evaluation", UPDATES, 0), ("evaluation", UPDATES, 1), ("saving", UPDATES, 0),
        ("saving", UPDATES, 1)]


def disturbed(images, tmp_path, what: str, phase: str, update: int, rank: int, **changes):
    argv = arguments(images, tmp_path / "run", update_freq=1, num_workers=1, **changes)
    at = dict(rank=rank, phase=phase, update=update, do=what)
    return start(argv, tmp_path / "console", 2, at=[at], now=str(tmp_path))


def test_a_failure_ends_all_ranks_and_every_record_names_it(images, tmp_path):
    """Also where the watchdog for hangs is switched off."""
    ranks = disturbed(images, tmp_path, "raise", "evaluation", UPDATES, 1, hang_timeout=0)
    assert codes(ranks) == [1, 1]
    other, own = (rank.text().strip().splitlines()[-1] for rank in ranks)
    assert own.endswith("ArithmeticError: one divided by nothing")
    assert all(words in other for words in ("rank 0", "rank 1", "ArithmeticError: one divided by nothing"))
    for found in (Ledger(tmp_path / "run").newest(), Ledger(tmp_path / "run").read("status.json")):
        assert (found["state"], found["rank"], found["phase"], found["update"]) == ("FAILED", 1, "evaluation", UPDATES)
        assert "ArithmeticError" in found["cause"]


@pytest.mark.parametrize("phase, update, rank", [
    ("backward", AGAIN, 1), ("data", AGAIN, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_killed_rank_ends_the_other_which_names_it(images, tmp_path, phase, update, rank):
    ranks = disturbed(images, tmp_path, "SIGKILL", phase, update, rank)
    wait_for(lambda: now(tmp_path, rank)[:2] == (phase, update), 120)
    killed, began = time.time(), time.monotonic()
    workers = [pid for each in ranks for pid in descendants(each.pid)]
    survivor = ranks[1 - rank]
    assert survivor.end(60) == 1 and ranks[rank].end(1) == -signal.SIGKILL
    assert time.monotonic() - began < 30
    assert_gone(workers)
    # A rank that is killed while the others have no need of it is missed by them when they next do.
    assert f"rank {rank} (" in survivor.text().strip().splitlines()[-1], survivor.text()
    cause = Ledger(tmp_path / "run").newest()
    # Noticed within 10 s; it is written down when the others have had 8 s to name a cause of their own.
    ended = datetime.strptime(cause["ended"], "%Y-%m-%d %H:%M:%S%z").timestamp()
    assert cause["rank"] == rank and f"rank {rank} (" in cause["cause"] and ended - killed < 18


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def test_a_killed_loader_worker_is_one_sentence(place, capfd, monkeypatch):
    at_the_end_of_epoch(monkeypatch, 0, kill_workers)
    check(Row("killed", "--epochs 2 --num_workers 1", 1, ("--num_workers",)), place, capfd)
    assert Ledger(place.run).read("status.json")["state"] == "FAILED"
    monkeypatch.undo()
    check(Row("resumed", "--epochs 2 --num_workers 1", 0), place, capfd)
    wait_for(lambda: not multiprocessing.active_children(), 10)
