"""The moving average of the weights: its formula, its mask on accelerators, and the half-life notice."""
import pytest
import torch
from torch import nn

from config.options import Options
from optim.ema import Ema, half_life_notice, masked_lerp_


@pytest.mark.parametrize("device", [None, "cpu"])
def test_formula_over_all_entries(device):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # float and integer buffers
    ema = Ema(model, 0.9, device)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(ema.module.state_dict()) == list(expected) and not ema.module.training
    for _ in range(5):
        for name, value in model.state_dict().items():
            value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
            expected[name] = expected[name] * 0.9 + 0.1 * value if value.is_floating_point() else value.clone()
        ema.update(torch.tensor(True))
    torch.testing.assert_close(dict(ema.module.state_dict()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("applied", [True, False])
def test_the_mask_of_accelerators_is_the_same_formula(applied):
    own, new = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    expected = [a.lerp(b, 0.1) if applied else a.clone() for a, b in zip(own, new)]
    masked_lerp_(own, new, (1 - 0.9) * torch.tensor(applied))
    torch.testing.assert_close(own, expected, **({} if applied else dict(rtol=0, atol=0)))


def test_an_average_that_cannot_follow_is_reported_with_a_decay_that_fits():
    def notice(decay, updates, model_ema=True):
        return half_life_notice(Options(epochs=1, model_ema=model_ema, model_ema_decay=decay), updates)

    assert notice(0.9999, 300 * 312) is None is notice(0.9999, 40, model_ema=False)
    for updates in (40, 90, 500, 3000, 30_000):
        decay = float(notice(0.9999, updates).split()[-2])
        assert notice(decay, updates) is None and 0 < decay < 0.9999
