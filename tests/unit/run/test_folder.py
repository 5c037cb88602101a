"""A run folder has one owner, who alone writes there."""
import fcntl
import os
import shutil
import signal
import subprocess
import time

import pytest

from common.errors import UserError
from common.ledger import Ledger
from common.outcome import Outcome
from run.folder import RunFolder
from tests.kits.processes import Child, environment, wait_for


def refused(path) -> UserError:
    with pytest.raises(UserError) as error:
        RunFolder(path).lock(wait=0.1)
    return error.value


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    yield made
    made.release()


def test_a_second_training_is_refused_with_the_owner_named(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert folder.lock() is None
    error = refused(folder.path)
    assert error.code == "folder_in_use" and f"pid {os.getpid()}" in str(error) and "job 77" in str(error)


def own_with_a_worker(path, worker) -> int:
    """Lock the folder and write down the worker's process id; both stay for a while."""
    RunFolder(path).lock()
    if pid := os.fork():
        worker.write_text(f"{pid}\n")
    time.sleep(30)
    os._exit(1)


def test_a_killed_owner_leaves_no_lock_though_its_workers_live_on(folder):
    worker = folder.path.with_name("worker")
    owner = Child(own_with_a_worker, (folder.path, worker), environment())
    wait_for(lambda: worker.exists() and worker.read_text().endswith("\n"))
    try:
        assert f"pid {owner.pid}" in str(refused(folder.path))
        shell = ["flock", "-n", folder.path / "owner.json", "true"]  # by which a script may tell
        assert subprocess.run(shell).returncode == 1
        owner.kill()
        assert subprocess.run(shell).returncode == 0
        assert f"pid {owner.pid}" in folder.lock() and folder.read("owner.json")["pid"] == os.getpid()
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("there, used", [(False, False), (True, False), (False, True)])
def test_a_start_that_was_refused_leaves_no_folder_but_what_was_there_or_has_been_used(folder, there, used):
    if there:
        folder.path.mkdir()
    folder.lock()
    if used:
        folder.begin(update=0, epoch=0)
    folder.release()
    assert folder.path.exists() == (there or used) and folder.read("owner.json") == {}


def test_a_folder_that_its_owner_removes_at_that_moment_is_made_again(folder, monkeypatch):
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(folder.path)  # the owner made nothing there, and gives it back
        real(descriptor, how)
    monkeypatch.setattr(fcntl, "flock", flock)
    folder.lock()
    assert folder.read("owner.json")["pid"] == os.getpid() and refused(folder.path).code == "folder_in_use"


@pytest.mark.parametrize("name", ["file/run", "/proc/run", "folder"])
def test_a_folder_that_cannot_be_used_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "owner.json").mkdir(parents=True)
    error = refused(tmp_path / name)
    assert error.code == "unusable_folder" and str(tmp_path / name) in str(error)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_taken_away_is_not_written_to(folder, replaced):
    path, other = folder.path, RunFolder(folder.path)
    folder.lock()
    folder.begin(update=0)
    assert folder.own() == path
    path.rename(path.with_name("elsewhere"))
    if replaced:
        other.lock()
        other.begin(update=0)
    folder.end(Outcome.FAILED, update=5)
    assert folder.own() != path and folder.read("status.json")["update"] == folder.newest()["update"] == 5
    assert path.exists() == replaced
    if replaced:
        # Nor by the ranks other than 0, which hold no lock.
        Ledger(path).fail("rank 1 is gone", pid=other.read("owner.json")["pid"] + 1, update=3, rank=1)
        assert len(other.attempts()) == 1 and other.read("status.json")["state"] == "RUNNING"
        other.release()
    else:  # it is back, as a disk may be
        path.with_name("elsewhere").rename(path)
        assert folder.own() == path


def test_a_requeued_job_does_not_begin_again_from_what_it_resumed(folder):
    folder.path.mkdir()
    RunFolder(folder.path).begin(update=0, resume="a.pth")
    assert folder.has_resumed("a.pth") and not folder.has_resumed("b.pth") and not folder.has_resumed("")
