"""Learning rate and weight decay per update equal the published ones."""
import json
import math
from pathlib import Path

import pytest

from optim.schedule import Schedule, cosine

CASES = json.loads((Path(__file__).parent / "data/parity/schedules.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{value}" for value in case["args"].values()))
def test_published_values(case):
    args = case["args"]
    schedule = Schedule(args["base_value"], args["final_value"], 0.05, None, args["epochs"], args["niter_per_ep"],
                        args["warmup_epochs"], args.get("warmup_steps", -1))
    assert schedule.total == case["length"]
    for update, value in case["values"].items():
        assert schedule.lr(int(update)) == pytest.approx(value, rel=1e-12, abs=0)


@pytest.mark.parametrize("stored", [case for case in CASES if not case["args"]["warmup_epochs"]])
def test_weight_decay_has_no_warmup(stored):
    case = stored["args"]
    schedule = Schedule(1.0, 0.0, case["base_value"], case["final_value"], case["epochs"], case["niter_per_ep"],
                        warmup_epochs=3)
    for update, value in stored["values"].items():
        assert schedule.weight_decay(int(update)) == pytest.approx(value, rel=1e-12, abs=0)


def test_constant_weight_decay_and_the_end():
    schedule = Schedule(4e-3, 1e-6, 0.05, None, 2, 10)
    assert {schedule.weight_decay(update) for update in range(20)} == {0.05}
    assert schedule.lr(25) == schedule.lr(19)
    assert math.isfinite(cosine(0, 1.0, 0.1, total=5, warmup=5)) and cosine(4, 1.0, 0.1, 5, warmup=5) == 1.0
    assert cosine(0, 1.0, 0.1, total=5, warmup=1) == 0.0
