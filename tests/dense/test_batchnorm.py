"""Statistics of BatchNorm belong to an update: one that is not applied, or only diagnosed, leaves them."""
import math

import pytest
import torch
from torch import nn

from optim.build import build_optimizer
from optim.finite import diagnose
from optim.schedule import Schedule
from optim.update import Update
from tests.kits.toy import options


@pytest.mark.parametrize("bad", [math.nan, None])
def test_only_an_applied_update_moves_the_statistics(bad):
    torch.manual_seed(0)
    values, model = options(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    update = Update(model, build_optimizer(model, values), Schedule(values, 10), values)
    x = torch.randn(2, 3, 8, 8)
    x[0, 0, 0, 0] = x[0, 0, 0, 0] if bad is None else bad
    before = [buffer.clone() for buffer in model.buffers()]
    found = diagnose(model, lambda: model(x).square().mean())
    assert found["reproduced"] == (bad is not None)
    assert all(map(torch.equal, before, model.buffers()))
    with update.micro_batch(last=True):
        update.backward((model(x) ** 2).mean())
    assert bool(update.step(1).finite) == (bad is None)
    assert all(map(torch.equal, before, model.buffers())) == (bad is not None)
