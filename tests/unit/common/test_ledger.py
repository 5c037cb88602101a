"""The ledger of attempts: what it keeps, who may write over whom, and that no disk stops a run."""
import json
import os

import pytest

from common.ledger import RUNNING, Ledger
from common.outcome import Outcome


def test_the_records_tell_how_it_ended(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.status() == {} and ledger.attempts() == [] and ledger.newest() == {}
    ledger.begin(update=0, epoch=0, resume="a.pth")
    assert ledger.status()["state"] == RUNNING
    ledger.end(Outcome.PAUSED, update=12, epoch=1, cause="SIGUSR2")
    again = Ledger(tmp_path)
    assert (again.status()["state"], again.status()["cause"]) == ("PAUSED", "SIGUSR2")
    again.begin(update=12, epoch=1)
    again.end(Outcome.DONE, update=30, epoch=2)
    assert [(a["attempt"], a["state"], a["from_update"], a["update"]) for a in again.attempts()] == [
        (1, "PAUSED", 0, 12), (2, "DONE", 12, 30)]


def test_what_earlier_versions_wrote_reads_as_paused(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "PREEMPTED", "update": 4}))
    (tmp_path / "attempts.jsonl").write_text('{"attempt": 1}\n{"attempt": 1, "state": "PREEMPTED"}\n')
    assert Ledger(tmp_path).status() == {"state": "PAUSED", "update": 4}
    assert [a["state"] for a in Ledger(tmp_path).attempts()] == ["PAUSED"]


def test_an_attempt_without_an_end_was_killed(tmp_path):
    Ledger(tmp_path).begin(update=5)
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"attempt": 1, "state": "DO')
    Ledger(tmp_path).begin(update=7)
    attempts = Ledger(tmp_path).attempts()
    assert [(a["state"], a["from_update"]) for a in attempts] == [(RUNNING, 5), (RUNNING, 7)]


@pytest.mark.parametrize("order", ["run first", "watchdog first"])
def test_the_first_cause_stands_whoever_writes_first(tmp_path, order):
    run, watchdog = Ledger(tmp_path), Ledger(tmp_path)
    run.begin(update=0, epoch=3, pid=77)
    writers = [lambda: run.end(Outcome.FAILED, update=41, epoch=3, cause="RuntimeError: connection closed by "
                                                                         "peer"),
               lambda: watchdog.fail("rank 1 ran out of memory", pid=77, update=41, rank=1, node="gpu7")]
    for write in writers if order == "run first" else reversed(writers):
        write()
    Ledger(tmp_path).fail("rank 0 is gone, says one that was woken late", pid=77, update=9, rank=0)
    [attempt] = run.attempts()
    for found in (attempt, run.status()):
        assert (found["state"], found["cause"], found["rank"], found["update"]) == (
            "FAILED", "rank 1 ran out of memory", 1, 41)


def test_a_failure_before_the_attempt_began_is_one_of_its_own(tmp_path):
    Ledger(tmp_path).begin(update=0, pid=1)
    Ledger(tmp_path).end(Outcome.DONE, update=9)
    Ledger(tmp_path).fail("no memory for the model", pid=2, update=-1, rank=3)
    assert [(a["attempt"], a["state"]) for a in Ledger(tmp_path).attempts()][-1] == (2, "FAILED")


def test_a_note_belongs_to_the_newest_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "88")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    Ledger(tmp_path).begin(update=3)
    Ledger(tmp_path).note(requeued=True, reason="SIGUSR2")
    newest = Ledger(tmp_path).newest()
    assert newest.items() >= {"job": "88", "restarts": 2, "requeued": True, "state": RUNNING}.items()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "twice")
    Ledger(tmp_path).begin(update=3)
    assert Ledger(tmp_path).newest()["restarts"] == 0


@pytest.mark.parametrize("spoil", [
    lambda folder: folder.rmdir(),
    lambda folder: [(folder / name).mkdir() for name in ("attempts.jsonl", "status.json")],
    lambda folder: [(folder / name).write_text("[1]\n") for name in ("attempts.jsonl", "status.json")],
])
def test_records_that_cannot_be_kept_stop_nothing(tmp_path, spoil):
    folder = tmp_path / "run"
    folder.mkdir()
    spoil(folder)
    ledger = Ledger(folder)
    assert ledger.status() == {} and ledger.attempts() == []
    ledger.begin(update=0)
    ledger.end(Outcome.FAILED, update=1)
    ledger.fail("why", pid=1, update=1, rank=0)


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
