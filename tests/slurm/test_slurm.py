"""Jobs on a real Slurm: to the end, through preemption, failures and lost nodes, and two at once."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.ledger import Ledger
from launch import run_with_submitit
from tests.kits.processes import TOY, expected, wait_for, write_toy_program

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
            "--nodes", str(nodes), "--ngpus", str(ngpus), "--device", "cpu",
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
    assert value(folder) == expected(20, 4)
    assert len(list((folder / "pids").iterdir())) == 4
    assert "state    COMPLETED" in run_with_submitit.status(folder)


def test_a_job_that_fails_twice_at_the_same_update_stops_with_the_cause(cluster, submit):
    job, folder = submit(20, "raise=1@7", 2, 1)
    assert cluster.wait(job) == "FAILED"
    assert attempts(folder) == [("FAILED", True), ("FAILED", False)]
    assert {(a["rank"], a["update"]) for a in Ledger(folder).attempts()} == {(1, 7)}
    assert final_code(job) == "1"
    status = run_with_submitit.status(folder)
    assert "ArithmeticError: one divided by nothing" in status and "attempt  2: FAILED" in status
    assert f"{job}_1_log.err" in status


def test_a_users_mistake_is_not_tried_again(cluster, submit):
    job, folder = submit(20, "user_error=0@3", 2, 1)
    assert cluster.wait(job) == "FAILED"
    assert attempts(folder) == [("FAILED", False)] and final_code(job) == "2"
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
    assert value(folder) == expected(100, 2)


@pytest.mark.parametrize("part", ["--batch", "--full"])
def test_a_signal_to_the_batch_script_saves_and_requeues(cluster, submit, part):
    job, folder = submit(120, "pace=0.05", 2, 1)
    wait_for(lambda: (folder / "now").exists())
    subprocess.run(["scancel", part, "--signal=USR2", job], check=True)
    assert cluster.wait(job) == "COMPLETED", said(folder)
    assert attempts(folder) == [("PAUSED", True), ("DONE", None)] and value(folder) == expected(120, 2)


def test_a_time_limit_too_short_to_train_ends_the_job(cluster, submit, monkeypatch):
    """A minute, of which Slurm's signal may take all: it comes up to a minute early."""
    monkeypatch.setattr(run_with_submitit, "START_UP", 0)
    job, folder = submit(100000, "", 2, 1, "--timeout", "0.0167")
    assert cluster.wait(job) == "FAILED", said(folder)
    assert attempts(folder) == [("PAUSED", True), ("FAILED", False)] and final_code(job) == "1"
    assert "failure  twice in a row" in run_with_submitit.status(folder)


@pytest.fixture
def without_scontrol(monkeypatch, tmp_path):
    """Jobs find sbatch and srun on their PATH, and none of Slurm's other programs, as in a slim container."""
    (tmp_path / "slim").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "slim" / name).symlink_to(shutil.which(name))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "slim"))
        yield patch


def test_without_scontrol_a_stopped_job_ends_saved(cluster, submit, without_scontrol):
    job, folder = submit(10000, "", 2, 1)
    without_scontrol.undo()
    wait_for(lambda: (folder / "now").exists())
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    assert cluster.wait(job, seconds=30) == "FAILED"
    assert attempts(folder) == [("PAUSED", False)] and "No scontrol on this node's PATH" in said(folder)
    assert "Traceback" not in said(folder) and "PAUSED at update" in run_with_submitit.status(folder)


def test_without_scontrol_slurm_requeues_a_preempted_job(cluster, submit, without_scontrol):
    job, folder = submit(400, "pace=0.05", 2, 1)
    without_scontrol.undo()
    wait_for(lambda: (folder / "now").exists())
    urgent = ["sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    subprocess.run(urgent, check=True, capture_output=True)
    assert cluster.wait(job) == "COMPLETED", said(folder)
    assert attempts(folder) == [("PAUSED", True), ("DONE", None)] and value(folder) == expected(400, 2)


def test_a_killed_batch_script_is_one_attempt_that_was_saved(cluster, submit):
    job, folder = submit(10000, "", 2, 1)
    wait_for(lambda: (folder / "now").exists())
    [script] = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline")
                if f"job{job}/slurm_script".encode() in path.read_bytes()]
    os.kill(int(script), signal.SIGKILL)
    assert cluster.wait(job) == "FAILED"
    wait_for(lambda: attempts(folder)[-1][1] is not None)
    assert attempts(folder) == [("PAUSED", False)]
    status = run_with_submitit.status(folder.relative_to(Path.cwd()))
    assert "state    FAILED; the run: PAUSED" in status and status.count("attempt  1") == 1


def test_a_killed_task_is_saved_and_requeued_with_no_word_of_a_time_limit(cluster, submit):
    job, folder = submit(200, "pace=0.05", 2, 1)
    wait_for(lambda: (folder / "now").exists() and int((folder / "now").read_text() or 0) > 20)
    main = int((folder / "pids" / "1").read_text())
    task = int(Path(f"/proc/{main}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(task, signal.SIGKILL)
    assert cluster.wait(job) == "COMPLETED", said(folder)
    assert [requeued for _, requeued in attempts(folder)] == [True, None] and value(folder) == expected(200, 2)
    assert "limit" not in Ledger(folder).attempts()[0]["cause"]


def test_a_folder_has_one_job_and_a_queued_one_says_why_it_waits(cluster, submit, capsys):
    job, folder = submit(10, "", 2, 1, "--job_dir", "runs/%j", "--slurm", "hold")
    assert "state    PENDING (JobHeldUser)\n" in run_with_submitit.status(folder)
    subprocess.run(["cp", "-r", folder, "runs/one"], check=True)
    again = ["--ngpus", "1", "--cpus_per_task", "1", "--device", "cpu", "--job_dir", "runs/one"]
    assert run_with_submitit.main(again) == 2 and f"job {job}" in capsys.readouterr().err
    subprocess.run(["scancel", job], check=True)
    cluster.wait(job)
    assert run_with_submitit.main([*again, "--updates", "1"]) == 0
    cluster.wait(json.loads(Path("runs/one/job.json").read_text())["id"])


@pytest.mark.parametrize("flags, words", [(["--partition", "moon"], "invalid partition"), (["--slurm", "moon=1"], "moon"),
                                          (["--slurm", "nodelist=moon"], "node")])
def test_what_sbatch_refuses_is_one_sentence(cluster, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(run_with_submitit, "ROOT", write_toy_program(tmp_path / "program"))
    monkeypatch.chdir(tmp_path)
    assert run_with_submitit.main(["--ngpus", "1", "--cpus_per_task", "1", "--device", "cpu", *flags]) == 2
    text = capsys.readouterr().err
    assert words in text.strip().splitlines()[-1] and "Traceback" not in text


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
    assert attempts(folder) == [("DONE", None)] and value(folder) == expected(300, 2)


def test_two_jobs_at_once_on_one_node(cluster, submit):
    jobs = [submit(40, "", 1, 2, "--slurm", "nodelist=127.0.0.11") for _ in range(2)]
    for job, folder in jobs:
        assert cluster.wait(job) == "COMPLETED", said(folder)
        assert value(folder) == expected(40, 2)


def test_srun_without_submitit_and_plain_python_inside_an_allocation(cluster, tmp_path):
    srun = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, TOY, tmp_path / "a", "10"]
    assert subprocess.run(srun, timeout=300).returncode == 0 and value(tmp_path / "a") == expected(10, 4)
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{sys.executable} {TOY} {tmp_path / 'b'} 10\n")
    batch = ["sbatch", "--wait", "-N2", "--ntasks-per-node=2", "-o", str(tmp_path / "log"), str(script)]
    assert subprocess.run(batch, timeout=300).returncode == 0, (tmp_path / "log").read_text()
    assert value(tmp_path / "b") == expected(10, 1)


def test_the_time_limit_of_a_job_is_known(cluster, tmp_path):
    code = "import os, time; from launch.stop import job_end_time; print(job_end_time(os.environ) - time.time())"
    srun = ["srun", "-n1", "--time=7", sys.executable, "-c", code]
    answer = subprocess.run(srun, capture_output=True, text=True, timeout=300)
    assert 300 < float(answer.stdout) <= 420, answer.stderr
