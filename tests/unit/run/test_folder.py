"""A run folder has one owner, who alone writes there."""
import os
import signal
import subprocess
import threading
import time

import pytest

from common.errors import UserError
from common.ledger import Ledger
from common.outcome import Outcome
from run.folder import RunFolder
from tests.kits.processes import wait_for


def child(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def refused(path) -> UserError:
    with pytest.raises(UserError) as error:
        RunFolder(path).lock(wait=0.1)
    return error.value


def test_a_second_training_is_refused_with_the_owner_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = RunFolder(tmp_path / "run")
    assert first.lock() is None
    error = refused(tmp_path / "run")
    assert error.code == "folder_in_use" and f"pid {os.getpid()}" in str(error) and "job 77" in str(error)
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
    wait_for((tmp_path / "ready").exists)
    try:
        assert f"pid {owner}" in str(refused(tmp_path))
        shell = ["flock", "-n", tmp_path / "owner.json", "true"]  # by which a script may tell
        assert subprocess.run(shell).returncode == 1
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        assert subprocess.run(shell).returncode == 0
        folder = RunFolder(tmp_path)
        assert f"pid {owner}" in folder.lock() and folder.owner()["pid"] == os.getpid()
        folder.release()
    finally:
        os.kill(int((tmp_path / "ready").read_text()), signal.SIGKILL)


def test_a_start_that_was_refused_leaves_no_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("used", [False, True])
def test_a_folder_that_was_there_or_has_been_used_stays(tmp_path, used):
    folder = RunFolder(tmp_path / "run")
    if not used:
        folder.path.mkdir()
    folder.lock()
    if used:
        folder.begin(update=0, epoch=0)
    folder.release()
    assert folder.path.exists() and folder.owner() == {}


def test_who_waits_for_a_folder_that_its_owner_removes_makes_it_again(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.lock()
    waiting = threading.Thread(target=second.lock, kwargs={"wait": 30})
    waiting.start()
    time.sleep(0.3)
    first.release()
    waiting.join(30)
    assert second.owner()["pid"] == os.getpid()
    assert refused(tmp_path / "run").code == "folder_in_use"
    second.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["file", "file/run", "/proc/run", "folder"])
def test_a_folder_that_cannot_be_used_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "owner.json").mkdir(parents=True)
    error = refused(tmp_path / name)
    assert error.code == "unusable_folder" and str(tmp_path / name) in str(error)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_taken_away_is_not_written_to(tmp_path, replaced):
    folder, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    folder.lock()
    folder.begin(update=0)
    assert folder.own() == folder.path
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    if replaced:
        other.lock()
        other.begin(update=0)
    folder.end(Outcome.FAILED, update=5)
    assert folder.own() != folder.path and folder.status()["update"] == folder.newest()["update"] == 5
    assert (tmp_path / "run").exists() == replaced
    if replaced:
        assert len(other.attempts()) == 1 and other.status()["state"] == "RUNNING" and other.owner()
        other.release()
    else:  # it is back, as a disk may be
        os.rename(tmp_path / "elsewhere", tmp_path / "run")
        assert folder.own() == folder.path
    folder.release()


def test_a_failure_is_not_recorded_in_anothers_folder(tmp_path):
    """By the ranks other than 0, which hold no lock."""
    other = RunFolder(tmp_path)
    other.lock()
    other.begin(update=0)
    Ledger(tmp_path).fail("rank 1 is gone", pid=other.owner()["pid"] + 1, update=3, rank=1)
    assert other.status()["state"] == "RUNNING" and len(other.attempts()) == 1
    other.release()


def test_a_requeued_job_does_not_begin_again_from_what_it_resumed(tmp_path):
    RunFolder(tmp_path).begin(update=0, resume="a.pth")
    folder = RunFolder(tmp_path)
    assert folder.has_resumed("a.pth")
    assert not folder.has_resumed("b.pth") and not folder.has_resumed("")
