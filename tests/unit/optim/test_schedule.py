"""Learning rate and weight decay per update equal the published ones."""
import json
import math
from pathlib import Path

import pytest

from config.options import Options
from optim.schedule import Schedule
from optim.schedule import value as schedule_value

CASES = json.loads((Path(__file__).parents[2] / "data/parity/schedules.json").read_text())


def schedule_of(updates_per_epoch, **values):
    return Schedule(Options(**dict(lr=1.0, min_lr=0.0, warmup_epochs=0) | values), updates_per_epoch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case["args"].values())))
def test_published_values(case):
    args = case["args"]
    schedule = schedule_of(args["niter_per_ep"], lr=args["base_value"], min_lr=args["final_value"],
                           epochs=args["epochs"], warmup_epochs=args["warmup_epochs"],
                           warmup_steps=args.get("warmup_steps", -1))
    assert schedule.total == case["length"]
    for update, value in case["values"].items():
        assert schedule.lr(int(update)) == pytest.approx(value, rel=1e-12, abs=0)


@pytest.mark.parametrize("stored", [case for case in CASES if not case["args"]["warmup_epochs"]])
def test_weight_decay_has_no_warmup(stored):
    case = stored["args"]
    schedule = schedule_of(case["niter_per_ep"], weight_decay=case["base_value"], epochs=case["epochs"],
                           weight_decay_end=case["final_value"], warmup_epochs=3)
    for update, value in stored["values"].items():
        assert schedule.weight_decay(int(update)) == pytest.approx(value, rel=1e-12, abs=0)


def test_constant_weight_decay_and_the_end():
    schedule = schedule_of(10, lr=4e-3, min_lr=1e-6, epochs=2)
    assert {schedule.weight_decay(update) for update in range(20)} == {0.05}
    assert schedule.lr(25) == schedule.lr(19)
    assert math.isfinite(schedule_value(0, 1.0, 0.1, total=5, warmup=5))
    assert schedule_value(4, 1.0, 0.1, 5, warmup=5) == 1.0
    assert schedule_value(0, 1.0, 0.1, total=5, warmup=1) == 0.0
