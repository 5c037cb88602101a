"""How long training stands still for its saves: 2 % of the wall time at most at the default interval."""
import time

import torch

from config.options import Options
from models.zoo import PUBLISHED
from run.checkpoint import Checkpoints

LARGEST = 4 * 4 * max(entry.params for entry in PUBLISHED.values())  # weights, average and two moments in float32


class SlowDisk(Checkpoints):
    """Takes a second to write a file."""

    def _write(self, path, state, about):
        time.sleep(1.0)
        super()._write(path, state, about)


def state(megabytes: int) -> dict:
    tensors = {f"w{i}": torch.full((1 << 18,), float(i)) for i in range(megabytes)}
    return {"format": 2, "model": tensors, "epoch": 0, "update": 0, "best": {}}


def test_the_largest_model_waits_less_than_two_percent_of_the_default_interval(tmp_path):
    """Training waits for the copy to main memory only, whose time grows with the size."""
    checkpoints, waits = Checkpoints(tmp_path), []
    for update in range(3):
        before = checkpoints.waited
        checkpoints.save(state(128), epoch=0, update=update + 1)
        waits.append(checkpoints.waited - before)
        checkpoints.close()
    per_save = min(waits) * LARGEST / (128 << 20)
    interval = 60 * Options().save_every_minutes
    print(f"{per_save:.1f} s of {interval:.0f} s for {LARGEST / 1e9:.1f} GB: {100 * per_save / interval:.2f} %")
    assert interval == 900 and per_save < 0.02 * interval


def test_a_slow_disk_is_waited_for_only_when_the_next_save_comes_before_it_is_done(tmp_path):
    checkpoints = SlowDisk(tmp_path)
    checkpoints.save(state(1), epoch=0, update=1)
    assert checkpoints.waited < 0.5
    time.sleep(1.5)
    checkpoints.save(state(1), epoch=0, update=2)
    assert checkpoints.waited < 0.5 and checkpoints.waited_share < 0.4
    began, before = time.monotonic(), checkpoints.waited
    checkpoints.save(state(1), epoch=0, update=3)
    assert abs((checkpoints.waited - before) - (time.monotonic() - began)) < 0.2, "the share tells what was waited"
    assert checkpoints.waited - before > 0.5
    assert checkpoints.close() == [] and len(checkpoints.numbered()) >= 2


def test_the_clock_of_the_interval_starts_anew_with_each_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.due(0) and not checkpoints.due(15) and checkpoints.due(1e-9)
    checkpoints.last_saved -= 60 * 15
    assert checkpoints.due(15)
    checkpoints.save(state(1), epoch=0, update=1, wait=True)
    assert not checkpoints.due(15)
