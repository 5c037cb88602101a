"""Checkpoints that are something else, damaged, hostile, or of another run."""
import json
import pickle
import shutil

import torch

import main
from run.checkpoint import Checkpoints
from tests.kits.faults import TRAIN, Place, Row, check, command, start, table
from tests.kits.images import fill_folder

TRAINED = "{trained}/checkpoint-0.pth"
BAD = "{here}/w.pth"
# The options of the trained run, with an epoch more.
FURTHER = "--model_ema true --model_ema_eval true --epochs 2"


def written(data: bytes):
    return lambda place: (place.here / "w.pth").write_bytes(data)


def edited(**changes):
    """The trained run's checkpoint with other entries; None leaves one out."""
    def prepare(place: Place) -> None:
        state = torch.load(place.trained / "checkpoint-0.pth", weights_only=True) | changes
        torch.save({name: value for name, value in state.items() if value is not None}, place.here / "w.pth")
    return prepare


def flipped(data: bytes) -> bytes:
    return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:]


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os
        return os.mkdir, (str(self.path),)


def hostile(**how):
    """A file that would make {here}/executed."""
    return lambda place: torch.save({"model": Hostile(place.here / "executed")}, place.here / "w.pth", **how)


def not_executed(place: Place) -> None:
    assert not (place.here / "executed").exists()


@table(
    Row("no file", f"--resume {BAD}", "?", (BAD,), base="eval"),
    Row("a text file", f"--resume {BAD}", "?", (BAD,), written(b"hello\n"), base="eval"),
    Row("a flipped bit without a manifest", f"--resume {BAD}", "?", (BAD, "CRC"),
        lambda place: written(flipped((place.trained / "checkpoint-0.pth").read_bytes()))(place),
        base="eval"),
    Row("hostile, today's format", f"--resume {BAD}", "?", (BAD, "mkdir"), hostile(), not_executed,
        base="eval"),
    Row("hostile, the older format", f"--resume {BAD}", "?", (BAD, "mkdir"),
        hostile(_use_new_zipfile_serialization=False), not_executed, base="eval"),
    Row("another HorNet", f"--resume {TRAINED} --model hornet_nano_7x7", "?", ("hornet_pico_7x7",),
        base="eval"),
    Row("settings that cannot be", f"--resume {BAD}", "?", ("crop_pct", "big"),
        edited(args={"model": "hornet_pico_7x7", "crop_pct": "big"}), base="eval"),
    Row("the average of a run without one", f"--resume {BAD} --weights ema", "?", ("model_ema",),
        edited(model_ema=None), base="eval"))
def test_evaluating(row, place, capfd):
    check(row, place, capfd)


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
    path.write_bytes(flipped(path.read_bytes()))


def all_cut(place: Place) -> None:
    for path in place.trained_run().glob("checkpoint-*.pth"):
        path.write_bytes(path.read_bytes()[:1000])


def other_classes(place: Place) -> None:
    place.trained_run()
    shutil.rmtree(place.data)
    place.images(classes=("cow", "emu"))


def fewer_images(place: Place) -> None:
    place.trained_run()
    shutil.rmtree(place.data / "train")
    place.images(4, 4)


def an_image_more(place: Place) -> None:
    place.trained_run()
    fill_folder(place.data / "train" / "cat", 9)


def noted(place: Place) -> None:
    """The change is kept with the run, and noted once: the new number is that of the next checkpoint."""
    further(place)
    events = map(json.loads, (place.run / "events.jsonl").read_text().splitlines())
    assert [event["before"] for event in events if "changed" in event["kind"]] == [16]


@table(
    Row("another model in the folder", "--model hornet_pico_gf --epochs 2", "?",
        ("hornet_pico_7x7", "hornet_pico_gf"), finished, kept),
    Row("another recipe in the folder", f"{FURTHER} --lr 1e-3", "?", ("lr 0.004", "0.001"), finished, kept),
    Row("another recipe, resumed by name", f"{FURTHER} --lr 1e-3 --resume {TRAINED}", 0,
        ("lr 0.004", "0.001")),
    Row("another global batch", f"{FURTHER} --global_batch 16", "?", ("--global_batch 16", "8"), finished,
        kept),
    Row("other classes", FURTHER, "?", ("cow",), other_classes, kept),
    Row("fewer images", FURTHER, "?", ("--finetune",), fewer_images, kept),
    Row("an image more", FURTHER, 0, ("17", "16"), an_image_more, noted),
    Row("no resumption wanted in a used folder", f"{FURTHER} --auto_resume false", "?",
        ("--auto_resume false",), finished, kept),
    Row("resume from weights alone", f"{FURTHER} --resume {BAD}", "?", ("optimizer", "--finetune"),
        lambda place: torch.save({"model": {}}, place.here / "w.pth")),
    Row("odd entries", f"{FURTHER} --resume {BAD}", "?", ("update", "threads"),
        edited(update="x", threads=-1)),
    Row("an optimizer of other tensors", f"{FURTHER} --resume {BAD}", "?", ("optimizer",),
        edited(optimizer={"state": {}, "param_groups": []})),
    Row("an update that cannot be", f"{FURTHER} --resume {BAD}", "?", ("1000000",), edited(update=10 ** 6)),
    Row("fine-tune from another model", f"--finetune {TRAINED} --model hornet_pico_gf", "?",
        ("hornet_pico_7x7",)),
    Row("the newest has a flipped bit", FURTHER, 0, ("checkpoint-1.pth",), two_epochs),
    Row("all are cut", FURTHER, "?", ("{run}", "--output_dir"), all_cut),
    Row("without a manifest, but named", f"{FURTHER} --resume {{run}}/checkpoint-0.pth", 0, (),
        lambda place: (place.trained_run() / "checkpoint-0.pth.json").unlink(), further),
    Row("a finished run again", "--model_ema true --model_ema_eval true", 0, ("checkpoint-best",), finished,
        kept),
    Row("more epochs", FURTHER, 0, (), finished, further))
def test_training(row, place, capfd):
    check(row, place, capfd)


def test_best_is_never_overwritten_by_a_worse_epoch_after_resuming(place, capfd):
    """The best file says 100 %, more than any epoch of these images reaches."""
    place.trained_run()
    state = torch.load(place.run / "checkpoint-best.pth", weights_only=True)
    Checkpoints(place.run).save(state, epoch=0,
                                best={"checkpoint-best.pth": 100.0, "checkpoint-best-ema.pth": 100.0},
                                wait=True)
    before = {path: path.read_bytes() for path in place.run.glob("checkpoint-best*")}
    assert start(command("train", FURTHER, place), capfd)[0] == 0
    assert before == {path: path.read_bytes() for path in before}
    assert (place.run / "checkpoint-1.pth").exists()


def test_several_checkpoints_and_both_weights_in_one_pass(place, capfd):
    place.trained_run()
    argv = "--resume {run}/checkpoint-0.pth {run}/checkpoint-best.pth --weights both --output_dir {here}/out"
    assert start(command("eval", argv, place), capfd)[0] == 0
    results = json.loads((place.here / "out" / "eval.json").read_text())["results"]
    assert [result["weights"] for result in results] == ["model", "model_ema"] * 2


def test_hostile_bytes_in_the_records_are_only_text(place, capfd):
    """The run's JSON files are read as JSON, whatever they hold."""
    place.trained_run()
    for name in ("status.json", "attempts.jsonl", "log.txt", "owner.json", "checkpoint-best.pth.json"):
        (place.run / name).write_bytes(pickle.dumps(Hostile(place.here / "executed")))
    check(Row("hostile records", FURTHER, 0, after=not_executed), place, capfd)
