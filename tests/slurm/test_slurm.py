"""Jobs on a real Slurm: to the end, through preemption, failures and lost nodes, and two at once."""
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.ledger import Ledger
from launch import run_with_submitit
from tests.kits.processes import TOY, expected_value, wait_for, write_toy_program

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """submit(updates, faults, nodes=2, ngpus=2, …) -> (job id, folder of the job)."""
    monkeypatch.setattr(run_with_submitit, "ROOT", write_toy_program(tmp_path / "program"))
    monkeypatch.chdir(tmp_path)
    jobs = []

    def submit(updates: int, faults: str = "", nodes: int = 2, ngpus: int = 2, *more: str) -> tuple[str, Path]:
        known = set(Path("runs").glob("*/job.json"))
        assert run_with_submitit.main([
            "--cluster", "slurm", "--nodes", str(nodes), "--ngpus", str(ngpus), "--device", "cpu",
            "--cpus_per_task", "1", "--timeout", "0.5", *more, "--updates", str(updates), "--faults", faults]) == 0
        folder = (set(Path("runs").glob("*/job.json")) - known).pop().parent.absolute()
        jobs.append(folder.name)
        return folder.name, folder

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


def final_code(job: str) -> str:
    """The job's own exit code as Slurm knows it."""
    answer = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=60, check=True)
    return re.search(r"ExitCode=(\d+):", answer.stdout)[1]


def test_two_nodes_with_two_tasks_each_run_to_the_end(cluster, submit):
    job, folder = submit(20)
    assert cluster.wait(job) == "COMPLETED", said(folder)
    assert value(folder) == expected_value(20, 4)
    assert len(list((folder / "pids").iterdir())) == 4
    assert "state    COMPLETED" in run_with_submitit.status(folder)


def test_a_job_that_fails_twice_at_the_same_update_stops_with_the_cause(cluster, submit):
    job, folder = submit(20, "raise=1@7", 2, 1)
    assert cluster.wait(job) == "FAILED"
    assert attempts(folder) == [("FAILED", True), ("FAILED", False)]
    assert {(a["rank"], a["update"]) for a in Ledger(folder).attempts()} == {(1, 7)}
    assert final_code(job) == "1"
    status = run_with_submitit.status(folder)
    assert "ArithmeticError: one divided by nothing" in status and "attempt  2 of" in status
    assert f"{job}_1_log.err" in status


def test_a_users_mistake_is_not_tried_again(cluster, submit):
    job, folder = submit(20, "user_error=0@3", 2, 1)
    assert cluster.wait(job) == "FAILED"
    assert attempts(folder) == [("FAILED", None)] and final_code(job) == "2"
    assert "the value 7 is not accepted" in run_with_submitit.status(folder)


def test_survivors_of_a_lost_node_requeue_the_job(cluster, submit):
    job, folder = submit(100, "pace=0.05 hang_timeout=15", 2, 1)
    wait_for(lambda: (folder / "now").exists())
    try:
        cluster.control("node-kill", "127.0.0.12")
        wait_for(lambda: ("FAILED", True) in attempts(folder) or cluster.field(job, "%r") == "BeginTime")
    finally:
        cluster.control("node-up", "127.0.0.12")
    assert cluster.wait(job) == "COMPLETED", said(folder)
    assert value(folder) == expected_value(100, 2)


def test_a_cancelled_job_does_not_come_back(cluster, submit):
    job, folder = submit(10000, "", 2, 1)
    wait_for(lambda: (folder / "now").exists())
    subprocess.run(["scancel", job], check=True)
    assert cluster.wait(job) == "CANCELLED"
    assert not any(requeued for _, requeued in attempts(folder))


def test_a_suspended_job_continues_when_it_is_resumed(cluster, submit):
    """For three times the patience of the watchdog, which counts only the time in which the job ran."""
    job, folder = submit(300, "pace=0.05 hang_timeout=5", 2, 1)
    wait_for(lambda: (folder / "now").exists() and int((folder / "now").read_text() or 0) > 60)
    subprocess.run(["scontrol", "suspend", job], check=True)
    time.sleep(2)
    stood = (folder / "now").read_text()
    time.sleep(15)
    assert (folder / "now").read_text() == stood
    subprocess.run(["scontrol", "resume", job], check=True)
    assert cluster.wait(job) == "COMPLETED", said(folder)
    assert attempts(folder) == [("DONE", None)] and value(folder) == expected_value(300, 2)


def test_two_jobs_at_once_on_one_node(cluster, submit):
    jobs = [submit(40, "", 1, 2, "--slurm", "nodelist=127.0.0.11") for _ in range(2)]
    for job, folder in jobs:
        assert cluster.wait(job) == "COMPLETED", said(folder)
        assert value(folder) == expected_value(40, 2)


def test_srun_without_submitit_and_plain_python_inside_an_allocation(cluster, tmp_path):
    srun = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, TOY, tmp_path / "a", "10"]
    assert subprocess.run(srun, timeout=300).returncode == 0 and value(tmp_path / "a") == expected_value(10, 4)
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{sys.executable} {TOY} {tmp_path / 'b'} 10\n")
    batch = ["sbatch", "--wait", "-N2", "--ntasks-per-node=2", "-o", str(tmp_path / "log"), str(script)]
    assert subprocess.run(batch, timeout=300).returncode == 0, (tmp_path / "log").read_text()
    assert value(tmp_path / "b") == expected_value(10, 1)


def test_the_time_limit_of_a_job_is_known(cluster, tmp_path):
    code = "import os, time; from launch.stop import job_end_time; print(job_end_time(os.environ) - time.time())"
    srun = ["srun", "-n1", "--time=7", sys.executable, "-c", code]
    answer = subprocess.run(srun, capture_output=True, text=True, timeout=300)
    assert 300 < float(answer.stdout) <= 420, answer.stderr
