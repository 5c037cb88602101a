"""One update of the weights: what it clips, and the loss scale. That it equals plain torch and the published training
is in tests/parity/test_trajectories.py, that accumulation changes nothing in tests/unit/test_engine.py."""
import copy

import pytest
import torch
from torch import nn

from optim.build import build_optimizer
from optim.schedule import Schedule
from optim.update import LossScale, Update
from tests.kits.toy import Toy, batch, options


def moved(**changes):
    """By how much one update of plain SGD, whose learning rate is 1, moves each weight; and its gradient norm."""
    model, values = Toy(), options(opt="momentum", momentum=0.0, weight_decay=0.0, weight_decay_end=0.0, lr=1.0,
                                   min_lr=1.0, warmup_steps=-1, update_freq=2, **changes)
    before, update = copy.deepcopy(model.state_dict()), Update(model, build_optimizer(model, values),
                                                               Schedule(values, 5), values)
    for last in (False, True):
        images = batch(range(4 * last, 4 * last + 4), range(4))
        with update.micro_batch(last):
            update.backward(1000 * nn.functional.cross_entropy(model(images.images), images.targets))
    stats = update.step(0)
    return {name: (value - before[name]) for name, value in model.state_dict().items()}, stats.grad_norm, before


@pytest.mark.parametrize("limit, mode, clips", [(0.3, "step", True), (0.05, "official", False), (0.3, "official", True)])
def test_the_norm_is_limited_but_not_by_an_official_limit_up_to_a_tenth(limit, mode, clips):
    found, norm, _ = moved(clip_grad=limit, clip_mode=mode)
    length = torch.cat([value.flatten() for value in found.values()]).norm()
    torch.testing.assert_close(length, torch.tensor(limit) if clips else norm, rtol=1e-4, atol=0)
    assert bool(norm > 1) == (mode == "step" or not clips)  # in that mode the norm before clipping


def test_agc_limits_each_unit_but_not_the_head():
    found, _, before = moved(clip_grad=0.01, clip_by="agc")
    assert found["head.weight"].norm() > before["head.weight"].norm()
    limit = 0.01 * before["branch.weight"].norm(dim=1)
    torch.testing.assert_close(found["branch.weight"].norm(dim=1), limit, rtol=1e-3, atol=1e-6)


def test_the_loss_scale_is_kept_as_torchs_own():
    scale, theirs = LossScale(torch.device("cpu"), enabled=True), torch.amp.GradScaler("cpu")
    for finite in (False, False, True, False):
        scale.update(torch.tensor(finite))
    theirs.load_state_dict(scale.state_dict())
    assert theirs.get_scale() == scale.scale == 8192
    scale.load_state_dict(theirs.state_dict() | {"_growth_tracker": 1999})
    scale.update(torch.tensor(True))
    assert scale.scale == 16384
