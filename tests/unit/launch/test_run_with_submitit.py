"""The launcher: what it submits, where it refuses, and the same job through submitit's local executor."""
import json
import os
import subprocess
import sys

import pytest

from common.ledger import Ledger
from common.outcome import Outcome
from launch import run_with_submitit
from launch.run_with_submitit import main, snapshot, status
from tests.kits.processes import REPOSITORY, write_toy_program


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


def test_dry_run_prints_the_script_and_submits_nothing(program, capsys):
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


def test_a_short_job_stops_nearer_to_its_limit(program, capsys):
    assert main(["--timeout", "0.05", "--dry_run"]) == 0
    assert "#SBATCH --signal=USR2@45\n" in capsys.readouterr().out


def test_nothing_of_a_site_is_assumed(program, capsys):
    assert main(["--dry_run", "true"]) == 0
    out = capsys.readouterr().out
    for name in ("partition", "constraint", "account", "mem", "qos", "comment"):
        assert f"--{name}" not in out
    main(["--slurm", "gres=gpu:a100:8", "--dry_run", "true"])  # GPUs in the site's own words
    out = capsys.readouterr().out
    assert "--gres=gpu:a100:8" in out and "--gpus-per-node" not in out


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
    (["--job_dir", "bin/srun"], "--job_dir bin/srun"),  # a file
    (["--job_dir", "bin/srun/%j"], "--job_dir bin/srun/%j"),
    (["--job_dir", "/proc/jobs/%j"], "--job_dir /proc/jobs/%j"),
    (["--job_dir", "/sys/kernel/%j"], "--job_dir /sys/kernel/%j"),  # read-only, for root too
])
def test_mistakes_are_one_sentence_and_exit_code_2(program, argv, sentence, capsys):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert sentence in text.splitlines()[-1] and "Traceback" not in text


def test_without_slurm_torchrun_is_named(program, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([]) == 2 and "torchrun" in capsys.readouterr().err


def test_a_misspelt_flag_is_one_sentence(program, monkeypatch, capsys):
    monkeypatch.setattr(run_with_submitit, "ROOT", REPOSITORY)
    assert main(["--batchsize", "1"]) == 2
    assert "unknown flag --batchsize; did you mean --batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize("folder, code", [("a/runs/%j", "a/runs"), ("a/runs/hornet_%j", "a/runs"), ("a/run", "a/run"),
                                          ("a/%j/logs", "a")])
def test_the_code_of_a_job_lies_beside_its_folder(program, folder, code):
    assert snapshot(str(program / folder)).parent == program / code / "code"


def test_the_program_starts_from_its_snapshot_alone(tmp_path):
    code = snapshot(str(tmp_path / "run"))
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, str(code / "main.py"), "--print_config", "true", "--config",
                            "recipes/quickstart.yaml"], cwd=code, env=alone, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("argv, folder", [([], "runs/%j"), (["--output_dir=rel/%j"], "rel/%j"),
                                          (["--config", "c.yaml"], "from_config"),
                                          (["--config=c.yaml", "--output_dir", "rel"], "rel")])
def test_the_run_folder_is_the_jobs_unless_it_is_named(program, capsys, argv, folder):
    (program / "c.yaml").write_text("output_dir: from_config\n")
    assert main([*argv, "--device", "cpu", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"--output_dir {program / folder}") and "--device cpu" in out
    assert "--gpus-per-node" not in out


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
log      {folder}/7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (begun, "backward", RUNS, """
state    RUNNING on gpu[1-2] for 1:23
update   42 (backward, 8 s ago)
attempt  1: under way
log      {folder}/7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (begun, "saving", RUNS, """
state    RUNNING on gpu[1-2] for 1:23
update   42 (saving, 8 s ago)
attempt  1: under way
log      {folder}/7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (paused, "ended", PENDING.format("BeginTime", "2026-11-26T10:02:00"), """
state    PENDING (BeginTime, not before 2026-11-26T10:02:00)
attempt  1: PAUSED at update 42, requeued (SIGUSR2)
log      {folder}/7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (failed, "ended", "FAILED|NonZeroExitCode|2026-11-26T10:00:00|gpu[1-2]|1:23", """
state    FAILED
attempt  1: FAILED at update 41, not requeued (it failed twice at update 41: rank 1 (gpu2) is gone)
failure  rank 1 (gpu2) is gone
log      {folder}/7_1_log.err
         | one
         | rank 1 has no memory
"""), (begun, "backward", "NODE_FAIL|None|2026-11-26T10:00:00|gpu[1-2]|1:23", """
state    NODE_FAIL; the run: killed without a word, or its node was lost
attempt  1: killed without a word, or its node was lost
log      {folder}/7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (done, "ended", "COMPLETED|None|2026-11-26T10:00:00|gpu[1-2]|1:23", """
state    COMPLETED
attempt  1: DONE at update 90
log      {folder}/7_0_log.err
         | train: 1281167 images in 1000 classes
"""), (done, "ended", "", """
state    DONE
attempt  1: DONE at update 90
log      {folder}/7_0_log.err
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
    job = {"id": "7", "output_dir": str(run.path)}
    (folder / "job.json").write_text(json.dumps(job))
    if not answer.startswith("PENDING|Resources"):
        (folder / "7_0_log.err").write_text("train: 1281167 images in 1000 classes\n")
    if prepare:
        prepare(run)
        if prepare is failed:
            (run.path / "7_1_log.err").rename(folder / "7_1_log.err")
        (run.path / "progress.json").write_text(json.dumps(AT_42 | {"phase": phase}))
    assert status(folder) == "job      7" + expected.format(folder=folder)
