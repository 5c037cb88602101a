"""What a task of a job decides from the end of main.py: once for all tasks, and in the ledger of the run."""
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "squeue", lambda job, what: "RUNNING")
    monkeypatch.setattr(slurm, "HOLD", 0)


class _Environment:
    """What a task asks submitit for, as rank `rank` of a job in its `restart`-th repetition."""

    job_id, num_tasks = "7", 2

    def __init__(self, rank: int, requeues: list[int], restart: int = 0):
        self.global_rank, self._requeue = rank, lambda count: requeues.append(rank)
        os.environ["SLURM_RESTART_COUNT"] = str(restart)


def job(folder: Path, output_dir: Path | None = None) -> Job:
    return Job([], ".", ".", str(folder), str(output_dir or folder), max_requeue=3)


def run_of(folder: Path, outcome: Outcome | None = None, **more) -> Ledger:
    """The ledger as main.py leaves it in `folder`."""
    ledger = Ledger(folder)
    ledger.begin(update=0)
    if outcome is not None:
        ledger.end(outcome, **{"update": 41, **more})
    return ledger


@pytest.mark.parametrize("first", ["the failed rank", "the stopped rank"])
def test_one_task_decides_for_all_when_a_rank_fails_while_another_is_told_to_stop(tmp_path, first):
    """Slurm tells the ranks to stop because one of them has requeued the job: that is no second requeue."""
    requeues: list[int] = []
    ledger = run_of(tmp_path, Outcome.FAILED, rank=1)
    stopped, failed = (Task(job(tmp_path), _Environment(rank, requeues)) for rank in (0, 1))
    decisions = [lambda: failed.after(1), lambda: stopped.after(ExitCode.PAUSED)]
    for decide in decisions if first == "the failed rank" else reversed(decisions):
        decide()
    assert requeues == ([1] if first == "the failed rank" else [0])
    assert ledger.newest()["requeued"] is True and len(ledger.attempts()) == 1


def test_a_job_that_failed_twice_at_one_update_is_not_requeued(tmp_path):
    requeues: list[int] = []
    for restart, update in enumerate((41, 50, 50)):
        task = Task(job(tmp_path), _Environment(1, requeues, restart))
        ledger = run_of(tmp_path, Outcome.FAILED, rank=1, update=update, cause="out of memory")
        task.after(1)
    assert [a["requeued"] for a in ledger.attempts()] == [True, True, False] and len(requeues) == 2
    assert "update 50" in ledger.newest()["reason"] and "out of memory" in ledger.newest()["reason"]


def test_requeues_are_capped_per_job(tmp_path):
    for restart in range(4):
        task = Task(job(tmp_path), _Environment(0, [], restart))
        ledger = run_of(tmp_path, Outcome.PAUSED)
        task.after(ExitCode.PAUSED)
    assert [(a["restarts"], a["requeued"]) for a in ledger.attempts()] == [(0, True), (1, True), (2, True), (3, False)]
    assert "--max_requeue 3" in ledger.newest()["reason"]
    far = dataclasses.replace(job(tmp_path), max_requeue=200)
    assert Task(far, _Environment(0, [], 150)).after(ExitCode.PAUSED) == 75 and ledger.newest()["requeued"]


def test_a_job_that_began_no_attempt_is_recorded_in_its_own_folder(tmp_path, monkeypatch):
    """An evaluation of a finished run: what happens to the job is no part of that run."""
    run, folder = tmp_path / "run", tmp_path / "job"
    run.mkdir()
    folder.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    trained = run_of(run, Outcome.DONE)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    Task(job(folder, run), _Environment(0, [])).after(1)
    assert trained.status()["state"] == "DONE" and len(trained.attempts()) == 1
    assert (Ledger(folder).status()["state"], Ledger(folder).newest()["requeued"]) == ("FAILED", True)


@pytest.mark.parametrize("failures, requeued", [(2, True), (9, False)])
def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, monkeypatch, failures, requeued):
    """A busy or restarting slurmctld must not cost a preempted job its requeue."""
    newest = stop_under_slurm(tmp_path, monkeypatch, "exit 1", f"[ $(wc -l < {tmp_path}/asked) -gt {failures} ]")
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 7"] * min(failures + 1, 4)
    assert newest["requeued"] is requeued


def test_a_request_that_was_heard_although_it_failed_is_not_made_twice(tmp_path, monkeypatch):
    newest = stop_under_slurm(tmp_path, monkeypatch, f"[ -e {tmp_path}/asked ] && echo PENDING || echo RUNNING", "exit 1")
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 7"] and newest["requeued"]


def test_without_scontrol_the_saved_job_ends_at_once(tmp_path, monkeypatch):
    newest = stop_under_slurm(tmp_path, monkeypatch, None, None)
    assert newest["requeued"] is False and "scontrol" in newest["reason"]


def test_without_scontrol_a_preempted_job_waits_for_slurm_to_requeue_it(tmp_path, monkeypatch):
    newest = stop_under_slurm(tmp_path, monkeypatch, None, None, [signal.SIGUSR2, signal.SIGCONT])
    assert newest["requeued"] is True


def stop_under_slurm(tmp_path: Path, monkeypatch, squeue: str | None, scontrol: str | None,
                     signals: Sequence[int] = ()) -> dict:
    """A preempted task on a Slurm whose programs do as these shell lines say (None: there is none); requests
    are kept in `asked`. Returns what the ledger holds."""
    for name, line in (("squeue", squeue), ("scontrol", f"echo $* >> {tmp_path}/asked\n{scontrol}")):
        if squeue is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}" if squeue is not None else str(tmp_path))
    for name, value in dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "PAUSE", 0)
    monkeypatch.setattr(slurm, "squeue", stop.squeue)
    ledger = run_of(tmp_path, Outcome.PAUSED, cause="SIGUSR2")
    task = Task(job(tmp_path), SlurmJobEnvironment())
    task.signals |= dict.fromkeys(signals, 1.0)
    task.after(ExitCode.PAUSED)
    return ledger.newest()


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
    assert ledger.status()["state"] == end and ("--timeout" in newest["cause"]) == (end == "FAILED")


@pytest.mark.parametrize("code, cause", [(-signal.SIGKILL, "rank 1 was killed by SIGKILL (out of memory?)"),
                                         (-signal.SIGABRT, "rank 0 is gone"), (1, "rank 0 is gone")])
def test_a_killed_rank_is_named_with_the_update_that_its_peers_recorded(tmp_path, code, cause):
    task = Task(job(tmp_path), _Environment(1, []))
    run_of(tmp_path, Outcome.FAILED, rank=0, cause="rank 0 is gone")
    task.after(code)
    newest = Ledger(tmp_path).newest()
    assert (newest["state"], newest["update"], newest["cause"]) == ("FAILED", 41, cause)


def test_a_users_mistake_at_the_start_is_recorded_with_its_sentence(tmp_path):
    """Before main.py has begun an attempt: nothing but its log has the sentence."""
    (tmp_path / "7_0_log.err").write_text("train: 8 images\nerror: --data_path /nowhere has no train folder\n")
    requeues: list[int] = []
    Task(job(tmp_path), _Environment(0, requeues)).after(ExitCode.USAGE)
    status = Ledger(tmp_path).status()
    assert (status["state"], status["rank"], requeues) == ("FAILED", 0, []) and "--data_path" in status["cause"]


def test_a_killed_job_that_left_no_words_is_recorded_with_its_last_progress(tmp_path):
    task = Task(job(tmp_path), _Environment(0, []))
    run_of(tmp_path).progress(pid=os.getpid(), update=36, phase="backward")
    task.environment.num_tasks = 1
    task.after(-signal.SIGKILL)
    status = Ledger(tmp_path).status()
    assert (status["state"], status["update"], status["rank"]) == ("FAILED", 36, 0) and "SIGKILL" in status["cause"]


def test_a_signal_before_main_handles_any_loses_nothing(tmp_path):
    (tmp_path / "main.py").write_text("import time; time.sleep(60)")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    try:
        task = Task(Job([], str(tmp_path), str(tmp_path), str(tmp_path), str(tmp_path), 3), _Environment(0, []))
        assert task.run_main() == ExitCode.PAUSED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_job_that_cannot_record_it_is_requeued_all_the_same(tmp_path):
    (tmp_path / "attempts.jsonl").symlink_to("gone/attempts.jsonl")
    requeues: list[int] = []
    Task(job(tmp_path), _Environment(0, requeues)).after(ExitCode.PAUSED)
    assert requeues == [0]


def test_rank_zero_decides_where_the_decision_cannot_be_written(tmp_path):
    nowhere = job(tmp_path / "gone")
    assert [Task(nowhere, _Environment(rank, []))._decides() for rank in (0, 1)] == [True, False]
