"""progress.json: how far a run is while it works, and how far it came once it has ended."""
import json
import os

import pytest

from common.ledger import Ledger
from common.outcome import Outcome


def progress(folder):
    found = json.loads((folder / "progress.json").read_text())
    return found["state"], found["update"], found["phase"]


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.PAUSED, Outcome.FAILED])
def test_progress_ends_with_the_last_update_and_the_state(tmp_path, outcome):
    ledger, mine = Ledger(tmp_path), os.getpid()
    ledger.progress(pid=mine, update=-1, phase="start", world_size=2)  # before the attempt has begun
    ledger.begin(update=0)
    ledger.progress(pid=mine, update=112, phase="backward", world_size=2)
    assert progress(tmp_path) == ("RUNNING", 112, "backward")
    ledger.end(outcome, update=132)
    Ledger(tmp_path).progress(pid=mine, update=112, phase="backward")  # the watchdog's thread, a moment late
    assert progress(tmp_path) == (outcome.value, 132, "ended")
    assert json.loads((tmp_path / "progress.json").read_text())["world_size"] == 2
    Ledger(tmp_path).progress(pid=mine + 1, update=-1, phase="start")  # the next attempt's
    assert progress(tmp_path) == ("RUNNING", -1, "start")


def test_a_damaged_progress_file_stops_nothing(tmp_path):
    (tmp_path / "progress.json").write_text("{")
    ledger = Ledger(tmp_path)
    ledger.begin(update=0)
    ledger.end(Outcome.DONE, update=1)
    assert ledger.status()["state"] == "DONE"
