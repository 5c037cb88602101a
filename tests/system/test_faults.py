"""Faults from the command line to the last line on the screen: one row per place that refuses or copes.

What a room refuses in detail is tested in tests/unit; here is that a person gets one sentence, the right exit
code and an unharmed run folder.
"""
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main
import models  # noqa: F401
from common.synsets import imagenet_synsets
from run.folder import RunFolder
from tests.kits.errors import Hostile
from tests.kits.faults import EVAL, MODEL, TRAIN, Place, Row, check, command, start, table
from tests.kits.images import bomb, encoded, fill_folder, jpeg, noise

LAST = "--resume {trained}/checkpoint-0.pth"
OUT = "--output_dir {here}/out"
BAD = "{here}/w.pth"
# The options of the trained run, with an epoch more.
FURTHER = "--model_ema true --model_ema_eval true --epochs 2"
POISONED = "stages.1.0.gnconv.proj_in.weight"


# -------------------------------------------------------------------------------------------- options and
# machine

def untouched(place):
    """A refused command line has made no run folder."""
    assert not place.run.exists()


def owned(place):
    """Another training owns run/: a lock of a second open file refuses the first, in one process too."""
    place.other = RunFolder(place.run)
    place.other.lock()


@table(
    Row("unknown model", "--model hornet_tny_7x7", "unknown_model", ("hornet_tiny_7x7",), after=untouched),
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
    Row("a run folder in use", "", "folder_in_use", ("{run}", f"pid {os.getpid()}", "--output_dir"),
        owned),
    Row("evaluating beside a training", f"{LAST} --output_dir {{run}}", 0, (), owned, base="eval"),
    Row("an index cache that cannot be written", "--index_cache /proc/nothing", 0))
def test_options_and_machine(row, place, capfd):
    check(row, place, capfd)


def test_a_missing_package_for_extra_logging_costs_only_the_log(place, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    names = ("pip install wandb", "pip install tensorboardX")
    check(Row("no packages", "--enable_wandb true", 0, names), place, capfd)


# --------------------------------------------------------------------------------------------- data and
# images

def a_class_more(place: Place) -> None:
    fill_folder(place.data / "val" / "emu", 4)


def two_synsets(place: Place) -> None:
    """Two classes of ImageNet-1k, and a file as published for 22k: weights alone, without class names."""
    shutil.rmtree(place.data)
    place.images(2, 1, (imagenet_synsets()[3], imagenet_synsets()[700]))
    torch.save({"model": timm.create_model(MODEL, num_classes=10459).state_dict()}, place.here / "w.pth")


def with_image(data: bytes, part: str = "val"):
    """The third cat of `part` is `data`."""
    return lambda place: (place.data / part / "cat" / "2.JPEG").write_bytes(data)


def odd(place: Place) -> None:
    """What is readable, whatever its name says."""
    rgb = noise(0, (44, 40))
    deep = Image.fromarray(np.asarray(rgb)[:, :, 0].astype(np.uint16) * 257)
    files = [encoded(rgb, "PNG"), encoded(rgb.convert("CMYK"), "JPEG"), encoded(rgb.convert("L"), "JPEG"),
             encoded(deep, "PNG"), encoded(rgb.quantize(16), "PNG", transparency=bytes(range(16))),
             encoded(rgb, "JPEG", exif=b"Exif\0\0" + b"\xff" * 50), encoded(rgb.crop((0, 0, 1, 1)), "PNG"),
             encoded(rgb.resize((900, 2)), "JPEG")]
    for number, data in enumerate(files):
        (place.data / "val" / "dog" / f"odd{number}.JPEG").write_bytes(data)


def evaluated(count: int, bad: int = 0):
    def after(place):
        result = json.loads((place.here / "out" / "eval.json").read_text())
        assert (result["images"], result["bad_images"]) == (count, bad)
    return after


@table(
    Row("no such data", "--data_path /nowhere", "missing_data", ("/nowhere/train", "--data_path"),
        after=untouched),
    Row("val has a class more, accepted", f"{LAST} {OUT} --allow_class_mismatch true", 0, ("4",),
        a_class_more, evaluated(8), base="eval"),
    Row("a 22k head on two classes of ImageNet-1k", f"--model {MODEL} --resume {BAD} {OUT}", 0, (), two_synsets,
        evaluated(2), base="eval"),
    Row("unreadable, in evaluation", f"{LAST} {OUT}", "unreadable_image",
        ("{data}/val/cat/2.JPEG", "--allow_bad_images true"), with_image(bomb()), base="eval"),
    Row("unreadable, allowed", f"{LAST} {OUT} --allow_bad_images true", 0, (), with_image(jpeg(1)[:-400]),
        evaluated(8, 1), base="eval"),
    Row("unreadable, in training", "--epochs 2", 0, ("{data}/train/cat/2.JPEG",), with_image(b"", "train"),
        lambda place: len(events(place, "unreadable_image")) == 1 or pytest.fail("not reported once per run")),
    Row("odd but readable, in evaluation", f"{LAST} {OUT}", 0, (), odd, evaluated(16), base="eval"))
def test_data_and_images(row, place, capfd):
    check(row, place, capfd)


# ------------------------------------------------------------------------------------------------ checkpoints

def hostile(place: Place) -> None:
    torch.save({"model": Hostile(place.here / "executed")}, place.here / "w.pth")


def not_executed(place: Place) -> None:
    assert not (place.here / "executed").exists()


def weights(change):
    """The trained run's checkpoint, its weights changed by `change(name, tensor)`."""
    def prepare(place: Place) -> None:
        state = torch.load(place.trained / "checkpoint-0.pth", weights_only=True)
        state["model"] = {name: change(name, value) for name, value in state["model"].items()}
        torch.save(state, place.here / "w.pth")
    return prepare


def finished(place: Place) -> None:
    place.trained_run()


def kept(place: Place) -> None:
    """The refused start has changed no checkpoint of the folder."""
    for path in place.trained.glob("*.pth"):
        assert (place.run / path.name).read_bytes() == path.read_bytes()


def further(place: Place) -> None:
    """It was resumed at its second epoch and finished it."""
    assert [json.loads(line)["epoch"] for line in (place.run / "log.txt").read_text().splitlines()] == [0, 1]
    starts = [json.loads(line) for line in (place.run / "attempts.jsonl").read_text().splitlines()]
    assert [line["from_update"] for line in starts if "from_update" in line][-1] == 2


def two_epochs(place: Place) -> None:
    """A run of two epochs in run/ whose last checkpoint is damaged."""
    place.trained_run()
    assert main.main(command(TRAIN, FURTHER, place)) == 0
    path = place.run / "checkpoint-1.pth"
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:])


def events(place: Place, kind: str) -> list[dict]:
    lines = (place.run / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@table(
    Row("hostile, today's format", f"--resume {BAD}", "unsafe_checkpoint", (BAD, "mkdir"), hostile,
        not_executed, base="eval"),
    Row("weights that are no numbers", f"--resume {BAD}", "nonfinite_weights", (POISONED,),
        weights(lambda name, value: value * float("nan") if name == POISONED else value), base="eval"),
    Row("weights that overflow", f"--resume {BAD}", 0, ("8 of 8", "top-1 0.00"),
        weights(lambda name, value: value * 1e30 if name.endswith("weight") else value), base="eval"),
    Row("another recipe in the folder", f"{FURTHER} --lr 1e-3", "other_run", ("lr 0.004", "0.001"), finished,
        kept),
    Row("the newest has a flipped bit", FURTHER, 0, ("checkpoint-1.pth",), two_epochs),
    Row("a finished run again", "--model_ema true --model_ema_eval true", 0, ("--epochs", "--eval true"), finished,
        kept),
    Row("more epochs", FURTHER, 0, (), finished, further))
def test_checkpoints(row, place, capfd):
    check(row, place, capfd)


def test_hostile_bytes_in_the_records_and_the_index_are_only_text(place, capfd):
    place.trained_run()
    data = pickle.dumps(Hostile(place.here / "executed"))
    for name in ("status.json", "attempts.jsonl", "log.txt", "owner.json", "checkpoint-best.pth.json"):
        (place.run / name).write_bytes(data)
    check(Row("records", FURTHER, 0, after=not_executed), place, capfd)
    for folder, _, _ in os.walk(place.data):
        os.utime(folder, (1e9, 1e9))  # a folder that has just changed is not cached
    for _ in range(2):
        assert start(command(EVAL, f"{LAST} {OUT}", place), capfd)[0] == 0
        [cache] = place.cache.glob("*.index")
        cache.write_bytes(data)
    not_executed(place)


# ------------------------------------------------------------------------------- losses that are not finite

HUGE = "--lr 1e9 --print_freq 1"


def named(place: Place) -> None:
    """The first record has what a person needs to look into it, and what was applied before is kept."""
    first = events(place, "nonfinite")[0]
    assert (first["update"], first["epoch"], first["loss_scale"], first["reproduced"]) == (1, 0, 1.0, True)
    assert first["learning_rate"] > 1e8
    assert first["module_type"] and first["first_module"].startswith("stages.")
    assert len(first["images"]) == 8 and all(os.path.isfile(path) for path in first["images"])


def last_good_kept(place: Place) -> None:
    named(place)
    state = torch.load(place.run / "checkpoint-0.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


def rolled_back(place: Place) -> None:
    assert "rollback" in [record["action"] for record in events(place, "nonfinite")]
    assert [record["weights_of_update"] for record in events(place, "rollback")] == [2]


@table(
    Row("stop", f"{HUGE} --on_nonfinite stop", "nonfinite", ("{run}/events.jsonl", "--lr"), after=named),
    Row("skip", HUGE, 0, ("Update 1", "stages."), after=last_good_kept),
    Row("skip, three in a row", f"{HUGE} --epochs 3", 0, after=rolled_back))
def test_nonfinite(row, place, capfd):
    check(row, place, capfd)
