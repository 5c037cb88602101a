"""Faults from the command line to the last line on the screen: one row per place that refuses or copes.

What a room refuses in detail is tested in tests/unit; here is that a person gets one sentence, the right exit
code and an unharmed run folder.
"""
import os
import pickle
import sys

import torch

from common.files import read_json, read_json_lines
from run.folder import RunFolder
from tests.kits.errors import Hostile
from tests.kits.faults import Place, Row, check, table
from tests.kits.images import bomb, jpeg

LAST = "--resume {trained}/checkpoint-0.pth"
OUT = "--output_dir {here}/out"
BAD = "{here}/w.pth"
# The options of the trained run, with an epoch more.
FURTHER = "--model_ema true --model_ema_eval true --epochs 2"
POISONED = "stages.1.0.gnconv.proj_in.weight"
HUGE = "--lr 1e9 --print_freq 1"


def owned(place: Place) -> None:
    """Another training owns run/: a lock of a second open file refuses the first, in one process too."""
    place.other = RunFolder(place.run)
    place.other.lock()


def with_image(data: bytes):
    """The third cat to evaluate is `data`."""
    return lambda place: (place.data / "val" / "cat" / "2.JPEG").write_bytes(data)


def hostile(place: Place) -> None:
    torch.save({"model": Hostile(place.here / "executed")}, place.here / "w.pth")


def weights(change):
    """The trained run's checkpoint, its weights changed by `change(name, tensor)`."""
    def prepare(place: Place) -> None:
        state = torch.load(place.trained / "checkpoint-0.pth", weights_only=True)
        state["model"] = {name: change(name, value) for name, value in state["model"].items()}
        torch.save(state, place.here / "w.pth")
    return prepare


def flipped(place: Place) -> None:
    """The run in run/ has a newer checkpoint with a flipped bit, and hostile bytes for records."""
    data = bytearray((place.trained_run() / "checkpoint-0.pth").read_bytes())
    data[len(data) // 2] ^= 4
    (place.run / "checkpoint-1.pth").write_bytes(data)
    for name in ("status.json", "owner.json", "checkpoint-best.pth.json"):
        (place.run / name).write_bytes(pickle.dumps(Hostile(place.here / "executed")))


# What is left after a row

def untouched(place: Place) -> None:
    """A refused command line has made no run folder."""
    assert not place.run.exists()


def one_bad(place: Place) -> None:
    result = read_json(place.here / "out" / "eval.json")
    assert (result["images"], result["bad_images"]) == (8, 1)


def not_executed(place: Place) -> None:
    assert not (place.here / "executed").exists()


def kept(place: Place) -> None:
    """The refused start has changed no checkpoint of the folder."""
    for path in place.trained.glob("*.pth"):
        assert (place.run / path.name).read_bytes() == path.read_bytes()


def further(place: Place) -> None:
    """It was resumed at its second epoch and finished it."""
    not_executed(place)
    assert [line["epoch"] for line in read_json_lines(place.run / "log.txt")] == [0, 1]
    starts = read_json_lines(place.run / "attempts.jsonl")
    assert [line["from_update"] for line in starts if "from_update" in line][-1] == 2


def named(place: Place) -> None:
    """The first record has what a person needs to look into it."""
    first = next(line for line in read_json_lines(place.run / "events.jsonl") if line["kind"] == "nonfinite")
    assert (first["update"], first["epoch"], first["loss_scale"], first["reproduced"]) == (1, 0, 1.0, True)
    assert first["learning_rate"] > 1e8
    assert first["module_type"] and first["first_module"].startswith("stages.")
    assert len(first["images"]) == 8 and all(os.path.isfile(path) for path in first["images"])


def rolled_back(place: Place) -> None:
    events = read_json_lines(place.run / "events.jsonl")
    assert "rollback" in [line.get("action") for line in events]
    assert [line["weights_of_update"] for line in events if line["kind"] == "rollback"] == [2]
    state = torch.load(place.run / "checkpoint-0.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


@table(
    Row("unknown model", "--model hornet_tny_7x7", "unknown_model", ("hornet_tiny_7x7",), after=untouched),
    Row("no such data", "--data_path /nowhere", "missing_data", ("/nowhere/train", "--data_path"), after=untouched),
    Row("a batch larger than the data", "--batch_size 64", "batch", ("16", "--batch_size")),
    # These two before the images are indexed, which takes minutes.
    Row("unknown optimizer", "--opt adamww", "invalid_value", ("--opt adamww", "adamw"), absent=("train: ",)),
    Row("a start that is missing", "--finetune nothere.pth", "missing_checkpoint", ("nothere.pth",),
        absent=("train: ",)),
    Row("nothing to evaluate", "--eval true", "missing_checkpoint", ("--resume",), after=untouched),
    Row("run folder that is a file", "--output_dir {data}/train/cat/0.JPEG", "unusable_folder",
        ("--output_dir", "0.JPEG")),
    Row("a check without a published figure", f"--eval true {LAST} --check true", 1, ("--check true",)),
    Row("a log folder that is a file", "--log_dir {data}/train/cat/0.JPEG", 0, ("{data}/train/cat/0.JPEG",)),
    Row("a run folder in use", "", "folder_in_use", ("{run}", f"pid {os.getpid()}", "--output_dir"), owned),
    Row("evaluating beside a training", f"{LAST} --output_dir {{run}}", 0, (), owned, base="eval"),
    Row("an index cache that cannot be written", "--index_cache /proc/nothing", 0),
    Row("unreadable image", f"{LAST} {OUT}", "unreadable_image", ("{data}/val/cat/2.JPEG", "--allow_bad_images true"),
        with_image(bomb()), base="eval"),
    Row("unreadable image, allowed", f"{LAST} {OUT} --allow_bad_images true", 0, (), with_image(jpeg(1)[:-400]), one_bad,
        base="eval"),
    Row("hostile checkpoint", f"--resume {BAD}", "unsafe_checkpoint", (BAD, "mkdir"), hostile, not_executed, base="eval"),
    Row("weights that are no numbers", f"--resume {BAD}", "nonfinite_weights", (POISONED,),
        weights(lambda name, value: value * float("nan") if name == POISONED else value), base="eval"),
    Row("weights that overflow", f"--resume {BAD}", 0, ("8 of 8", "top-1 0.00"),
        weights(lambda name, value: value * 1e30 if name.endswith("weight") else value), base="eval"),
    Row("another recipe in the folder", f"{FURTHER} --lr 1e-3", "other_run", ("lr 0.004", "0.001"), Place.trained_run,
        kept),
    Row("the newest has a flipped bit", FURTHER, 0, ("checkpoint-1.pth",), flipped, further),
    Row("a finished run again", "--model_ema true --model_ema_eval true", 0, ("--epochs", "--eval true"),
        Place.trained_run, kept),
    Row("not finite, stop", f"{HUGE} --on_nonfinite stop", "nonfinite", ("{run}/events.jsonl", "--lr"), after=named),
    Row("not finite, three in a row", f"{HUGE} --epochs 3", 0, ("Update 1", "stages."), after=rolled_back))
def test_a_fault(row, place, capfd):
    check(row, place, capfd)


def test_a_missing_package_for_extra_logging_costs_only_the_log(place, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    check(Row("no package", "", 0, ("pip install tensorboardX",)), place, capfd)
