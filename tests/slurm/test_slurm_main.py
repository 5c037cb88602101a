"""The quickstart, small, as Slurm jobs of two nodes with two tasks each."""
import os
import signal
import subprocess
from pathlib import Path

import pytest

from common.ledger import Ledger
from launch import run_with_submitit
from tests.kits.processes import REPOSITORY, wait_for
from tests.kits.runs import assert_equal_bits, result

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = ["--config", str(REPOSITORY / "recipes" / "quickstart.yaml"), "--model", "hornet_pico_7x7",
         "--input_size", "32", "--epochs", "2", "--warmup_epochs", "1", "--batch_size", "4",
         "--global_batch", "16", "--num_workers", "1", "--model_ema_decay", "0.9", "--save_ckpt_freq", "1",
         "--nodes", "2", "--ngpus", "2", "--device", "cpu", "--timeout", "1", "--cpus_per_task", "1"]


def submit(name: str) -> tuple[str, Path, Path]:
    """(job id, run folder, rank 0's log) of a job in the current folder."""
    assert run_with_submitit.main([*SMALL, "--job_dir", f"{name}/%j", "--output_dir", f"{name}/run",
                                   "--data_path", "digits"]) == 0
    [folder] = [path.parent.absolute() for path in Path(name).glob("*/job.json")]
    return folder.name, Path(name, "run").absolute(), folder / f"{folder.name}_0_log.err"


def test_preempted_requeued_and_after_a_killed_rank_it_ends_with_the_same_bits(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job, undisturbed, log = submit("undisturbed")
    assert cluster.wait(job, seconds=400) == "COMPLETED" and "top-1" in log.read_text(), log.read_text()
    job, run, log = submit("disturbed")
    wait_for(lambda: log.exists() and "epoch 1/2  update 20" in log.read_text(), 400)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for(lambda: "epoch 2/2  update 20" in log.read_text(), 400)
    os.kill(Ledger(run).newest()["pid"], signal.SIGKILL)  # rank 0
    assert cluster.wait(job, seconds=400) == "COMPLETED", log.read_text()
    paused, killed, again = Ledger(run).attempts()
    assert [(a["state"], a.get("requeued")) for a in (paused, killed, again)] == [
        ("PAUSED", True), ("FAILED", True), ("DONE", None)]
    assert "killed" in killed["cause"] and killed["update"] > 100  # in its own words or in those of its peers
    one, other = result(undisturbed), result(run)
    assert_equal_bits({part: one[part] for part in ("model", "model_ema", "optimizer")},
                      {part: other[part] for part in ("model", "model_ema", "optimizer")})
    assert [line["epoch"] for line in other["log"]] == [0, 1]
