"""The quickstart, small, as Slurm jobs of two nodes with two tasks each."""
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from common.ledger import Ledger
from launch import run_with_submitit
from tests.kits.processes import REPOSITORY, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = ["--config", str(REPOSITORY / "recipes" / "quickstart.yaml"), "--model", "hornet_pico_7x7",
         "--input_size", "32", "--epochs", "2", "--warmup_epochs", "1", "--batch_size", "4",
         "--global_batch", "16", "--num_workers", "1", "--model_ema_decay", "0.9", "--save_ckpt_freq", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


def submit(folder: Path, name: str) -> tuple[str, Path]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert run_with_submitit.main([
            "--nodes", "2", "--ngpus", "2", "--device", "cpu", "--timeout", "1",
            "--cpus_per_task", "1", "--job_dir", f"{name}/%j", "--output_dir", f"{name}/run",
            "--data_path", str(folder / "digits"), *SMALL]) == 0
    finally:
        os.chdir(before)
    return next((folder / name).glob("*/job.json")).parent.name, folder / name / "run"


def final_state(run: Path) -> dict:
    return torch.load(run / "checkpoint-1.pth", weights_only=True)


def log(folder: Path, name: str, job: str) -> str:
    path = folder / name / job / f"{job}_0_log.err"
    return path.read_text() if path.exists() else ""


def trainers(run: Path) -> list[int]:
    """The processes that train in `run`, without their loader workers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        if str(run) in words and any(word.endswith("main.py") for word in words):
            found[int(folder.name)] = parent
    return sorted(pid for pid, parent in found.items() if parent not in found)


def assert_equal_bits(one: Path, other: Path) -> None:
    """The last states of two runs: weights, their average and the optimizer."""
    for part in ("model", "model_ema", "optimizer"):
        leaves, others = (tree_leaves(final_state(run)[part]) for run in (one, other))
        for a, b in zip(leaves, others, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, part


@pytest.fixture(scope="module")
def undisturbed(cluster, folder):
    """The run folder of a job that nobody disturbed."""
    job, run = submit(folder, "undisturbed")
    assert cluster.wait(job, seconds=400) == "COMPLETED", log(folder, "undisturbed", job)
    assert "top-1" in log(folder, "undisturbed", job)
    assert json.loads((run / "status.json").read_text())
    return run


def test_preempted_in_an_epoch_and_requeued_it_ends_with_the_same_bits(cluster, folder, undisturbed):
    job, run = submit(folder, "preempted")
    wait_for(lambda: "epoch 1/2  update 20" in log(folder, "preempted", job), 400)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    assert cluster.wait(job, seconds=400) == "COMPLETED", log(folder, "preempted", job)
    assert [(a["state"], a.get("requeued")) for a in Ledger(run).attempts()] == [("PAUSED", True), ("DONE", None)]
    assert_equal_bits(undisturbed, run)
    epochs = [json.loads(line)["epoch"] for line in (run / "log.txt").read_text().splitlines()]
    assert epochs == [0, 1]


def test_after_a_killed_rank_it_goes_on_and_ends_with_the_same_bits(cluster, folder, undisturbed):
    job, run = submit(folder, "killed")
    wait_for(lambda: "epoch 2/2  update 20" in log(folder, "killed", job), 400)
    os.kill(trainers(run)[-1], signal.SIGKILL)
    assert cluster.wait(job, seconds=400) == "COMPLETED", log(folder, "killed", job)
    killed, again = Ledger(run).attempts()
    assert (killed["state"], killed["requeued"], again["state"]) == ("FAILED", True, "DONE")
    assert "killed" in killed["cause"] and killed["update"] > 100  # in its own words or in those of its peers
    assert_equal_bits(undisturbed, run)
