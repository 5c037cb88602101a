"""The launcher: what it submits, where it refuses, and the same job through submitit's local executor."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.ledger import Ledger
from common.outcome import Outcome
from launch import run_with_submitit
from launch.run_with_submitit import (
    main,
    snapshot,
    snapshot_folder,
    status,
)
from tests.kits.processes import alive, environment, expected_value, wait_for, write_toy_program


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A toy program in place of the repository, tmp_path as the current folder, and no launcher's
    variables."""
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
    assert "--use_volta32" in err and "no effect" in err
    assert not (program / "runs").exists() or not list((program / "runs").rglob("*.pkl"))


def test_a_short_job_stops_nearer_to_its_limit(program, fake_slurm, capsys):
    assert main(["--timeout", "0.05", "--dry_run"]) == 0
    assert "#SBATCH --signal=USR2@45\n" in capsys.readouterr().out


def test_nothing_of_a_site_is_assumed(program, fake_slurm, capsys):
    assert main(["--dry_run", "true"]) == 0
    out, err = capsys.readouterr()
    assert "--cluster auto: slurm, because sbatch is on the PATH" in err
    for name in ("partition", "constraint", "account", "mem", "qos", "comment"):
        assert f"--{name}" not in out
    main(["--slurm", "gres=gpu:a100:8", "--dry_run", "true"])  # GPUs in the site's own words
    out = capsys.readouterr().out
    assert "--gres=gpu:a100:8" in out and "--gpus-per-node" not in out


@pytest.mark.parametrize("argv, sentence", [
    (["--cluster", "local", "--nodes", "2"], "--nodes 2"),
    (["--cluster", "slurm"], "torchrun"),
    (["--cluster", "local", "--slurm", "=x"], "--slurm =x"),
    (["status", "nowhere"], "nowhere holds no job.json and no run"),
    (["status"], "status takes one folder"),
    (["--cluster", "local", "--no_such_flag", "1"], "no_such_flag"),
    (["--nodes", "two"], "--nodes: "),
    (["--nodes", "0"], "--nodes 0"),
    (["--timeout", "nan"], "--timeout nan"),
    (["--timeout", "0.04"], "--timeout 0.04 (hours) is less than the 120 s in which a job starts and the 36 s"),
    (["--dry_run", "maybe"], "'maybe'"),
    (["--cluster", "somewhere"], "choose from"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(program, argv, sentence, capsys, monkeypatch):
    monkeypatch.setattr(run_with_submitit.shutil, "which", lambda name: None)
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_misspelt_flag_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--cluster", "local", "--batchsize", "1"]) == 2
    assert "unknown flag --batchsize; did you mean --batch_size?" in capsys.readouterr().err


def test_the_code_of_a_job_lies_beside_its_folder():
    for folder, code in (("/a/runs/%j", "/a/runs/code"), ("/a/runs/hornet_%j", "/a/runs/code"),
                         ("/a/run", "/a/run/code"), ("/a/%j/logs", "/a/code")):
        assert str(snapshot_folder(folder).parent) == code


def test_the_program_starts_from_its_snapshot_alone(tmp_path):
    snapshot(tmp_path / "code")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, str(tmp_path / "code" / "main.py"), "--print_config", "true", "--config",
                            "recipes/quickstart.yaml"], cwd=tmp_path / "code", env=alone, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("argv, folder", [([], "runs/%j"), (["--output_dir=rel/%j"], "rel/%j"),
                                          (["--config", "c.yaml"], "from_config"),
                                          (["--config=c.yaml", "--output_dir", "rel"], "rel")])
def test_the_run_folder_is_the_jobs_unless_it_is_named(program, fake_slurm, capsys, argv, folder):
    (program / "c.yaml").write_text("output_dir: from_config\n")
    assert main([*argv, "--device", "cpu", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"--output_dir {program / folder}") and "--device cpu" in out
    assert "--gpus-per-node" not in out


@pytest.mark.parametrize("job_dir", ["file", "file/%j", "/proc/jobs/%j", "{unwritable}/%j"])
def test_a_job_folder_that_cannot_be_made_is_one_sentence(program, job_dir, capsys):
    """A read-only folder stands for itself only where the tests don't run as root: a full path in /sys does
    for both."""
    (program / "file").touch()
    name = job_dir.format(unwritable="/sys/kernel")
    assert main(["--cluster", "local", "--ngpus", "1", "--job_dir", name]) == 2
    text = capsys.readouterr().err
    assert f"--job_dir {name}" in text and "Traceback" not in text


def test_what_sbatch_refuses_is_one_sentence(program, fake_slurm, capsys):
    (program / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: moon' >&2; exit 1\n")
    assert main(["--nodes", "1", "--ngpus", "1", "--partition", "moon"]) == 2
    text = capsys.readouterr().err
    assert "invalid partition specified: moon" in text and "Traceback" not in text


PENDING, RUNS = "PENDING|{}|{}|(null)|0:00", "RUNNING|None|2026-11-26T10:00:00|gpu[1-2]|1:23"
AT_42 = {"update": 42, "time": 1000.0, "job": "7"}


def begun(ledger: Ledger) -> None:
    ledger.begin(update=0)


def paused(ledger: Ledger) -> None:
    begun(ledger)
    ledger.end(Outcome.PAUSED, update=42, cause="SIGUSR2")
    ledger.note(requeued=True, reason="SIGUSR2")


def failed(ledger: Ledger) -> None:
    begun(ledger)
    ledger.end(Outcome.FAILED, update=41, cause="rank 1 (gpu2) is gone", rank=1)
    (ledger.path / "7_1_log.err").write_text("one\nrank 1 has no memory\n")
    ledger.note(requeued=False, reason="it failed twice at update 41: rank 1 (gpu2) is gone")


def done(ledger: Ledger) -> None:
    begun(ledger)
    ledger.end(Outcome.DONE, update=90)


@pytest.mark.parametrize("prepare, phase, answer, expected", [
    (None, "", PENDING.format("Resources", "N/A"), """
state    PENDING (Resources)
"""), (None, "", RUNS, """
state    RUNNING on gpu[1-2] for 1:23, starting
log      7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (begun, "backward", RUNS, """
state    RUNNING on gpu[1-2] for 1:23
update   42 (backward, 8 s ago)
attempt  1 of at most 101
         attempt 1: under way
log      7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (begun, "saving", RUNS, """
state    RUNNING on gpu[1-2] for 1:23
update   42 (saving, 8 s ago)
attempt  1 of at most 101
         attempt 1: under way
log      7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (paused, "ended", PENDING.format("BeginTime", "2026-11-26T10:02:00"), """
state    PENDING (BeginTime, not before 2026-11-26T10:02:00)
attempt  1 of at most 101
         attempt 1: PAUSED at update 42, requeued (SIGUSR2)
log      7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (failed, "ended", "FAILED|NonZeroExitCode|2026-11-26T10:00:00|gpu[1-2]|1:23", """
state    FAILED
attempt  1 of at most 101
         attempt 1: FAILED at update 41, not requeued (it failed twice at update 41: rank 1 (gpu2) is gone)
failure  rank 1 (gpu2) is gone
log      7_1_log.err
         | one
         | rank 1 has no memory
"""), (begun, "backward", "NODE_FAIL|None|2026-11-26T10:00:00|gpu[1-2]|1:23", """
state    NODE_FAIL; the run: killed without a word, or its node was lost
attempt  1 of at most 101
         attempt 1: killed without a word, or its node was lost
log      7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (done, "ended", "COMPLETED|None|2026-11-26T10:00:00|gpu[1-2]|1:23", """
state    COMPLETED
attempt  1 of at most 101
         attempt 1: DONE at update 90
log      7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (done, "ended", "", """
state    DONE
attempt  1 of at most 101
         attempt 1: DONE at update 90
log      7_0_log.err
         | train: 1281167 images in 1000 classes
"""),
], ids=["queued", "starting", "running", "saving", "requeued", "failed", "lost", "finished", "forgotten by Slurm"])
def test_the_words_of_status(tmp_path, monkeypatch, prepare, phase, answer, expected):
    """What an operator reads; another job that uses the same run folder changes nothing."""
    monkeypatch.setattr(run_with_submitit, "squeue", lambda job, what: answer)
    monkeypatch.setattr(run_with_submitit.time, "time", lambda: 1008.0)
    run, folder = Ledger(tmp_path / "run"), tmp_path / "logs"
    for path in (run.path, folder):
        path.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    done(run)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = {"id": "7", "cluster": "slurm", "output_dir": str(run.path), "max_requeue": 100}
    (folder / "job.json").write_text(json.dumps(job))
    if not answer.startswith("PENDING|Resources"):
        (folder / "7_0_log.err").write_text("train: 1281167 images in 1000 classes\n")
    if prepare:
        prepare(run)
        if prepare is failed:
            (run.path / "7_1_log.err").rename(folder / "7_1_log.err")
        (run.path / "progress.json").write_text(json.dumps(AT_42 | {"phase": phase}))
    assert status(folder) == "job      7 (slurm)" + expected


def test_a_lone_run_that_was_killed_is_known_by_its_lock(tmp_path):
    """Its status.json still says RUNNING; so does a shell: `flock -n RUN/owner.json true`."""
    code = ("import time\nfrom run.folder import RunFolder\n"
            f"folder = RunFolder({str(tmp_path)!r})\nfolder.lock()\nfolder.begin(update=3)\ntime.sleep(60)")
    run = subprocess.Popen([sys.executable, "-c", code], env=environment())
    wait_for((tmp_path / "status.json").exists)
    shell = ["flock", "-n", str(tmp_path / "owner.json"), "true"]
    assert "state    RUNNING\n" in status(tmp_path) and subprocess.run(shell).returncode == 1
    run.kill()
    run.wait()
    assert "state    killed without a word" in status(tmp_path) and subprocess.run(shell).returncode == 0
    assert Ledger(tmp_path).status()["state"] == "RUNNING"


def test_a_folder_has_one_unfinished_job(program, fake_slurm, monkeypatch, capsys):
    """Of Slurm's that is; of a local one the process."""
    (program / "one").mkdir()
    for cluster, number, state in (("slurm", "9", "PENDING|Priority|N/A|(null)|0:00"), ("local", str(os.getpid()), "")):
        monkeypatch.setattr(run_with_submitit, "squeue", lambda job, what, state=state: state)
        (program / "one" / "job.json").write_text(json.dumps({"id": number, "cluster": cluster}))
        assert main(["--job_dir", "one"]) == 2
        assert f"job {number}" in capsys.readouterr().err
        monkeypatch.setattr(run_with_submitit, "squeue", lambda job, what: "COMPLETED|None|N/A|a|1:00")
    (program / "one" / "job.json").write_text(json.dumps({"id": "9", "cluster": "slurm"}))
    assert main(["--job_dir", "one"]) == 2 and "sbatch refuses" in capsys.readouterr().err


def local(program: Path, *more: str) -> Path:
    assert main(["--cluster", "local", "--ngpus", "2", "--device", "cpu", *more]) == 0
    [folder] = {path.parent for path in (program / "runs").glob("*/job.json")}
    return folder.absolute()


def finished(folder: Path, seconds: float = 150) -> list[tuple]:
    """(state, requeued) of the attempts of a job once it has ended, and no process of it is left."""
    wait_for(lambda: not alive(int(folder.name)), seconds)
    assert not any(alive(int(pid.read_text())) for pid in (folder / "pids").iterdir())
    return [(a["state"], a.get("requeued")) for a in Ledger(folder).attempts()]


def test_a_local_job_runs_the_snapshot_to_the_end(program):
    config = program / "mine.yaml"
    config.write_text("{}\n")
    folder = local(program, "--updates", "10", "--config", "mine.yaml")
    config.unlink()  # later changes don't reach the job
    (program / "program" / "main.py").write_text("raise SystemExit(9)")
    assert finished(folder) == [("DONE", None)], (folder / f"{folder.name}_0_log.err").read_text()
    assert json.loads((folder / "state.json").read_text())["value"] == expected_value(10, 2)
    text = status(folder)
    assert "state    DONE" in text and "attempt 1: DONE at update 10" in text
    job = json.loads((folder / "job.json").read_text())
    assert re.search(r"runs/code/\d{8}-\d{6}-\w{6}$", job["code"])


@pytest.mark.slow
def test_a_local_job_is_requeued_after_a_signal_and_ends_as_if_undisturbed(program):
    folder = local(program, "--updates", "100", "--faults", "pace=0.05")
    wait_for(lambda: (folder / "now").exists())
    os.kill(int((folder / "pids" / "1").read_text()), signal.SIGUSR2)
    assert finished(folder) == [("PAUSED", True), ("DONE", None)]
    assert json.loads((folder / "state.json").read_text())["value"] == expected_value(100, 2)


@pytest.mark.slow
def test_nothing_of_a_local_job_outlives_its_controller(program):
    folder = local(program, "--updates", "100000")
    wait_for(lambda: (folder / "now").exists())
    os.kill(int(folder.name), signal.SIGKILL)
    wait_for(lambda: not any(alive(int(pid.read_text())) for pid in (folder / "pids").iterdir()))
