"""A real run of two processes that is asked to stop: one checkpoint, of the update under way, and nobody is
left."""
import os
import signal
import time

import pytest
import torch

from common.ledger import Ledger
from tests.kits.processes import assert_gone, codes, descendants, wait_for
from tests.kits.runs import UPDATES, arguments, now, start


@pytest.mark.parametrize("name, target", [
    ("SIGUSR2", "one"), ("SIGTERM", "all"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("SIGUSR1", "all"), ("SIGHUP", "one")])])
def test_a_signal_saves_and_ends_at_one_update(images, tmp_path, name, target):
    """"all" are the loader workers too, as a scheduler signals them."""
    folder = tmp_path / "run"
    argv = arguments(images, folder, epochs=1000, update_freq=1, num_workers=1, save_every_minutes=0)
    ranks = start(argv, tmp_path / "console", 2, now=str(tmp_path))
    wait_for(lambda: min(now(tmp_path, rank)[1] for rank in range(2)) > 8, 120)
    workers = [pid for rank in ranks for pid in descendants(rank.pid)]
    assert len(workers) >= 2
    began = time.monotonic()
    for pid in [ranks[1].pid] if target == "one" else [rank.pid for rank in ranks] + workers:
        os.kill(pid, getattr(signal, name))
    assert codes(ranks, 60) == [75, 75], ranks[0].text()
    assert time.monotonic() - began < 20
    assert_gone(workers + [rank.pid for rank in ranks])
    (last, update, _), (_, other, _) = now(tmp_path, 0), now(tmp_path, 1)
    assert update == other and last == "saving"
    [attempt], status = Ledger(folder).attempts(), Ledger(folder).read("status.json")
    assert (status["state"], status["update"], attempt["update"]) == ("PAUSED", update, update)
    newest = max(folder.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime)
    assert torch.load(newest, weights_only=True)["update"] == update


def test_a_signal_to_one_rank_ends_an_evaluation_on_all(images, tmp_path):
    """It is left at the next batch, saved, and made when the run goes on: not once it has gone through all
    images."""
    folder = tmp_path / "run"
    at = dict(rank=1, phase="evaluation", update=UPDATES, do="SIGUSR1")
    ranks = start(arguments(images, folder, update_freq=1), tmp_path / "console", 2, at=[at])
    assert codes(ranks, 60) == [75, 75], ranks[0].text()
    status = Ledger(folder).read("status.json")
    assert (status["state"], status["update"], status["epoch"]) == ("PAUSED", UPDATES, 0)
    assert status["cause"] in ("SIGUSR1", "another process was asked to stop")
    assert (folder / f"checkpoint-e0u{UPDATES}.pth").exists() and not (folder / "log.txt").read_text()
