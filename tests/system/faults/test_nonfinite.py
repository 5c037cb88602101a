"""Losses that are no numbers, from the command line to the record in events.jsonl."""
import json
import os

import torch

from common.files import sha256_file, write_json
from run.checkpoint import load, manifest_path
from tests.kits.faults import Place, Row, check, table

HUGE = "--lr 1e9 --print_freq 1"


def records(place: Place, kind: str) -> list[dict]:
    lines = (place.run / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def named(place: Place) -> None:
    """The first record has what a person needs to look into it."""
    first = records(place, "nonfinite")[0]
    assert first["update"] == 1 and first["epoch"] == 0 and first["learning_rate"] > 1e8 and first["loss_scale"] == 1.0
    assert first["first_module"].startswith("stages.") and first["module_type"] and first["reproduced"] is True
    assert len(first["pictures"]) == 8 and all(os.path.isfile(path) for path in first["pictures"])
    assert "grad_norm" in first and first["action"] in ("skip", "stop", "rollback")


def last_good_kept(place: Place) -> None:
    """What was applied before the incident is what the last checkpoint holds, and it is finite."""
    named(place)
    state = torch.load(place.run / "checkpoint-0.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


def poisoned(place: Place) -> None:
    """Published weights with one undefined value."""
    state = torch.load(place.trained / "checkpoint-0.pth", weights_only=True)
    state["model"]["stages.1.0.gnconv.proj_in.weight"][3, 2] = float("nan")
    torch.save(state, place.here / "w.pth")


def overflowing(place: Place) -> None:
    """Weights that are finite and give outputs that aren't."""
    state = torch.load(place.trained / "checkpoint-0.pth", weights_only=True)
    model = {name: value * 1e30 if name.endswith("weight") else value for name, value in state["model"].items()}
    torch.save(state | {"model": model}, place.here / "w.pth")


def poisoned_run(place: Place) -> None:
    """A run whose newest checkpoint holds an undefined weight, with a manifest that fits it."""
    path = place.trained_run() / "checkpoint-0.pth"
    state = load(path).state
    state["model"]["stages.1.0.gnconv.proj_in.weight"][3, 2] = float("nan")
    torch.save(state, path)
    write_json(manifest_path(path), {"sha256": sha256_file(path), "size": path.stat().st_size})


@table([
    Row("stop", f"{HUGE} --on_nonfinite stop", 2, ("Update 1 was not applied", "first in module stages.", "next: stop",
                                                   "{run}/events.jsonl names the updates, pictures and modules",
                                                   "lower --lr"), after=named),
    Row("skip", f"{HUGE}", 0,
        ("Update 1 was not applied", "next: skip", "evaluated pictures gave outputs that are not numbers"),
        after=last_good_kept),
    Row("skip, three in a row", f"{HUGE} --epochs 3", 0,
        ("next: skip", "next: rollback", "Rolled back to the weights of update 2",
                                                         "training goes on with the data of update 4"),
        after=lambda place: records(place, "rollback")[0]["weights_of_update"] == 2 or 1 / 0),
    Row("rollback without anything to go back to", f"{HUGE} --on_nonfinite rollback", 2,
        ("no checkpoint to go back to: lower --lr",)),
    Row("weights to start from that are no numbers", "--finetune {here}/w.pth", 2,
        ("holds infinite or undefined values in stages.1.0.gnconv.proj_in.weight", "take an earlier checkpoint"),
        poisoned),
    Row("evaluated weights that are no numbers", "--resume {here}/w.pth", 2,
        ("holds infinite or undefined values",), poisoned,
        base="eval"),
    Row("evaluated weights that overflow", "--resume {here}/w.pth", 0,
        ("8 of 8 pictures gave outputs that are not numbers; they count as wrong", "top-1 0.00"), overflowing,
        base="eval"),
    Row("a checkpoint that is no numbers", "--model_ema true --model_ema_eval true --epochs 2", 2,
        ("the tensor stages.1.0.gnconv.proj_in.weight of model holds infinite or undefined values",), poisoned_run),
])
def test_nonfinite(row, place, capfd):
    check(row, place, capfd)
