"""The launcher: what it submits, where it refuses, and the same job through submitit's local executor."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from submitit.slurm.slurm import SlurmJobEnvironment

from launch import ExitCode, run_with_submitit
from launch import slurm as job_module
from launch.run_with_submitit import flag, main, snapshot, snapshot_folder, with_output_dir, without_flag
from launch.slurm import Job, Task
from tests.kits.processes import alive, environment, expected_value, wait_for, write_toy_program


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A toy program in place of the repository, tmp_path as the current folder, and no launcher's variables."""
    monkeypatch.setattr(run_with_submitit, "ROOT", write_toy_program(tmp_path / "program"))
    monkeypatch.chdir(tmp_path)
    clean = environment()
    for name in set(os.environ) - set(clean):
        monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, clean[name])
    return tmp_path


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Programs named sbatch and srun on the PATH, for what needs no cluster."""
    for name in ("sbatch", "srun"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def test_dry_run_prints_the_script_and_submits_nothing(program, fake_slurm, capsys):
    assert main(["--nodes", "4", "--ngpus", "8", "--timeout", "1.5", "--partition", "gpu", "--comment", "for a paper",
                 "--job_name", "tiny", "--slurm", "account=vision", "--slurm", "mem=0", "--use_volta32",
                 "--dry_run", "true", "--updates", "7"]) == 0
    out, err = capsys.readouterr()
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=90", "--partition=gpu",
                 "--job-name=tiny", "--comment='for a paper'", "--account=vision", "--mem=0", "--requeue",
                 "--signal=USR2@120", "--cpus-per-task=10"):
        assert f"#SBATCH {line}\n" in out
    assert "export SRUN_CPUS_PER_TASK" in out and "main.py --updates 7 --output_dir" in out
    assert "--use_volta32" in err and "has no effect" in err
    assert not (program / "runs").exists() or not list((program / "runs").rglob("*.pkl"))


def test_nothing_of_a_site_is_assumed(program, fake_slurm, capsys):
    assert main(["--dry_run", "true"]) == 0
    out, err = capsys.readouterr()
    assert "--cluster auto: slurm, because sbatch is on the PATH" in err
    for name in ("partition", "constraint", "account", "mem", "qos", "comment"):
        assert f"--{name}" not in out


def test_gpus_asked_for_in_the_sites_own_words_are_asked_for_once(program, fake_slurm, capsys):
    main(["--slurm", "gres=gpu:a100:8", "--dry_run", "true"])
    out = capsys.readouterr().out
    assert "--gres=gpu:a100:8" in out and "--gpus-per-node" not in out


def test_slurm_where_there_is_none_names_the_torchrun_line(program, no_slurm, capsys):
    assert main(["--cluster", "slurm", "--nodes", "2", "--ngpus", "4", "--updates", "3"]) == 2
    assert ("torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 --nproc_per_node=4 main.py "
            "--updates 3") in capsys.readouterr().err
    assert main(["--cluster", "slurm", "--ngpus", "4"]) == 2
    assert "torchrun --nnodes=1 --nproc_per_node=4 main.py" in capsys.readouterr().err


@pytest.mark.parametrize("argv, sentence", [
    (["--cluster", "local", "--nodes", "2"], "a local job has one node"),
    (["status", "nowhere"], "nowhere holds no job.json"),
    (["status"], "status takes one folder"),
    (["--cluster", "local", "--no_such_flag", "1"], "no_such_flag"),
    (["--nodes", "two"], "--nodes: invalid int value: 'two'"),
    (["--nodes", "0"], "--nodes 0: 1 or more is accepted"),
    (["--timeout", "nan"], "--timeout nan: hours above 0"),
    (["--max_requeue", "-1"], "--max_requeue -1: 0 or more is accepted"),
    (["--dry_run", "maybe"], "'maybe' is neither true nor false"),
    (["--cluster", "somewhere"], "choose from"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(program, argv, sentence, capsys):
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("typed, meant", [("partitoin", "partition"), ("job-dir", "job_dir"), ("node", "nodes"),
                                          ("cpu_per_task", "cpus_per_task"), ("batchsize", "batch_size"),
                                          ("updatefreq", "update_freq")])
def test_a_misspelt_flag_is_suggested_from_the_launchers_and_mains(typed, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--cluster", "local", "--config", "c.yaml", f"--{typed}", "1"]) == 2
    assert f"unknown flag --{typed}; did you mean --{meant}?" in capsys.readouterr().err


def test_the_code_of_a_job_lies_beside_its_folder():
    for folder, code in (("/a/runs/%j", "/a/runs/code"), ("/a/runs/hornet_%j", "/a/runs/code"),
                         ("/a/run", "/a/run/code"), ("/a/%j/logs", "/a/code")):
        assert str(snapshot_folder(folder).parent) == code


def test_the_program_starts_from_its_snapshot_alone(tmp_path):
    snapshot(tmp_path / "code", [])
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, str(tmp_path / "code" / "main.py"), "--print_config", "true"], cwd=tmp_path,
                           env=alone, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_flags_of_main_are_found_and_replaced(tmp_path):
    argv = ["--a", "1", "--output_dir=x", "--b"]
    assert flag(argv, "output_dir") == "x" and flag(argv, "a") == "1" and flag(argv, "c") is None
    assert without_flag(["--x", "1", "--y", "2"], "x") == ["--y", "2"]
    argv, folder = with_output_dir(["--output_dir", "rel/%j", "--a", "1"], "/job")
    assert folder == os.path.abspath("rel/%j") and argv == ["--a", "1", "--output_dir", folder]
    config = tmp_path / "c.yaml"
    config.write_text("output_dir: from_config\n")
    assert with_output_dir(["--config", str(config)], "/job")[1] == os.path.abspath("from_config")
    assert with_output_dir([], "/job")[1] == "/job"


def local(program: Path, *more: str) -> Path:
    assert main(["--cluster", "local", "--ngpus", "2", "--device", "cpu", *more]) == 0
    [folder] = {path.parent for path in (program / "runs").glob("*/job.json")}
    return folder.absolute()


def finished(folder: Path, seconds: float = 150) -> None:
    wait_for(lambda: not alive(int(folder.name)), seconds)
    assert not any(alive(int(pid.read_text())) for pid in (folder / "pids").iterdir())


def test_a_local_job_runs_the_snapshot_to_the_end(program):
    config = program / "mine.yaml"
    config.write_text("{}\n")
    folder = local(program, "--updates", "10", "--config", "mine.yaml")
    config.unlink()  # later changes don't reach the job
    (program / "program" / "main.py").write_text("raise SystemExit(9)")
    finished(folder)
    assert (folder / "DONE").exists(), (folder / f"{folder.name}_0_log.err").read_text()
    assert json.loads((folder / "state.json").read_text())["value"] == expected_value(10, 2)
    text = run_with_submitit.status(folder)
    assert "state    COMPLETED" in text and "attempt  1 of" in text
    job = json.loads((folder / "job.json").read_text())
    assert re.search(r"runs/code/\d{8}-\d{6}-\w{6}$", job["code"])
    assert not list(Path(job["code"]).rglob("__pycache__/*test*"))


@pytest.mark.slow
def test_a_local_job_is_requeued_after_a_signal_and_ends_as_if_undisturbed(program):
    folder = local(program, "--updates", "100", "--faults", "pace=0.05")
    wait_for(lambda: (folder / "now").exists())
    os.kill(int((folder / "pids" / "1").read_text()), signal.SIGUSR2)
    finished(folder)
    assert [json.loads(line)["what"] for line in (folder / "job.jsonl").read_text().splitlines()] == \
        ["started", "requeued", "started", "done"]
    assert json.loads((folder / "state.json").read_text())["value"] == expected_value(100, 2)


@pytest.mark.slow
def test_requeues_are_capped(program):
    folder = local(program, "--updates", "10000", "--faults", "pace=0.05", "--max_requeue", "0")
    wait_for(lambda: (folder / "now").exists())
    os.kill(int((folder / "pids" / "0").read_text()), signal.SIGUSR2)
    finished(folder)
    assert "--max_requeue" in (folder / "job.jsonl").read_text()


@pytest.mark.slow
def test_nothing_of_a_local_job_outlives_its_controller(program):
    folder = local(program, "--updates", "100000")
    wait_for(lambda: (folder / "now").exists())
    os.kill(int(folder.name), signal.SIGKILL)
    wait_for(lambda: not any(alive(int(pid.read_text())) for pid in (folder / "pids").iterdir()))


@pytest.mark.slow
def test_a_second_job_in_the_same_folder_has_its_own_attempts(program):
    ids = []
    for _ in range(2):
        assert main(["--cluster", "local", "--ngpus", "1", "--device", "cpu", "--job_dir", "again",
                     "--faults", "raise=0@3"]) == 0
        ids.append(json.loads((program / "again" / "job.json").read_text())["id"])
        wait_for(lambda: not alive(int(ids[-1])))
    records = [json.loads(line) for line in (program / "again" / "job.jsonl").read_text().splitlines()]
    for job in ids:
        assert [r["what"] for r in records if r["job"] == job] == \
            ["started", "failed", "requeued", "started", "failed", "not requeued"]
    assert "attempt  2 of" in run_with_submitit.status(program / "again")


def whats(folder: Path) -> list[str]:
    return [json.loads(line)["what"] for line in (folder / "job.jsonl").read_text().splitlines()]


class _Environment:
    """What a task asks submitit for, as rank `rank` of a local job."""

    cluster, job_id, num_tasks = "local", "7", 2

    def __init__(self, rank: int, requeues: list[int]):
        self.global_rank, self._requeue = rank, lambda count: requeues.append(rank)


@pytest.mark.parametrize("first", ["the failed rank", "the stopped rank"])
def test_one_task_decides_for_all_when_a_rank_fails_while_another_is_told_to_stop(tmp_path, first):
    """Slurm tells the ranks to stop because one of them has requeued the job: that is no second requeue."""
    requeues: list[int] = []
    job = Job([], ".", ".", str(tmp_path), str(tmp_path), max_requeue=3)
    stopped, failed = (Task(job, _Environment(rank, requeues)) for rank in (0, 1))
    decisions = [lambda: failed.after_failure(1), stopped.after_stop]
    for decide in decisions if first == "the failed rank" else reversed(decisions):
        decide()
    assert whats(tmp_path) == (["failed", "requeued"] if first == "the failed rank" else ["requeued"])
    assert requeues == ([1] if first == "the failed rank" else [0])


@pytest.mark.parametrize("failures, expected", [(2, ["requeued"]), (9, ["requeued", "not requeued"])])
def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, monkeypatch, failures, expected):
    """A busy or restarting slurmctld must not cost a preempted job its requeue."""
    stop_under_slurm(tmp_path, monkeypatch, "exit 1", f"[ $(wc -l < {tmp_path}/asked) -gt {failures} ]")
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 7"] * min(failures + 1, 4)
    assert whats(tmp_path) == expected


def test_a_request_that_was_heard_although_it_failed_is_not_made_twice(tmp_path, monkeypatch):
    stop_under_slurm(tmp_path, monkeypatch, f"[ -e {tmp_path}/asked ] && echo PENDING || echo RUNNING", "exit 1")
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 7"] and whats(tmp_path) == ["requeued"]


def stop_under_slurm(tmp_path: Path, monkeypatch, squeue: str, scontrol: str) -> None:
    """A preempted task on a Slurm whose programs do as these shell lines say; requests are kept in `asked`."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n{scontrol}\n")
    for name in ("squeue", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job_module, "PAUSE", 0)
    monkeypatch.setattr(job_module, "HOLD", 0)
    Task(Job([], ".", ".", str(tmp_path), str(tmp_path), max_requeue=3), SlurmJobEnvironment()).after_stop()


@pytest.mark.parametrize("code, cause", [(-signal.SIGKILL, "rank 1 was killed by SIGKILL (out of memory?)"),
                                         (-signal.SIGABRT, "rank 0 is gone"), (1, "rank 0 is gone")])
def test_a_killed_rank_is_named_with_the_update_that_its_peers_wrote_down(tmp_path, code, cause):
    task = Task(Job([], ".", ".", str(tmp_path), str(tmp_path), max_requeue=3), _Environment(1, []))
    told = {"rank": 0, "update": 41, "phase": "backward", "cause": "rank 0 is gone", "time": time.time()}
    (tmp_path / "progress.json").write_text(json.dumps(dict(told, update=36)))
    (tmp_path / "failure.json").write_text(json.dumps(told))
    task.after_failure(code)
    failed = json.loads((tmp_path / "job.jsonl").read_text().splitlines()[0])
    assert (failed["what"], failed["update"], failed["cause"]) == ("failed", 41, cause)


def test_a_signal_before_main_has_started_is_passed_on(tmp_path):
    (tmp_path / "main.py").write_text("import time; time.sleep(60)")
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        task = Task(Job([], str(tmp_path), str(tmp_path), str(tmp_path), str(tmp_path), 3), _Environment(0, []))
        task.signalled = "SIGUSR2"
        assert task.run_main() == ExitCode.PAUSED
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def test_a_job_that_cannot_record_it_is_requeued_all_the_same(tmp_path):
    (tmp_path / "job.jsonl").symlink_to("gone/job.jsonl")
    requeues: list[int] = []
    Task(Job([], ".", ".", str(tmp_path), str(tmp_path), max_requeue=3), _Environment(0, requeues)).after_stop()
    assert requeues == [0]


def test_rank_zero_decides_where_the_decision_cannot_be_written(tmp_path):
    job = Job([], ".", ".", str(tmp_path / "gone"), str(tmp_path), max_requeue=3)
    assert [Task(job, _Environment(rank, []))._decides() for rank in (0, 1)] == [True, False]
