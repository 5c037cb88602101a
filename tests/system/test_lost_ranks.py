"""A real run of two processes, one of which is killed, stopped or fails: the other ends, and says why
last."""
import signal
import time
from datetime import datetime

import pytest

from common.ledger import Ledger
from tests.kits.processes import assert_gone, codes, descendants, wait_for
from tests.kits.runs import UPDATES, arguments, now, start

PHASES = {"data": UPDATES + 2, "forward": UPDATES + 2, "backward": UPDATES + 2, "evaluation": UPDATES,
          "saving": UPDATES}
BRIEF = [("backward", 1), ("data", 0)]


def test_a_failure_in_the_evaluation_is_recorded_with_that_phase(images, tmp_path):
    at = dict(rank=1, phase="evaluation", update=UPDATES, do="raise")
    argv = arguments(images, tmp_path / "run", update_freq=1)
    assert codes(start(argv, tmp_path / "console", 2, at=[at])) == [1, 1]
    for found in (Ledger(tmp_path / "run").newest(), Ledger(tmp_path / "run").status()):
        assert (found["state"], found["rank"], found["phase"], found["update"]) == ("FAILED", 1, "evaluation", UPDATES)
        assert "ArithmeticError" in found["cause"]


def disturbed(images, tmp_path, phase, rank, what, **changes):
    """Both ranks and the moment at which `rank` was disturbed, by its last heartbeat."""
    at = dict(rank=rank, phase=phase, update=PHASES[phase], do=what)
    argv = arguments(images, tmp_path / "run", update_freq=1, num_workers=1, **changes)
    ranks = start(argv, tmp_path / "console", 2, at=[at], now=str(tmp_path))
    wait_for(lambda: now(tmp_path, rank)[:2] == (phase, PHASES[phase]), 120)
    return ranks, time.monotonic()


@pytest.mark.parametrize("phase, rank", [
    *BRIEF,
    *(pytest.param(p, r, marks=pytest.mark.slow) for p in PHASES for r in (0, 1) if (p, r) not in BRIEF)])
def test_a_killed_rank_ends_the_other_which_names_it(images, tmp_path, phase, rank):
    ranks, began = disturbed(images, tmp_path, phase, rank, "SIGKILL")
    killed = time.time() - (time.monotonic() - began)
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
