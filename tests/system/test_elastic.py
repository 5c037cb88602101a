"""torchrun with 1:2 nodes, by the command of TRAINING.md: a lost node is done without, and may come back."""
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.kits.processes import PROGRAMS, codes, descendants, environment, places, wait_for
from tests.kits.runs import arguments, now, result, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONF = "last_call_timeout=5,keep_alive_interval=2"


def batches(folder) -> dict[str, str]:
    """{"update position": hash}; an update that was made again must have had the same images."""
    found = {}
    for line in [line for path in folder.iterdir() for line in path.read_text().splitlines()]:
        place, _, digest = line.rpartition(" ")
        assert found.setdefault(place, digest) == digest
    return found


def test_a_lost_node_is_done_without_until_it_comes_back(images, tmp_path):
    run, whole, brake = tmp_path / "run", tmp_path / "whole", tmp_path / "brake"
    recipe = dict(epochs=12, lr=1e-4, batch_size=2, update_freq=None, global_batch=8, save_every_minutes=0.01)
    for folder in (whole, tmp_path / "batches", tmp_path / "whole_batches"):
        folder.mkdir()
    port = places(1)[0]["MASTER_PORT"]
    brake.touch()
    hook = json.dumps({"now": str(tmp_path), "batches": str(tmp_path / "batches"), "brake": str(brake)})

    def agent(is_host: bool) -> subprocess.Popen:
        command = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=100", "--rdzv_backend=c10d",
                   f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_conf={CONF},is_host={is_host}", "--local-addr=127.0.0.1"]
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *command,
                                 PROGRAMS / "hooked_main.py", hook, *arguments(images, run, **recipe)],
                                stdout=open(tmp_path / f"agent{is_host:d}", "a"), stderr=subprocess.STDOUT,
                                env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))

    def continues_on(nodes: int) -> None:
        """Three more updates than there were, on so many nodes."""
        goal = now(tmp_path)[1] + 3
        wait_for(lambda: all(now(tmp_path, rank)[1] >= goal for rank in range(nodes)), 90)

    agents = [agent(True), agent(False)]
    continues_on(2)
    for pid in (agents[1].pid, *descendants(agents[1].pid)):
        os.kill(pid, signal.SIGKILL)
    agents[1].wait()
    (tmp_path / "now-1").unlink()
    continues_on(1)
    assert not (tmp_path / "now-1").exists()  # alone
    agents[1] = agent(False)
    continues_on(2)
    brake.unlink()
    for each in agents:
        each.wait(120)
    assert codes(start(arguments(images, whole, **recipe), tmp_path / "console", batches=str(tmp_path / "whole_batches"))) == [0]
    assert batches(tmp_path / "batches") == batches(tmp_path / "whole_batches")
    one, other = (result(folder)["log"][-1] for folder in (whole, run))
    for name in ("test_loss", "test_acc1", "test_loss_ema", "test_acc1_ema"):
        assert other[name] == pytest.approx(one[name], rel=1e-4)
