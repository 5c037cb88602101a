"""A few updates of the published training: losses, weights and EMA as the authors' implementation gives
them."""
import json
import math

import numpy as np
import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy

from config.options import Options
from optim.build import build_optimizer
from optim.ema import Ema
from optim.schedule import Schedule
from optim.update import Update
from tests.kits.fill import PARITY, parity_input
from tests.kits.trained import filled

CASES = json.loads((PARITY / "trajectories.json").read_text())


def train(case, clip_mode):
    """Losses of all micro-batches, the network and its average after the case's updates."""
    model = filled(case["model"])
    ema = Ema(model, case["ema_decay"])
    updates = case["micro_steps"] // case["update_freq"]
    values = Options(clip_mode=clip_mode, epochs=1, warmup_epochs=0, **{name: case[name] for name in (
        "lr", "min_lr", "weight_decay", "weight_decay_end", "layer_decay", "update_freq", "clip_grad")})
    schedule, losses = Schedule(values, updates), []
    update = Update(model.train(), build_optimizer(model, values), schedule, values, ema=ema)
    criterion = LabelSmoothingCrossEntropy(case["smoothing"])
    for i in range(case["micro_steps"]):
        images = torch.from_numpy(parity_input(case["batch"], case["size"], case["size"], seed=1000 + i))
        labels = torch.from_numpy(np.random.default_rng(2000 + i).integers(0, 1000, case["batch"]))
        last = (i + 1) % case["update_freq"] == 0
        with update.micro_batch(last):
            loss = criterion(model(images), labels)
            update.backward(loss)
        losses.append(loss.item())
        if last:
            assert update.step(i // case["update_freq"]).finite
    return losses, model, ema


def differing(state, published):
    """Tensors outside norms 1e-3 relative and sums 1e-2 absolute."""
    for name, (total, norm) in published.items():
        value = state[name].double()
        if abs(value.sum().item() - total) > 1e-2 or not math.isclose(value.norm().item(), norm,
                                                                      rel_tol=1e-3):
            yield name, (value.sum().item(), total), (value.norm().item(), norm)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['model']}-{c['update_freq']}x-{c['clip_mode']}")
def test_published_trajectory(case):
    losses, model, ema = train(case, "official" if case["clip_mode"] == "official" else "step")
    assert losses == pytest.approx(case["losses"], abs=1e-3)
    assert list(model.state_dict()) == list(case["weights"])
    assert not list(differing(model.state_dict(), case["weights"]))
    assert not list(differing(ema.module.state_dict(), case["ema"]))
