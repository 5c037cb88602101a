"""Learning rate and weight decay per update equal the published ones."""
import json
import math
from pathlib import Path

import pytest

from optim.schedule import SHAPES, Schedule
from optim.schedule import value as schedule_value

CASES = json.loads((Path(__file__).parents[2] / "data/parity/schedules.json").read_text())


def schedule_of(**values):
    return Schedule(**dict(base_lr=1.0, min_lr=0.0, base_weight_decay=0.05, weight_decay_end=None) | values)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case["args"].values())))
def test_published_values(case):
    args = case["args"]
    schedule = schedule_of(base_lr=args["base_value"], min_lr=args["final_value"], epochs=args["epochs"],
                           updates_per_epoch=args["niter_per_ep"], warmup_epochs=args["warmup_epochs"],
                           warmup_steps=args.get("warmup_steps", -1))
    assert schedule.total == case["length"]
    for update, value in case["values"].items():
        assert schedule.lr(int(update)) == pytest.approx(value, rel=1e-12, abs=0)


@pytest.mark.parametrize("stored", [case for case in CASES if not case["args"]["warmup_epochs"]])
def test_weight_decay_has_no_warmup(stored):
    case = stored["args"]
    schedule = schedule_of(base_weight_decay=case["base_value"], weight_decay_end=case["final_value"],
                           epochs=case["epochs"], updates_per_epoch=case["niter_per_ep"], warmup_epochs=3)
    for update, value in stored["values"].items():
        assert schedule.weight_decay(int(update)) == pytest.approx(value, rel=1e-12, abs=0)


def test_constant_weight_decay_and_the_end():
    schedule = schedule_of(base_lr=4e-3, min_lr=1e-6, epochs=2, updates_per_epoch=10)
    assert {schedule.weight_decay(update) for update in range(20)} == {0.05}
    assert schedule.lr(25) == schedule.lr(19)
    assert math.isfinite(schedule_value(0, 1.0, 0.1, total=5, warmup=5))
    assert schedule_value(4, 1.0, 0.1, 5, warmup=5) == 1.0
    assert schedule_value(0, 1.0, 0.1, total=5, warmup=1) == 0.0


def test_another_shape_is_a_row_of_the_table(monkeypatch):
    linear = lambda step, steps, base, final: base + (final - base) * step / steps
    monkeypatch.setitem(SHAPES, "linear", linear)
    schedule = schedule_of(base_lr=1.0, epochs=2, updates_per_epoch=10, shape="linear")
    assert [schedule.lr(update) for update in (0, 5, 10)] == [1.0, 0.75, 0.5]
