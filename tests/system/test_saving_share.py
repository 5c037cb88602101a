"""How long training stands still for its saves: 2 % of the wall time at most at the default interval."""
import time

import torch

from config.options import Options
from models.zoo import PUBLISHED
from run.checkpoint import Checkpoints

# Weights, average and two moments in float32.
LARGEST = 4 * 4 * max(entry.params for entry in PUBLISHED.values())


def state(megabytes: int) -> dict:
    tensors = {f"w{i}": torch.full((1 << 18,), float(i)) for i in range(megabytes)}
    return {"format": 2, "model": tensors, "epoch": 0, "sums": [0.0]}


def test_the_largest_model_waits_less_than_two_percent_of_the_default_interval(tmp_path):
    """Training waits for the copy to main memory only, whose time grows with the size."""
    checkpoints, waits = Checkpoints(tmp_path), []
    for update in range(3):
        before = time.monotonic()
        checkpoints.save(state(128) | {"update": update})
        waits.append(time.monotonic() - before)
        checkpoints.close()
    per_save = min(waits) * LARGEST / (128 << 20)
    interval = 60 * Options().save_every_minutes
    print(f"{per_save:.1f} s of {interval:.0f} s for {LARGEST / 1e9:.1f} GB")
    assert interval == 900 and per_save < 0.02 * interval
