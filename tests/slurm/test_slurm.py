"""Jobs on a real Slurm: to the end, through preemption, failures and lost nodes, and several at once."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.ledger import Ledger
from launch import run_with_submitit
from tests.kits.processes import TOY, at_update, expected, wait_for, write_toy_program

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
JOB = ["--nodes", "2", "--ngpus", "1", "--device", "cpu", "--cpus_per_task", "1", "--timeout", "0.5"]


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """submit(updates, faults, *options) -> (job id, folder of the job): a task on each of two nodes."""
    monkeypatch.setattr(run_with_submitit, "ROOT", write_toy_program(tmp_path / "program"))
    monkeypatch.chdir(tmp_path)
    jobs = []

    def submit(updates: int, faults: str = "", *more: str) -> tuple[str, Path]:
        known = {path.read_text() for path in Path("runs").glob("*/job.json")}
        assert run_with_submitit.main([*JOB, *more, "--updates", str(updates), "--faults", faults]) == 0
        [made] = [path for path in Path("runs").glob("*/job.json") if path.read_text() not in known]
        jobs.append(json.loads(made.read_text())["id"])
        return jobs[-1], made.parent.absolute()

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job], check=False)
        cluster.wait(job)


def attempts(folder: Path) -> list[tuple]:
    """(state, requeued) of each attempt."""
    return [(a["state"], a.get("requeued")) for a in Ledger(folder).attempts()]


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*_log.err")))


def value(folder: Path) -> float:
    return json.loads((folder / "state.json").read_text())["value"]


def assert_ended(cluster, job: str, folder: Path, state: str, code: int, ended: list[tuple], *words: str) -> None:
    """How the job ended for Slurm, with its own exit code, and in its ledger, and what `status` says of it."""
    assert cluster.wait(job) == state, said(folder)
    assert attempts(folder) == ended and cluster.exit_code(job) == code
    status = run_with_submitit.status(folder)
    assert all(word in status for word in (f"state    {state}", *words)), status
    assert "Traceback" not in said(folder) or "ArithmeticError" in said(folder)


def test_three_jobs_at_once_do_not_meet(cluster, submit):
    """One of them to its end, one that fails, and one that is a user's mistake, which is not tried again."""
    good, failing, mistaken = submit(200, "pace=0.05"), submit(20, "raise=1@7"), submit(20, "user_error=0@3")
    assert_ended(cluster, *mistaken, "FAILED", 2, [("FAILED", False)], "the value 7 is not accepted")
    assert_ended(cluster, *good, "COMPLETED", 0, [("DONE", None)])
    assert value(good[1]) == expected(200, 2)
    assert_ended(cluster, *failing, "FAILED", 1, [("FAILED", True), ("FAILED", False)], "attempt  2: FAILED",
                 "ArithmeticError: one divided by nothing", f"{failing[0]}_1_log.err")
    assert {(a["rank"], a["update"]) for a in Ledger(failing[1]).attempts()} == {(1, 7)}


def under_way(folder: Path, attempt: int) -> None:
    """Wait until this attempt has made some updates."""
    wait_for(lambda: len(attempts(folder)) == attempt)
    at_update(folder, Ledger(folder).newest()["from_update"] + 10)


def test_a_job_that_is_disturbed_again_and_again_has_the_same_result(cluster, submit):
    """A signal to its batch script, one to all its processes, a task killed, a node lost."""
    job, folder = submit(300, "pace=0.05 hang_timeout=15")
    for attempt, part in enumerate(("--batch", "--full"), 1):
        under_way(folder, attempt)
        subprocess.run(["scancel", part, "--signal=USR2", job], check=True)
    under_way(folder, 3)
    main = int((folder / "pids" / "1").read_text())
    os.kill(int(Path(f"/proc/{main}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    under_way(folder, 4)
    try:
        cluster.control("node-kill", "127.0.0.12")
        wait_for(lambda: ("FAILED", True) in attempts(folder)[3:] or cluster.field(job, "%r") == "BeginTime")
    finally:
        cluster.control("node-up", "127.0.0.12")
    assert cluster.wait(job) == "COMPLETED", said(folder)
    assert attempts(folder)[:2] == [("PAUSED", True)] * 2 and attempts(folder)[-1] == ("DONE", None)
    assert "limit" not in Ledger(folder).attempts()[2]["cause"] and attempts(folder)[2][1]
    assert value(folder) == expected(300, 2)


def test_a_time_limit_too_short_to_train_ends_the_job(cluster, submit, monkeypatch):
    """A minute, of which Slurm's signal may take all: it comes up to a minute early."""
    monkeypatch.setattr(run_with_submitit, "START_UP", 0)
    job = submit(100000, "", "--timeout", "0.0167")
    assert_ended(cluster, *job, "FAILED", 1, [("PAUSED", True), ("FAILED", False)], "failure  twice in a row")


@pytest.mark.parametrize("preempted", [False, True])
def test_without_scontrol_a_stopped_job_ends_saved_or_is_requeued_by_slurm(cluster, submit, monkeypatch, tmp_path,
                                                                           preempted):
    """Jobs find sbatch and srun on their PATH, and none of Slurm's other programs, as in a slim container."""
    (tmp_path / "slim").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "slim" / name).symlink_to(shutil.which(name))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "slim"))
        job, folder = submit(400, "pace=0.05")
    at_update(folder)
    urgent = ["sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    subprocess.run(urgent if preempted else ["scancel", "--signal=USR2", job], check=True, capture_output=True)
    if preempted:
        assert_ended(cluster, job, folder, "COMPLETED", 0, [("PAUSED", True), ("DONE", None)])
        assert value(folder) == expected(400, 2)
    else:
        assert cluster.wait(job, seconds=30) == "FAILED"
        assert_ended(cluster, job, folder, "FAILED", 75, [("PAUSED", False)], "PAUSED at update")
    assert "No scontrol on this node's PATH" in said(folder)


def test_a_killed_batch_script_is_one_attempt_that_was_saved(cluster, submit):
    job, folder = submit(10000)
    at_update(folder)
    [script] = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline")
                if f"job{job}/slurm_script".encode() in path.read_bytes()]
    os.kill(int(script), signal.SIGKILL)
    assert cluster.wait(job) == "FAILED"
    wait_for(lambda: attempts(folder)[-1][1] is not None)
    assert attempts(folder) == [("PAUSED", False)]
    status = run_with_submitit.status(folder.relative_to(Path.cwd()))
    assert "state    FAILED; the run: PAUSED" in status and status.count("attempt  1") == 1


def test_a_folder_has_one_job_until_that_is_cancelled(cluster, submit, capsys):
    """A job that waits says why; a cancelled one does not come back, and the next one there resumes it."""
    one = ("--job_dir", "runs/one")
    job, folder = submit(100, "pace=0.05", *one, "--slurm", "hold")
    assert "state    PENDING (JobHeldUser)\n" in run_with_submitit.status(folder)
    assert run_with_submitit.main([*JOB, *one]) == 2 and f"job {job}" in capsys.readouterr().err
    subprocess.run(["scontrol", "release", job], check=True)
    at_update(folder)
    subprocess.run(["scancel", job], check=True)
    assert cluster.wait(job) == "CANCELLED" and not any(requeued for _, requeued in attempts(folder))
    again, same = submit(100, "pace=0.05", *one)
    assert cluster.wait(again) == "COMPLETED" and same == folder and value(folder) == expected(100, 2), said(folder)


@pytest.mark.parametrize("flags, words", [(["--partition", "moon"], "invalid partition"), (["--slurm", "moon=1"], "moon"),
                                          (["--slurm", "nodelist=moon"], "node")])
def test_what_sbatch_refuses_is_one_sentence(submit, capsys, flags, words):
    assert run_with_submitit.main([*JOB, *flags]) == 2
    text = capsys.readouterr().err
    assert words in text.strip().splitlines()[-1] and "Traceback" not in text


def test_a_suspended_job_continues_when_it_is_resumed(cluster, submit):
    """For three times the patience of the watchdog, which counts only the time in which the job ran."""
    job, folder = submit(200, "pace=0.05 hang_timeout=5", "--ngpus", "2")
    at_update(folder, 60)
    subprocess.run(["scontrol", "suspend", job], check=True)
    time.sleep(2)
    stood = (folder / "now").read_text()
    time.sleep(15)
    assert (folder / "now").read_text() == stood
    subprocess.run(["scontrol", "resume", job], check=True)
    assert_ended(cluster, job, folder, "COMPLETED", 0, [("DONE", None)])
    assert value(folder) == expected(200, 4) and len(list((folder / "pids").iterdir())) == 4


def test_srun_without_submitit_and_plain_python_inside_an_allocation(cluster, tmp_path):
    srun = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, TOY, tmp_path / "a", "10"]
    assert subprocess.run(srun, timeout=300).returncode == 0 and value(tmp_path / "a") == expected(10, 4)
    limit = "import os, time; from launch.stop import job_end_time; print(job_end_time(os.environ) - time.time())"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{sys.executable} {TOY} {tmp_path / 'b'} 10\n{sys.executable} -c '{limit}'")
    batch = ["sbatch", "--wait", "-N2", "--ntasks-per-node=2", "--time=7", "-o", str(tmp_path / "log"), str(script)]
    assert subprocess.run(batch, timeout=300).returncode == 0 and value(tmp_path / "b") == expected(10, 1)
    assert 300 < float((tmp_path / "log").read_text().split()[-1]) <= 420
