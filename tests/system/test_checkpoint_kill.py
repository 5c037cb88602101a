"""kill -9 while saving, flipped bits and truncations: the short form of tests/soak/."""
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from run.checkpoint import BEST, Checkpoints


def state(epoch: int) -> dict:
    # Every tensor holds its epoch, so that a mixture of two saves would show.
    return {"format": 2, "model": {f"w{i}": torch.full((30_000,), float(epoch)) for i in range(8)},
            "epoch": epoch, "update": epoch}


def save(folder, *epochs: int) -> float:
    """Save each as training does, within it, at its end and as the best so far; the seconds that it took."""
    started, checkpoints = time.monotonic(), Checkpoints(folder)
    for epoch in epochs:
        checkpoints.save(state(epoch) | {"sums": [0.0]})
        checkpoints.save(state(epoch), {BEST: float(epoch)})
    checkpoints.close()
    return time.monotonic() - started


def killed_after(seconds: float, folder, epoch: int) -> None:
    """The epoch it was killed in is made again, so files that stand are replaced too."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            save(folder, *range(epoch, epoch + 10_000))
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill_while_saving(tmp_path, kills: int) -> None:
    draw, epoch, timing = random.Random(0), 0, tmp_path / "timing"
    timing.mkdir()
    for _ in range(kills):
        # Measured each time, so that the kills fall on all parts of a save however busy the machine is.
        killed_after(draw.uniform(0, 3 * save(timing, 0)), tmp_path, epoch)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.sweep()
        loaded = checkpoints.newest_valid()
        if loaded is None:  # killed before the first save was done
            assert epoch == 0
            continue
        assert loaded.path == checkpoints.numbered()[-1], "a kill must not even cost the newest file"
        assert loaded.state["epoch"] >= epoch
        epoch = loaded.state["epoch"]
        assert all((w == epoch).all() for w in loaded.state["model"].values())
        if (tmp_path / BEST).exists():
            best = checkpoints.resolve("best").state["epoch"]
            assert best >= epoch - 1 and not checkpoints.better({BEST: best})
        assert len(checkpoints.numbered()) <= 7 + epoch // 50
    assert epoch >= 3


def flip(data, rng):
    bit = int(rng.integers(8 * len(data)))
    return data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:]


def truncate(data, rng):
    return data[:int(rng.integers(len(data)))]


def damaged_newest(tmp_path, count: int, damage) -> None:
    checkpoints, newest = Checkpoints(tmp_path), tmp_path / "checkpoint-1.pth"
    for epoch in (0, 1):
        checkpoints.save(state(epoch), wait=True)
    data, rng = newest.read_bytes(), np.random.default_rng(1)
    for _ in range(count):
        newest.write_bytes(damage(data, rng))
        loaded = checkpoints.newest_valid()
        assert loaded.path.name == "checkpoint-0.pth" and (loaded.state["model"]["w7"] == 0).all()
    newest.write_bytes(data)
    assert checkpoints.newest_valid().path == newest


def test_kill_9_while_saving_never_leaves_an_unusable_folder(tmp_path):
    kill_while_saving(tmp_path, 25)


@pytest.mark.parametrize("damage, count", [(flip, 60), (truncate, 15)])
def test_every_damage_of_the_newest_is_seen(tmp_path, damage, count):
    damaged_newest(tmp_path, count, damage)
