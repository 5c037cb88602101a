"""The launcher: what it submits, where it refuses, and what it says of a job."""
import json
import os

import pytest

from common.ledger import Ledger
from common.outcome import Outcome
from launch import run_with_submitit
from launch.run_with_submitit import main, resolve, snapshot, status
from tests.kits.docs import ROOT
from tests.kits.processes import write_toy_program


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A toy program in place of the repository, tmp_path as the current folder, and an sbatch that refuses."""
    monkeypatch.setattr(run_with_submitit, "ROOT", write_toy_program(tmp_path / "program"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 'invalid partition specified: moon' >&2; exit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


ALL = ["--nodes", "4", "--ngpus", "8", "--timeout", "1.5", "--partition", "gpu", "--comment", "for a paper",
       "--job_name", "tiny", "--slurm", "account=vision", "--slurm", "mem=0", "--use_volta32", "--updates", "7"]


@pytest.mark.parametrize("argv, there, absent, folder", [
    (ALL, ["nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "time=90", "partition=gpu", "job-name=tiny",
           "comment='for a paper'", "account=vision", "mem=0", "requeue", "signal=USR2@120", "cpus-per-task=10"],
     [], "runs/%j"),
    # Nothing of a site is assumed; a short job stops nearer to its limit.
    (["--timeout", "0.05", "--output_dir=rel/%j"], ["signal=USR2@45"],
     ["partition", "constraint", "account", "mem", "qos", "comment"], "rel/%j"),
    (["--slurm", "gres=gpu:a100:8", "--config", "c.yaml"], ["gres=gpu:a100:8"], ["gpus-per-node"], "from_config"),
    (["--device", "cpu", "--config=c.yaml", "--output_dir", "rel"], [], ["gpus-per-node"], "rel")])
def test_dry_run_prints_the_script_and_submits_nothing(program, capsys, argv, there, absent, folder):
    (program / "c.yaml").write_text("output_dir: from_config\n")
    assert main([*argv, "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert all(f"#SBATCH --{line}\n" in out for line in there) and not any(f"--{name}" in out for name in absent)
    assert "export SRUN_CPUS_PER_TASK" in out and f"--output_dir {program / folder}" in out.splitlines()[-1]
    assert ("--use_volta32" in err, "main.py --updates 7 " in out) == (argv is ALL, argv is ALL)
    assert not (program / "runs").exists()


@pytest.mark.parametrize("argv, sentence", [
    (["--slurm", "=x"], "--slurm =x"),
    (["status", "nowhere"], "nowhere holds no job.json"),
    (["status"], "status takes one folder"),
    (["--no_such_flag", "1"], "no_such_flag"),
    (["--nodes", "two"], "--nodes: "),
    (["--nodes", "0"], "--nodes 0"),
    (["--timeout", "nan"], "--timeout nan"),
    (["--timeout", "0.04"], "--timeout 0.04 (hours) is less than the 120 s in which a job starts and the 36 s"),
    (["--dry_run", "maybe"], "'maybe'"),
    (["--partition", "moon"], "invalid partition specified: moon"),
    (["--job_dir", "bin/srun/%j"], "--job_dir bin/srun/%j"),  # a file
    (["--job_dir", "/sys/kernel/%j"], "--job_dir /sys/kernel/%j")])  # read-only, for root too
def test_mistakes_are_one_sentence_and_exit_code_2(program, argv, sentence, capsys):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert sentence in text.splitlines()[-1] and "Traceback" not in text


def test_without_slurm_torchrun_is_named(program, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([]) == 2 and "torchrun" in capsys.readouterr().err


def test_the_snapshot_is_a_whole_program_which_checks_its_options(tmp_path, monkeypatch, capsys):
    code = snapshot(str(tmp_path / "run/%j"))
    monkeypatch.chdir(code)
    monkeypatch.setattr(run_with_submitit, "ROOT", code)
    assert resolve(["--config", "recipes/quickstart.yaml"])["epochs"]
    assert main(["--batchsize", "1"]) == 2
    assert "unknown flag --batchsize; did you mean --batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize("folder, code", [("a/runs/%j", "a/runs"), ("a/runs/hornet_%j", "a/runs"), ("a/run", "a/run"),
                                          ("a/%j/logs", "a")])
def test_the_code_of_a_job_lies_beside_its_folder(program, folder, code):
    assert snapshot(str(program / folder)).parent == program / code / "code"


def began(ledger: Ledger) -> None:
    ledger.begin(update=0)


def paused(ledger: Ledger) -> None:
    began(ledger)
    ledger.end(Outcome.PAUSED, update=42, cause="SIGUSR2")
    ledger.note(requeued=True, reason="SIGUSR2")


def failed(ledger: Ledger) -> None:
    began(ledger)
    ledger.end(Outcome.FAILED, update=41, cause="rank 1 (gpu2) is gone", rank=1)
    ledger.note(requeued=False, reason="it failed twice at update 41: rank 1 (gpu2) is gone")


def done(ledger: Ledger) -> None:
    began(ledger)
    ledger.end(Outcome.DONE, update=90)


AT_WORK = "gpu[1-2]|1:23"
JOBS = {"queued": ("PENDING|Resources|N/A|(null)|0:00", None, ""),
        "starting": (f"RUNNING|None||{AT_WORK}", None, ""),
        "running": (f"RUNNING|None||{AT_WORK}", began, "backward"),
        "saving": (f"RUNNING|None||{AT_WORK}", began, "saving"),
        "requeued": ("PENDING|BeginTime|2026-11-26T10:02:00|(null)|0:00", paused, "ended"),
        "failed": (f"FAILED|NonZeroExitCode||{AT_WORK}", failed, "ended"),
        "lost": (f"NODE_FAIL|None||{AT_WORK}", began, "backward"),
        "finished": (f"COMPLETED|None||{AT_WORK}", done, "ended"),
        "forgotten by Slurm": ("", done, "ended")}


def test_the_words_of_status(tmp_path, monkeypatch):
    """What an operator reads; another job that used the same run folder before changes nothing."""
    monkeypatch.setattr(run_with_submitit.time, "time", lambda: 1008.0)
    said = ""
    for name, (answer, prepare, phase) in JOBS.items():
        monkeypatch.setattr(run_with_submitit, "squeue", lambda job, what, answer=answer: answer)
        folder = tmp_path / name
        run = Ledger(folder / "run")
        run.path.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({"id": "7", "output_dir": str(run.path)}))
        if name != "queued":
            (folder / "7_0_log.err").write_text("train: 1281167 images in 1000 classes\n")
        (folder / "7_1_log.err").write_text("one\nrank 1 has no memory\n")
        monkeypatch.setenv("SLURM_JOB_ID", "6")
        done(run)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        if prepare:
            prepare(run)
            (run.path / "progress.json").write_text(
                json.dumps({"update": 42, "time": 1000.0, "job": "7", "phase": phase}))
        said += f"--- {name}\n{status(folder)}".replace(str(folder), "FOLDER")
    assert said == (ROOT / "tests/golden/status.txt").read_text()
