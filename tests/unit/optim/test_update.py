"""An update equals plain torch: clip, AdamW and averaging written out, with and without a limit that is reached.
That it equals the published training is in tests/parity/test_trajectories.py."""
import copy

import pytest
import torch
from torch import nn

from optim.build import build_optimizer
from optim.ema import Ema
from optim.groups import param_groups
from optim.schedule import Schedule
from optim.update import LossScale, Update
from tests.kits.toy import CLASSES, SIZE, Toy, batch, options


def batches(updates, update_freq):
    generator = torch.Generator().manual_seed(5)
    return [[(torch.randn(4, 3, SIZE, SIZE, generator=generator),
              torch.randint(CLASSES, (4,), generator=generator)) for _ in range(update_freq)]
            for _ in range(updates)]


def ours(values, data):
    model = Toy()
    update = Update(model, build_optimizer(model, values), Schedule(values, len(data)), values,
                    ema=Ema(model, 0.9))
    norms = []
    for number, micro_batches in enumerate(data):
        for micro, (images, targets) in enumerate(micro_batches):
            with update.micro_batch(last=micro == len(micro_batches) - 1):
                update.backward(nn.functional.cross_entropy(model(images), targets))
        stats = update.step(number)
        norms.append(stats.grad_norm.item())
        assert all(p.grad is None for p in model.parameters())
    return model, update.ema, norms


def plainly(values, data):
    """Per-tensor loops and torch's unfused AdamW."""
    model = Toy()
    average = copy.deepcopy(model)
    groups = param_groups(model.named_parameters(), values.weight_decay)
    plain = [{"params": g["params"], "decays": g["decays"]} for g in groups]
    optimizer = torch.optim.AdamW(plain, foreach=False)
    schedule, norms = Schedule(values, len(data)), []
    for number, micro_batches in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(number)
            group["weight_decay"] = schedule.weight_decay(number) if group["decays"] else 0.0
        for images, targets in micro_batches:
            (nn.functional.cross_entropy(model(images), targets) / len(micro_batches)).backward()
            if values.clip_mode == "official" and values.clip_grad > 0.1:
                nn.utils.clip_grad_norm_(model.parameters(), values.clip_grad, foreach=False)
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        if values.clip_mode == "step" and values.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), values.clip_grad, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for own, new in zip(average.parameters(), model.parameters()):
                own.copy_(0.9 * own + 0.1 * new)
    return model, average, norms


@pytest.mark.parametrize("clip_grad,clip_mode", [(None, "step"), (1e-3, "step"), (0.3, "step"),
                                                 (100.0, "step"),
                                                 (0.3, "official"), (0.05, "official"), (100.0, "official")])
@pytest.mark.parametrize("update_freq", [1, 3])
def test_same_as_written_out(clip_grad, clip_mode, update_freq):
    values = options(warmup_steps=-1, update_freq=update_freq, clip_grad=clip_grad, clip_mode=clip_mode)
    data = batches(6, update_freq)
    model, ema, norms = ours(values, data)
    expected, average, expected_norms = plainly(values, data)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(ema.module.parameters(), average.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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
