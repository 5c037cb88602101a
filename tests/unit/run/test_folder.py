"""A run folder has one owner, tells how its run ended, and remembers its attempts."""
import json
import os
import signal
import threading
import time

import pytest

from common.errors import UserError
from run.folder import DONE, FAILED, PREEMPTED, RUNNING, RunFolder


def child(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def wait_for(path, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_training_is_refused_with_the_owner_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = RunFolder(tmp_path / "run")
    assert first.lock() is None
    with pytest.raises(UserError, match=f"in use by another training .*process {os.getpid()}, job 77"):
        RunFolder(tmp_path / "run").lock(wait=0.2)
    first.release()
    second = RunFolder(tmp_path / "run")
    assert second.lock() is None
    second.release()


def test_a_killed_owner_leaves_no_lock_though_its_workers_live_on(tmp_path):
    def train():
        folder = RunFolder(tmp_path)
        folder.lock()
        worker = child(lambda: time.sleep(30))
        (tmp_path / "worker").write_text(str(worker))
        os.rename(tmp_path / "worker", tmp_path / "ready")
        time.sleep(30)
    owner = child(train)
    wait_for(tmp_path / "ready")
    try:
        with pytest.raises(UserError, match=f"process {owner}"):
            RunFolder(tmp_path).lock(wait=0)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        folder = RunFolder(tmp_path)
        assert f"process {owner}" in folder.lock() and folder.owner()["pid"] == os.getpid()
        folder.release()
    finally:
        os.kill(int((tmp_path / "ready").read_text()), signal.SIGKILL)


def test_a_start_that_was_refused_leaves_no_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.release()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_there_or_has_been_used_stays(tmp_path):
    for name, prepare in (("empty", lambda path: path.mkdir()), ("used", lambda path: None)):
        folder = RunFolder(tmp_path / name)
        prepare(folder.path)
        folder.lock()
        if name == "used":
            folder.begin(update=0, epoch=0)
        folder.release()
        assert folder.path.exists() and folder.owner() == {}


def test_who_waits_for_a_folder_that_its_owner_removes_makes_it_anew(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.lock()
    waiting = threading.Thread(target=second.lock, kwargs={"wait": 30})
    waiting.start()
    time.sleep(0.3)
    first.release()
    waiting.join(30)
    assert second.owner()["pid"] == os.getpid()
    with pytest.raises(UserError, match="in use by another training"):
        RunFolder(tmp_path / "run").lock(wait=0)
    second.release()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(UserError, match="--output_dir .* cannot be used"):
            RunFolder(path).lock()


def test_the_records_tell_how_it_ended(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.status() == {} and folder.attempts() == []
    folder.begin(update=0, epoch=0, resume="a.pth")
    assert folder.status()["state"] == RUNNING and not folder.already_went_on_from("")
    folder.end(PREEMPTED, update=12, epoch=1, cause="SIGUSR2", checkpoint="checkpoint-e1u12.pth")
    again = RunFolder(tmp_path)
    assert again.status()["state"] == PREEMPTED and again.status()["cause"] == "SIGUSR2"
    again.begin(update=12, epoch=1)
    again.end(DONE, update=30, epoch=2)
    assert [(a["attempt"], a["state"], a["from_update"], a["update"]) for a in again.attempts()] == [
        (1, PREEMPTED, 0, 12), (2, DONE, 12, 30)]
    assert again.already_went_on_from("a.pth") and not again.already_went_on_from("b.pth")


def test_an_attempt_without_an_end_was_killed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin(update=5, epoch=0)
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"attempt": 1, "state": "DO')
    again = RunFolder(tmp_path)
    again.begin(update=7, epoch=0)
    assert [(a["state"], a["from_update"]) for a in again.attempts()] == [(RUNNING, 5), (RUNNING, 7)]


def test_failing_twice_at_one_update_stops_the_requeueing(tmp_path):
    def attempt(update, state=FAILED):
        folder = RunFolder(tmp_path)
        folder.begin(update=0, epoch=0, automatic=True)
        reason = folder.reason_to_stop()
        folder.end(state, update=update, epoch=0, cause="CUDA out of memory")
        return reason
    assert attempt(40) is None and attempt(50) is None and attempt(50) is None
    assert "failed twice at update 50" in RunFolder(tmp_path).reason_to_stop()
    assert "CUDA out of memory" in attempt(60, PREEMPTED)
    assert RunFolder(tmp_path).reason_to_stop() is None
    assert "requeued 4 times" in RunFolder(tmp_path).reason_to_stop(max_attempts=4)


def test_killed_attempts_are_no_repeated_failure(tmp_path):
    for _ in range(3):
        folder = RunFolder(tmp_path)
        folder.begin(update=3, epoch=0, automatic=True)
    assert folder.reason_to_stop() is None


def test_records_that_cannot_be_written_stop_nothing(tmp_path, caplog):
    folder = RunFolder(tmp_path / "gone")
    folder.begin(update=0, epoch=0)
    folder.end(FAILED, update=1, epoch=0)
    assert folder.status() == {} and folder.attempts() == []
    (tmp_path / "status.json").write_text(json.dumps([1]))
    assert RunFolder(tmp_path).status() == {}
