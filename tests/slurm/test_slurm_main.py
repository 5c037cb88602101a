"""A small training as Slurm jobs of two nodes with two tasks each."""
import os
import signal
import subprocess
from pathlib import Path

import pytest

from common.ledger import Ledger
from launch import run_with_submitit
from tests.kits.processes import wait_for
from tests.kits.runs import UPDATES, arguments, assert_equal_bits, result

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


def submit(images: Path, name: str) -> tuple[str, Path, Path]:
    """(job id, run folder, rank 0's log) of a job in the current folder."""
    run = Path(name, "run").absolute()
    assert run_with_submitit.main([
        "--nodes", "2", "--ngpus", "2", "--timeout", "1", "--cpus_per_task", "1", "--job_dir", f"{name}/%j",
        *arguments(images, run, epochs=16, batch_size=2, update_freq=1, num_workers=1)]) == 0
    [folder] = [path.parent.absolute() for path in Path(name).glob("*/job.json")]
    return folder.name, run, folder / f"{folder.name}_0_log.err"


def test_preempted_requeued_and_after_a_killed_rank_it_ends_with_the_same_bits(cluster, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job, undisturbed, log = submit(images, "undisturbed")
    assert cluster.wait(job) == "COMPLETED" and "top-1" in log.read_text(), log.read_text()
    job, run, log = submit(images, "disturbed")
    wait_for(lambda: log.exists() and "epoch 3/16  update 4" in log.read_text(), 400)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for(lambda: "epoch 12/16  update 4" in log.read_text(), 400)
    os.kill(Ledger(run).newest()["pid"], signal.SIGKILL)  # rank 0
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    paused, killed, again = Ledger(run).attempts()
    assert [(a["state"], a.get("requeued")) for a in (paused, killed, again)] == [
        ("PAUSED", True), ("FAILED", True), ("DONE", None)]
    assert "killed" in killed["cause"] and killed["update"] > 11 * UPDATES  # in its own words or in those of its peers
    assert_equal_bits(result(undisturbed), result(run))
