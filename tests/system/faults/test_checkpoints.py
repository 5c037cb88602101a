"""Checkpoints that are something else, damaged, hostile, or of another run."""
import io
import json
import pickle
import shutil
import zipfile

import pytest
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


def saved(value):
    return lambda place: torch.save(value, place.here / "w.pth")


def edited(**changes):
    """The trained run's checkpoint with other entries; None leaves one out."""
    def prepare(place: Place) -> None:
        state = torch.load(place.trained / "checkpoint-0.pth", weights_only=True) | changes
        torch.save({name: value for name, value in state.items() if value is not None}, place.here / "w.pth")
    return prepare


def damaged(name: str, how):
    """A copy of the trained run in run/, one file of it changed by `how(bytes)`."""
    def prepare(place: Place) -> None:
        path = place.trained_run() / name
        path.write_bytes(how(path.read_bytes()))
    return prepare


def flipped(data: bytes) -> bytes:
    return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:]


def compressed(place: Place) -> None:
    with zipfile.ZipFile(place.here / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * (1 << 24))


def cut(place: Place) -> None:
    data = (place.trained / "checkpoint-0.pth").read_bytes()
    (place.here / "w.pth").write_bytes(data[:len(data) // 2])


class Mine:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os
        return os.mkdir, (str(self.path),)


def hostile(wrap):
    """A file that would make {here}/executed."""
    def prepare(place: Place) -> None:
        wrap(Mine(place.here / "executed"), place.here / "w.pth")
    return prepare


def not_executed(place: Place) -> None:
    assert not (place.here / "executed").exists()


def legacy(value, path) -> None:
    torch.save({"model": value}, path, _use_new_zipfile_serialization=False)


def two_epochs(place: Place) -> None:
    """A run of two epochs in run/ whose last checkpoint is damaged."""
    place.trained_run()
    assert main.main(command(TRAIN, FURTHER, place)) == 0
    path = place.run / "checkpoint-1.pth"
    path.write_bytes(flipped(path.read_bytes()))


EVALUATED = [
    Row("no file", f"--resume {BAD}", 2, ("No checkpoint at {here}/w.pth",), base="eval"),
    Row("a folder", "--resume {trained}", 2,
        ("is a folder, not a checkpoint; name a file in it, such as checkpoint-",), base="eval"),
    Row("a text file", f"--resume {BAD}", 2,
        ("is not a checkpoint: it is a text file",), written(b"hello\n"), base="eval"),
    Row("an empty file", f"--resume {BAD}", 2, ("is not a checkpoint: it is empty",), written(b""), base="eval"),
    Row("a saved error page", f"--resume {BAD}", 2,
        ("it is a web page",), written(b"<!DOCTYPE html><html>404"), base="eval"),
    Row("a pointer of Git LFS", f"--resume {BAD}", 2, ("Git LFS pointer",),
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), base="eval"),
    Row("cut in half", f"--resume {BAD}", 2, ("is truncated or damaged",), cut, base="eval"),
    Row("a flipped bit without a manifest", f"--resume {BAD}", 2, ("is damaged: the checksum (CRC)",),
        lambda place: (place.here / "w.pth").write_bytes(flipped((place.trained / "checkpoint-0.pth").read_bytes())),
        base="eval"),
    Row("a bomb of compressed zeros", f"--resume {BAD}", 2, ("holds compressed members",), compressed, base="eval"),
    Row("hostile, today's format", f"--resume {BAD}", 2, ("it wants to run", "mkdir"),
        hostile(lambda mine, path: torch.save({"model": mine}, path)), not_executed, base="eval"),
    Row("hostile, the older format", f"--resume {BAD}", 2,
        ("it wants to run", "mkdir"), hostile(legacy), not_executed, base="eval"),
    Row("hostile, a bare pickle", f"--resume {BAD}", 2, ("cannot be loaded",),
        hostile(lambda mine, path: path.write_bytes(pickle.dumps({"model": mine}))), not_executed, base="eval"),
    Row("a whole module", f"--resume {BAD}", 2, ("it wants to run torch.nn.modules.linear.Linear",),
        saved({"model": torch.nn.Linear(2, 2)}), base="eval"),
    Row("a list", f"--resume {BAD}", 2, ("holds a list, not a checkpoint",), saved([1, 2]), base="eval"),
    Row("no weights", f"--resume {BAD}", 2,
        ("has no weights under model or module", "its entries are: epoch"), saved({"epoch": 3}),
        base="eval"),
    Row("another network's weights", f"--resume {BAD}", 2, ("does not hold this model", "not those of a HorNet"),
        saved({"model": {"fc.weight": torch.zeros(3, 3)}}), base="eval"),
    Row("another HorNet", f"--resume {TRAINED} --model hornet_nano_7x7", 2,
        ("does not hold this model, it looks like hornet_pico_7x7",),
        base="eval"),
    Row("settings that cannot be", f"--resume {BAD}", 2, ("the checkpoint's crop_pct 'big' is not accepted",),
        edited(args={"model": "hornet_pico_7x7", "crop_pct": "big"}), base="eval"),
    Row("a model unknown here", f"--resume {BAD}", 2, ("the checkpoint's model 'vgg16' is not known here",),
        edited(args={"model": "vgg16"}), base="eval"),
    Row("the average of a run without one", f"--resume {BAD} --weights ema", 2, ("has no weights under model_ema",),
        edited(model_ema=None), base="eval"),
    Row("no https", "--resume http://example.org/w.pth", 2, ("not an https address",), base="eval"),
]


@table([*EVALUATED])
def test_evaluating(row, place, capfd):
    check(row, place, capfd)


def kept(place: Place) -> None:
    """The refused start has changed no checkpoint of the folder."""
    for path in place.trained.glob("*.pth"):
        assert (place.run / path.name).read_bytes() == path.read_bytes()


def nothing(place):
    place.trained_run()


def pictures_gone(place):
    place.trained_run()
    shutil.rmtree(place.data / "train")
    place.pictures(4, 4)


def a_picture_more(place):
    place.trained_run()
    fill_folder(place.data / "train" / "cat", 9)


def told(place: Place) -> None:
    """The change is kept with the run, and told once: the new number is that of the next checkpoint."""
    lines = (place.run / "events.jsonl").read_text().splitlines()
    assert [(e["before"], e["pictures"]) for e in map(json.loads, lines) if e["kind"] == "pictures_changed"] == [(16, 17)]
    assert torch.load(place.run / "checkpoint-1.pth", weights_only=True)["pictures"] == 17


def no_manifest(place):
    (place.trained_run() / "checkpoint-0.pth.json").unlink()


@table([
    Row("another model in the folder", "--model hornet_pico_gf --epochs 2", 2,
        ("belongs to another run: model hornet_pico_7x7 there, hornet_pico_gf here",), nothing, kept),
    Row("another recipe in the folder", f"{FURTHER} --lr 1e-3", 2,
        ("belongs to another run: lr 0.004 there, 0.001 here",), nothing, kept),
    Row("another recipe, resumed by name", f"{FURTHER} --lr 1e-3 --resume {TRAINED}", 0,
        ("Resuming with another option: lr 0.004 there, 0.001 here", "Going on at epoch 2, update 2")),
    Row("another global batch", f"{FURTHER} --global_batch 16", 2,
        ("--global_batch 16 differs from the checkpoint's 8",), nothing, kept),
    Row("other classes", FURTHER, 2, ("None of the 2 class folders",),
        lambda place: [place.trained_run(), shutil.rmtree(place.data), place.pictures(classes=("cow", "emu"))], kept),
    Row("fewer pictures", FURTHER, 2,
        ("an epoch has 1 updates, so the data set is not the one the run began with",), pictures_gone, kept),
    Row("a picture more", FURTHER, 0, ("The training set has 17 pictures and had 16 when the checkpoint was saved",
                                       "epoch 2/2 done"), a_picture_more, told),
    Row("an older checkpoint that does not count pictures", f"{FURTHER} --resume {BAD}", 0,
        ("Going on at epoch 2, update 2",), edited(pictures=None), unsaid=("pictures and had",)),
    Row("no resumption wanted in a used folder", f"{FURTHER} --auto_resume false", 2,
        ("holds the checkpoints of an earlier run",),
        nothing, kept),
    Row("resume from weights alone", f"{FURTHER} --resume {BAD}", 2,
        ("has no optimizer and no epoch", "--finetune"), saved({"model": {}})),
    Row("resume from a later format", f"--resume {BAD}", 2,
        ("has checkpoint format 9", "update the code"), edited(format=9)),
    Row("an odd optimizer entry", f"{FURTHER} --resume {BAD}", 2,
        ("its entry optimizer holds something else",), edited(optimizer={})),
    Row("odd counters", f"{FURTHER} --resume {BAD}", 2,
        ("its entry update and its entry threads holds",), edited(update="x", threads=-1)),
    Row("an optimizer of other tensors", f"{FURTHER} --resume {BAD}", 2,
        ("the checkpoint's optimizer state has groups of [] tensors",),
        edited(optimizer={"state": {}, "param_groups": []})),
    Row("an update that is not there", f"{FURTHER} --resume {BAD}", 2,
        ("stands at update 1000000",), edited(update=10 ** 6)),
    Row("fine-tune from another model", f"--finetune {TRAINED} --model hornet_pico_gf", 2,
        ("it looks like hornet_pico_7x7",)),
    Row("the newest has a flipped bit", FURTHER, 0,
        ("Passed over checkpoint-1.pth:", "is not the file that was saved", "Going on at epoch 2, update 2"),
        two_epochs),
    Row("the only one is cut", FURTHER, 2,
        ("None of the 1 checkpoints in {run} can be used", "start anew in another --output_dir"),
        damaged("checkpoint-0.pth", lambda data: data[:1000])),
    Row("the only one has no manifest", FURTHER, 2, ("has no manifest; name it with --resume",), no_manifest),
    Row("without a manifest, but named", f"{FURTHER} --resume {{run}}/checkpoint-0.pth", 0,
        ("Going on at epoch 2, update 2",), no_manifest),
    Row("a damaged manifest", FURTHER, 2, ("checkpoint-0.pth.json is not readable as JSON",),
        damaged("checkpoint-0.pth.json", lambda data: data[:10])),
    Row("a finished run again", "--model_ema true --model_ema_eval true", 0,
        ("This run has finished its 1 epoch", "checkpoint-best", "of 8 pictures right"), nothing, kept),
    Row("a finished run, named from elsewhere", f"--model_ema true --model_ema_eval true --resume {TRAINED}", 0,
        ("This run has finished its 1 epoch", "of 8 pictures right")),
    Row("more epochs", FURTHER, 0, ("Going on at epoch 2, update 2", "epoch 2/2 done"), nothing,
        lambda place: [json.loads(line)["epoch"] for line in (place.run / "log.txt").read_text().splitlines()] == [0,
        1] or pytest.fail()),
])
def test_training(row, place, capfd):
    check(row, place, capfd)


def test_best_is_never_overwritten_by_a_worse_epoch_after_resuming(place, capfd):
    """The best file says 100 %, more than any epoch of these pictures reaches."""
    place.trained_run()
    state = torch.load(place.run / "checkpoint-best.pth", weights_only=True)
    Checkpoints(place.run).save(state, epoch=0, best={"checkpoint-best.pth": 100.0, "checkpoint-best-ema.pth": 100.0},
        wait=True)
    before = {path: path.read_bytes() for path in place.run.glob("checkpoint-best*")}
    assert start(command("train", FURTHER, place), capfd)[0] == 0
    assert before == {path: path.read_bytes() for path in before}
    assert (place.run / "checkpoint-1.pth").exists()


def test_several_checkpoints_and_both_weights_in_one_pass(place, capfd):
    place.trained_run()
    code, text = start(command("eval",
        "--resume {run}/checkpoint-0.pth {run}/checkpoint-best.pth --weights both --output_dir {here}/out",
                               place), capfd)
    assert code == 0 and text.count("of 8 pictures right") == 4, text
    results = json.loads((place.here / "out" / "eval.json").read_text())["results"]
    assert [result["weights"] for result in results] == ["model", "model_ema"] * 2


def test_hostile_bytes_inside_a_manifest_and_the_records_are_only_text(place, capfd):
    """The run's JSON files are read as JSON, whatever they hold."""
    place.trained_run()
    buffer = io.BytesIO(pickle.dumps(Mine(place.here / "executed")))
    for name in ("status.json", "attempts.jsonl", "log.txt", "owner.json", "checkpoint-best.pth.json"):
        (place.run / name).write_bytes(buffer.getvalue())
    code, text = start(command("train", FURTHER, place), capfd)
    assert code == 0 and "Traceback" not in text, text
    not_executed(place)
