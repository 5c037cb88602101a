"""An update equals plain torch: clip, AdamW and averaging written out, with and without a limit that is
reached."""
import copy

import pytest
import torch
from torch import nn

from optim.build import build_loss, build_optimizer
from optim.ema import Ema
from optim.groups import param_groups
from optim.schedule import Schedule
from optim.update import Update
from tests.kits.toy import CLASSES, SIZE, Toy, options


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


def test_agc_limits_each_unit_but_not_the_head():
    model, values = Toy(), options(opt="momentum", momentum=0.0, weight_decay=0.0, weight_decay_end=0.0,
                                   lr=1.0, min_lr=1.0, warmup_steps=-1, clip_grad=0.01, clip_by="agc")
    before = copy.deepcopy(model)
    update = Update(model, build_optimizer(model, values), Schedule(values, 5), values)
    with update.micro_batch(last=True):
        images, targets = batches(1, 1)[0][0]
        update.backward(1000 * nn.functional.cross_entropy(model(images), targets))
    update.step(0)
    moved = {name: (p - q).detach() for (name, p), q in zip(model.named_parameters(), before.parameters())}
    assert moved["head.weight"].norm() > before.head.weight.norm()
    limit = 0.01 * before.branch.weight.norm(dim=1)
    torch.testing.assert_close(moved["branch.weight"].norm(dim=1), limit, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes,kind", [(dict(mixup=0.8), "SoftTargetCrossEntropy"), (dict(cutmix=1.0),
                                          "SoftTargetCrossEntropy"), ({}, "LabelSmoothingCrossEntropy"),
                                          (dict(smoothing=0.0), "CrossEntropyLoss")])
def test_the_loss_fits_the_targets(changes, kind):
    assert type(build_loss(options(**changes))).__name__ == kind
