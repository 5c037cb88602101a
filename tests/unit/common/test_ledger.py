"""The ledger of attempts: what it keeps, who may write over whom, and that no disk stops a run."""
import json
import os

import pytest

from common.ledger import RUNNING, Ledger
from common.outcome import Outcome


def test_each_attempt_is_recorded_with_its_end_and_a_killed_one_without(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "88")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    ledger = Ledger(tmp_path)
    ledger.begin(update=0, epoch=0, resume="a.pth")
    assert ledger.read("status.json")["state"] == RUNNING
    ledger.end(Outcome.PAUSED, update=12, epoch=1, cause="SIGUSR2")
    again = Ledger(tmp_path)
    again.note(requeued=True)
    assert again.newest().items() >= {"attempt": 1, "job": "88", "restarts": 2, "requeued": True, "state": "PAUSED"}.items()
    assert (again.read("status.json")["state"], again.read("status.json")["cause"]) == ("PAUSED", "SIGUSR2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "twice")
    again.begin(update=12, pid=1)
    assert again.newest()["restarts"] == 0
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"attempt": 2, "state": "DO')
    Ledger(tmp_path).fail("no memory for the model", pid=2, update=-1, rank=3)  # before its attempt has begun
    assert [(a["attempt"], a["state"], a["from_update"]) for a in again.attempts()] == [
        (1, "PAUSED", 0), (2, RUNNING, 12), (3, "FAILED", -1)]


def test_what_earlier_versions_wrote_reads_as_paused(tmp_path):
    (tmp_path / "attempts.jsonl").write_text('{"attempt": 1}\n{"attempt": 1, "state": "PREEMPTED"}\n')
    assert [a["state"] for a in Ledger(tmp_path).attempts()] == ["PAUSED"]


@pytest.mark.parametrize("first", ["run", "watchdog"])
def test_the_first_cause_stands_whoever_writes_first(tmp_path, first):
    run, watchdog = Ledger(tmp_path), Ledger(tmp_path)
    run.begin(update=0, epoch=3, pid=77)
    if first == "run":
        run.end(Outcome.FAILED, update=41, epoch=3, cause="RuntimeError: connection closed by peer")
    watchdog.fail("rank 1 ran out of memory", pid=77, update=41, rank=1, node="gpu7")
    if first == "watchdog":
        run.end(Outcome.FAILED, update=41, epoch=3, cause="RuntimeError: connection closed by peer")
    Ledger(tmp_path).fail("rank 0 is gone, says one that was woken late", pid=77, update=9, rank=0)
    [attempt] = run.attempts()
    for found in (attempt, run.read("status.json")):
        assert (found["state"], found["cause"], found["rank"], found["update"]) == (
            "FAILED", "rank 1 ran out of memory", 1, 41)


@pytest.mark.parametrize("spoil", ["missing", "folders", "[1]\n", "{"])
def test_records_that_cannot_be_kept_stop_nothing(tmp_path, spoil):
    for name in ("attempts.jsonl", "status.json", "progress.json"):
        if spoil == "folders":
            (tmp_path / name).mkdir()
        elif spoil != "missing":
            (tmp_path / name).write_text(spoil)
    ledger = Ledger(tmp_path / "gone" if spoil == "missing" else tmp_path)
    assert ledger.read("status.json") == {} and ledger.attempts() == []
    ledger.begin(update=0)
    ledger.end(Outcome.FAILED, update=1)
    ledger.fail("why", pid=1, update=1, rank=0)
    assert ledger.read("status.json").get("state") == ("FAILED" if spoil in ("[1]\n", "{") else None)


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.PAUSED, Outcome.FAILED])
def test_progress_ends_with_the_last_update_and_the_state(tmp_path, outcome):
    def progress():
        found = json.loads((tmp_path / "progress.json").read_text())
        return found["state"], found["update"], found["phase"], found["world_size"]

    ledger, mine = Ledger(tmp_path), os.getpid()
    ledger.progress(pid=mine, update=-1, phase="start", world_size=2)  # before the attempt has begun
    ledger.begin(update=0)
    ledger.progress(pid=mine, update=112, phase="backward")
    assert progress() == ("RUNNING", 112, "backward", 2)
    ledger.end(outcome, update=132)
    Ledger(tmp_path).progress(pid=mine, update=112, phase="backward")  # the watchdog's thread, a moment late
    assert progress() == (outcome.value, 132, "ended", 2)
    Ledger(tmp_path).progress(pid=mine + 1, update=-1, phase="start")  # the next attempt's
    assert progress() == ("RUNNING", -1, "start", 2)
