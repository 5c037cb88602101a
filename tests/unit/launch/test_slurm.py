"""What a task of a job decides from the end of main.py: once for all tasks, and in the ledger of the run."""
import dataclasses
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
from submitit.slurm.slurm import SlurmJobEnvironment

from common.ledger import Ledger
from common.outcome import ExitCode, Outcome
from launch import slurm, stop
from launch.slurm import Job, Task
from tests.kits.processes import environment


@pytest.fixture(autouse=True)
def job_7(monkeypatch):
    """The variables of job 7, and none of another launcher."""
    monkeypatch.setattr(slurm, "squeue", lambda job, what: "RUNNING")
    monkeypatch.setattr(slurm, "HOLD", 0)
    job = dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_RESTART_COUNT="0")
    with patch.dict(os.environ, environment(**job), clear=True):
        yield


class _Environment:
    """What a task asks submitit for, as rank `rank` of a job in its `restart`-th repetition."""

    job_id, num_tasks = "7", 2

    def __init__(self, rank: int, requeues: list[int], restart: int = 0):
        self.global_rank, self._requeue = rank, lambda count: requeues.append(rank)
        os.environ["SLURM_RESTART_COUNT"] = str(restart)


def job(folder: Path, output_dir: Path | None = None) -> Job:
    return Job([], str(folder), str(folder), str(folder), str(output_dir or folder), max_requeue=3)


def run_of(folder: Path, outcome: Outcome | None = None, **more) -> Ledger:
    """The ledger as main.py leaves it in `folder`."""
    ledger = Ledger(folder)
    ledger.begin(update=0)
    if outcome is not None:
        ledger.end(outcome, **{"update": 41, **more})
    return ledger


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_one_task_decides_for_all_when_a_rank_fails_while_another_is_told_to_stop(tmp_path, order):
    """Slurm tells the ranks to stop because one of them has requeued the job: that is no second requeue."""
    requeues: list[int] = []
    ledger = run_of(tmp_path, Outcome.FAILED, rank=1)
    tasks = [Task(job(tmp_path), _Environment(rank, requeues)) for rank in (0, 1)]
    for rank in order:
        tasks[rank].after((ExitCode.PAUSED, ExitCode.FAILED)[rank])
    assert requeues == [order[0]] and ledger.newest()["requeued"] is True and len(ledger.attempts()) == 1


CAPPED = [("PAUSED", update) for update in range(4)]


@pytest.mark.parametrize("ends, codes, requeued, reason", [
    ([("FAILED", 41), ("FAILED", 50), ("FAILED", 50)], (1, 1, 1), [True, True, False], "twice at update 50: no memory"),
    (CAPPED, (75, 75, 75, 75), [True, True, True, False], "--max_requeue 3"),
    ([("FAILED", -1)], (2,), [False], "no memory"),  # a mistake in the command line
    # What an earlier attempt accepted may pass: a GPU that is missing, a folder that is mounted late.
    ([("PAUSED", 41), ("FAILED", 41), ("DONE", 90)], (75, 2, 0), [True, True, None], ""),
    ([("PAUSED", 41), ("FAILED", 41), ("FAILED", 41)], (75, 2, 2), [True, True, False], "twice at update 41")])
def test_when_a_job_is_requeued(tmp_path, ends, codes, requeued, reason):
    requeues: list[int] = []
    for restart, ((end, update), code) in enumerate(zip(ends, codes)):
        task = Task(job(tmp_path), _Environment(0, requeues, restart))
        ledger = run_of(tmp_path, Outcome(end), update=update, cause="no memory", **({"rank": 0} if code in (1, 2) else {}))
        if code:
            task.after(code)
    assert [a.get("requeued") for a in ledger.attempts()] == requeued and len(requeues) == requeued.count(True)
    assert reason in ledger.newest().get("reason", "")
    if ends is CAPPED:  # by the option alone, not by submitit's own limit
        far = dataclasses.replace(job(tmp_path), max_requeue=200)
        assert Task(far, _Environment(0, [], 150)).after(ExitCode.PAUSED) == 75 and ledger.newest()["requeued"]


@pytest.mark.parametrize("squeue, scontrol, signals, asked, requeued", [
    # A busy or restarting slurmctld must not cost a preempted job its requeue.
    ("exit 1", "[ $(wc -l < asked) -gt 2 ]", (), 3, True),
    ("exit 1", "exit 1", (), 4, False),
    ("[ -e asked ] && echo PENDING || echo RUNNING", "exit 1", (), 1, True),  # heard, although it failed
    (None, None, (), 0, False),  # no scontrol
    (None, None, (signal.SIGUSR2, signal.SIGCONT), 0, True)])  # but preempted: Slurm requeues it by itself
def test_a_requeue_is_asked_for_until_it_is_heard(tmp_path, monkeypatch, squeue, scontrol, signals, asked, requeued):
    for name, line in (("squeue", squeue), ("scontrol", f"echo $* >> asked\n{scontrol}")):
        if squeue is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{line}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}" if squeue is not None else str(tmp_path))
    monkeypatch.setattr(slurm, "PAUSE", 0)
    monkeypatch.setattr(slurm, "squeue", stop.squeue)
    ledger = run_of(tmp_path, Outcome.PAUSED, cause="SIGUSR2")
    task = Task(job(tmp_path), SlurmJobEnvironment())
    task.signals |= dict.fromkeys(signals, 1.0)
    task.after(ExitCode.PAUSED)
    assert ledger.newest()["requeued"] is requeued
    assert asked == ((tmp_path / "asked").read_text().count("requeue 7\n") if asked else 0)


@pytest.mark.parametrize("left, worked, end", [(20, (1, 1), "FAILED"), (20, (9000, 1), "PAUSED"), (3600, (1, 1), "PAUSED")])
def test_a_time_limit_that_leaves_no_time_to_train_ends_the_job(tmp_path, monkeypatch, left, worked, end):
    """Not a preemption, which may come early twice; and not where one of two attempts was worth its start."""
    monkeypatch.setattr(slurm, "job_end_time", lambda env: time.time() + left)
    for restart, seconds in enumerate(worked):
        task = Task(job(tmp_path), _Environment(0, [], restart))
        task.began -= 5  # seconds of start-up
        ledger = run_of(tmp_path, Outcome.PAUSED, update=restart, cause="SIGUSR2")
        ledger.note(ended=str(datetime.now(UTC) + timedelta(seconds=seconds)))
        code = task.after(ExitCode.PAUSED)
    newest = ledger.newest()
    assert (newest["state"], newest["requeued"], code) == (end, end == "PAUSED", 1 if end == "FAILED" else 75)
    assert ledger.read("status.json")["state"] == end and ("--timeout" in newest["cause"]) == (end == "FAILED")


@pytest.mark.parametrize("code, cause", [(-signal.SIGKILL, "rank 1 was killed by SIGKILL (out of memory?)"),
                                         (-signal.SIGABRT, "rank 0 is gone"), (1, "rank 0 is gone")])
def test_a_killed_rank_is_named_with_the_update_that_its_peers_recorded(tmp_path, code, cause):
    task = Task(job(tmp_path), _Environment(1, []))
    run_of(tmp_path, Outcome.FAILED, rank=0, cause="rank 0 is gone")
    task.after(code)
    newest = Ledger(tmp_path).newest()
    assert (newest["state"], newest["update"], newest["cause"]) == ("FAILED", 41, cause)


def test_what_main_could_not_record_the_task_does(tmp_path, monkeypatch):
    """The sentence of a mistake before an attempt began stands in the log alone, and what happens to an
    evaluation of a finished run is no part of that run; who was killed left its last progress."""
    run, folder = tmp_path / "run", tmp_path / "job"
    run.mkdir()
    folder.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    trained = run_of(run, Outcome.DONE)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (folder / "7_0_log.err").write_text("train: 8 images\nerror: --data_path /nowhere has no train folder\n")
    Task(job(folder, run), _Environment(0, [])).after(ExitCode.USAGE)
    assert trained.read("status.json")["state"] == "DONE" and len(trained.attempts()) == 1
    status = Ledger(folder).read("status.json")
    assert (status["state"], status["rank"]) == ("FAILED", 0) and "--data_path" in status["cause"]
    task = Task(job(run), _Environment(0, [], 1))
    run_of(run).progress(pid=os.getpid(), update=36, phase="backward")
    task.environment.num_tasks = 1
    task.after(-signal.SIGKILL)
    status = trained.read("status.json")
    assert (status["state"], status["update"], status["rank"]) == ("FAILED", 36, 0) and "SIGKILL" in status["cause"]
    monkeypatch.setattr(slurm, "HOLD", 60)
    began = time.monotonic()
    assert Task(job(folder, run), _Environment(1, [])).after(ExitCode.FAILED) == 1  # it knows what was decided
    assert time.monotonic() - began < 30


def test_a_signal_before_main_handles_any_loses_nothing(tmp_path):
    (tmp_path / "main.py").write_text("import time; time.sleep(60)")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    try:
        assert Task(job(tmp_path), _Environment(0, [])).run_main() == ExitCode.PAUSED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_job_that_cannot_record_it_is_requeued_all_the_same(tmp_path):
    requeues: list[int] = []
    for rank in (1, 0):
        Task(job(tmp_path / "gone"), _Environment(rank, requeues)).after(ExitCode.FAILED)
    assert requeues == [0]
