"""Data folders that are not what the options say: classes, labels, layouts, indices."""
import json
import os
import pickle
import shutil

import numpy as np
import timm
import torch

import models  # noqa: F401
from common.synsets import imagenet_synsets
from tests.kits.faults import EVAL, MODEL, Place, Row, check, command, start, table
from tests.kits.images import fill_folder

TRAINED = "--resume {trained}/checkpoint-0.pth"
OUT = "--output_dir {here}/out"
SYNSETS = (imagenet_synsets()[3], imagenet_synsets()[700])
W = f"--model {MODEL} --resume {{here}}/w.pth {OUT}"


def classes(*names: str, train: int = 8, val: int = 4):
    """The data have these classes."""
    def prepare(place: Place) -> None:
        shutil.rmtree(place.data)
        place.images(train, val, names)
    return prepare


def without(*parts: str):
    """One folder of the data is missing."""
    return lambda place: shutil.rmtree(place.data.joinpath(*parts))


def emptied(place):
    for path in (place.data / "train" / "dog").iterdir():
        path.unlink()


def flat(labels: str | None = None):
    """A val folder without class folders."""
    def prepare(place):
        shutil.rmtree(place.data / "val")
        fill_folder(place.data / "val", 4)
        if labels is not None:
            (place.here / "labels.csv").write_text(labels)
    return prepare


def weights_of(number: int, *names: str):
    """A file as published: weights alone, without class names; the data have the classes `names`, if any are
    given."""
    def prepare(place):
        torch.save({"model": timm.create_model(MODEL, num_classes=number).state_dict()}, place.here / "w.pth")
        if names:
            classes(*names, train=2, val=1)(place)
    return prepare


def evaluated(count: int):
    def after(place):
        assert json.loads((place.here / "out" / "eval.json").read_text())["images"] == count
    return after


def no_folder(place):
    assert not place.run.exists(), "a refused first start left a folder"


@table(
    Row("no such data", "--data_path /nowhere", "?", ("/nowhere/train", "--data_path"), after=no_folder),
    Row("no val folder", "", "?", ("{data}/val",), without("val")),
    Row("own images without a val folder", "--data_set image_folder --data_path {data}/train", "?",
        ("--eval_data_path", "--disable_eval true")),
    Row("a class without images", "", "?", ("dog",), emptied),
    Row("images without class folders",
        "--data_set image_folder --data_path {data}/train/cat --eval_data_path {data}/val", "?",
        ("{data}/train/cat",)),
    Row("val lacks a class", TRAINED, "?", ("cat", "--allow_class_mismatch true"), without("val", "cat"),
        base="eval"),
    Row("val has a class more", TRAINED, "?", ("emu",), classes("cat", "dog", "emu"), base="eval"),
    Row("val has a class more, accepted", f"{TRAINED} --allow_class_mismatch true {OUT}", 0, ("4",),
        classes("cat", "dog", "emu"), evaluated(8), base="eval"),
    Row("flat val folder", TRAINED, "?", ("--val_labels",), flat(), base="eval"),
    Row("flat val folder with labels", f"{TRAINED} --val_labels {{here}}/labels.csv {OUT}", 0, (),
        flat("file,class\n0.JPEG,cat\n1.JPEG,dog\n2.JPEG,dog\n3.JPEG,cat\n"), evaluated(4), base="eval"),
    Row("an image without a label", f"{TRAINED} --val_labels {{here}}/labels.csv", "?", ("1.JPEG",),
        flat("0.JPEG,cat\n"), base="eval"),
    Row("numbered folders and a file without class names", W, "?", ("'10'", "2"),
        weights_of(12, *map(str, range(12))), base="eval"),
    Row("numbered folders, accepted", f"{W} --allow_class_mismatch true", 0, ("'10'",),
        weights_of(12, *map(str, range(12))), evaluated(12), base="eval"),
    Row("a part of ImageNet with a 1000-class file", W, 0, ("2 of 1000",), weights_of(1000, *SYNSETS),
        evaluated(2), base="eval"),
    Row("a 22k head on two classes of ImageNet-1k", W, 0, ("10459",), weights_of(10459, *SYNSETS),
        evaluated(2), base="eval"),
    Row("a head of another size", W, "?", ("7", "--nb_classes"), weights_of(7), base="eval"))
def test_data(row, place, capfd):
    check(row, place, capfd)


class Hostile:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_damaged_or_hostile_index_is_made_again_and_not_executed(place, capfd):
    for folder, _, _ in os.walk(place.data):
        os.utime(folder, (1e9, 1e9))
    argv = command(EVAL, f"{TRAINED} {OUT}", place)
    assert start(argv, capfd)[0] == 0
    [cache] = place.cache.glob("*.npz")
    whole = cache.read_bytes()
    with np.load(cache) as stored:
        data = dict(stored)
    np.savez(cache, **data | {"names": np.array([Hostile(place.here / "executed")], dtype=object)})
    hostile = cache.read_bytes(), pickle.dumps(Hostile(place.here / "executed"))
    for damaged in (*hostile, whole[:len(whole) // 2], b"", whole[:100] + b"\xff" * 50 + whole[150:]):
        cache.write_bytes(damaged)
        assert start(argv, capfd)[0] == 0
        evaluated(8)(place)
    assert not (place.here / "executed").exists()


def test_names_that_are_not_utf_8_are_trained_and_evaluated_on(place, capfd):
    odd = os.fsencode(place.data / "val" / "cat") + b"/\xff\xfe\n.JPEG"
    with open(odd, "wb") as file:
        file.write((place.data / "val" / "cat" / "0.JPEG").read_bytes()[:-300])
    check(Row("refused", TRAINED, "?", (r"\xff\xfe",), base="eval"), place, capfd)
    check(Row("allowed", f"{TRAINED} --allow_bad_images true --report {{here}}/out", 0, base="eval"), place,
          capfd)
