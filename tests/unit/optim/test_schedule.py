"""Learning rate and weight decay per update equal the published ones."""
import json

import pytest

from config.options import Options
from optim.schedule import Schedule, value
from tests.kits.fill import PARITY


@pytest.mark.parametrize("case", json.loads((PARITY / "schedules.json").read_text()),
                         ids=lambda case: "-".join(map(str, case["args"].values())))
def test_published_values(case):
    args, warmup = case["args"], case["args"]["warmup_epochs"]
    schedule = Schedule(Options(
        lr=args["base_value"], min_lr=args["final_value"], epochs=args["epochs"], warmup_epochs=warmup,
        warmup_steps=args.get("warmup_steps", -1), weight_decay=args["base_value"],
        weight_decay_end=args["final_value"]), args["niter_per_ep"])
    assert schedule.total == case["length"]
    for update, expected in case["values"].items():
        assert schedule.lr(int(update)) == pytest.approx(expected, rel=1e-12, abs=0)
        if int(update) >= schedule.warmup == 0:
            assert schedule.weight_decay(int(update)) == pytest.approx(expected, rel=1e-12, abs=0)


def test_constant_weight_decay_and_the_ends():
    schedule = Schedule(Options(lr=4e-3, min_lr=1e-6, epochs=2, warmup_epochs=1), 10)
    assert {schedule.weight_decay(update) for update in range(20)} == {0.05}  # nor has it a warm-up
    assert schedule.lr(25) == schedule.lr(19)
    assert value(4, 1.0, 0.1, 5, warmup=5) == 1.0 and value(0, 1.0, 0.1, total=5, warmup=1) == 0.0
