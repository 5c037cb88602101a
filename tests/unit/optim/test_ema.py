"""The moving average of the weights: its formula, its start, masks, devices, and the half-life warning."""
import pytest
import torch
from torch import nn

from config.options import Options
from optim.ema import Ema, half_life_notice, masked_lerp_


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)  # float and integer buffers


def follow(model, ema, updates, applied=None):
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(updates):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
        ema.update(applied)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = expected[name] * ema.decay + (1 - ema.decay) * value
            else:
                expected[name] = value.clone()
    return expected


@pytest.mark.parametrize("device", [None, "cpu"])
def test_formula_over_all_entries(device):
    model = Net()
    ema = Ema(model, 0.9, device)
    assert all(torch.equal(a, b) for a, b in zip(ema.module.state_dict().values(), model.state_dict().values()))
    expected = follow(model, ema, 5, torch.tensor(True))
    assert list(ema.module.state_dict()) == list(model.state_dict())
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_an_update_that_was_not_applied_changes_nothing():
    model = Net()
    ema = Ema(model, 0.9)
    before = {name: value.clone() for name, value in ema.module.state_dict().items()}
    follow(model, ema, 2, torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in ema.module.state_dict().items())


@pytest.mark.parametrize("applied", [True, False])
def test_the_mask_of_accelerators_is_the_same_formula(applied):
    own, new = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    expected = [a.lerp(b, 0.1) if applied else a.clone() for a, b in zip(own, new)]
    masked_lerp_(own, new, (1 - 0.9) * torch.tensor(applied))
    torch.testing.assert_close(own, expected)
    assert applied or all(torch.equal(a, b) for a, b in zip(own, expected))


def test_it_needs_no_gradient_and_stays_in_eval_mode():
    model = Net().train()
    ema = Ema(model, 0.9)
    assert not ema.module.training and model.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_an_average_that_cannot_follow_is_reported_with_a_decay_that_fits():
    def notice(decay, updates, model_ema=True):
        return half_life_notice(Options(epochs=1, model_ema=model_ema, model_ema_decay=decay), updates)

    assert notice(0.9999, 300 * 312) is None is notice(0.9999, 40, model_ema=False)
    for updates in (40, 90, 500, 3000, 30_000):
        decay = float(notice(0.9999, updates).split()[-2])
        assert notice(decay, updates) is None and 0 < decay < 0.9999
