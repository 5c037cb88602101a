"""Data folders that are not what the options say: classes, labels, layouts, indices."""
import json
import os
import shutil

import pytest
import timm
import torch

import models  # noqa: F401
from common.synsets import imagenet_synsets
from tests.kits.faults import MODEL, Place, Row, check, command, start, table
from tests.kits.images import fill_folder

TRAINED = "--resume {trained}/checkpoint-0.pth"


def classes(*names: str, train: int = 8, val: int = 4):
    """The data have these classes."""
    def prepare(place: Place) -> None:
        shutil.rmtree(place.data)
        place.pictures(train, val, names)
    return prepare


def without(*parts: str):
    """One folder of the data is missing."""
    return lambda place: shutil.rmtree(place.data.joinpath(*parts))


def emptied(place):
    for path in (place.data / "train" / "dog").iterdir():
        path.unlink()


def flat(place, labels: str | None = None):
    """A val folder without class folders."""
    shutil.rmtree(place.data / "val")
    fill_folder(place.data / "val", 4)
    if labels is not None:
        (place.here / "labels.csv").write_text(labels)


def twelve_numbers(place):
    shutil.rmtree(place.data)
    place.pictures(2, 1, [str(number) for number in range(12)])


def weights_of(number: int):
    """A file as published: weights alone, without class names."""
    def prepare(place):
        model = timm.create_model(MODEL, num_classes=number)
        torch.save({"model": model.state_dict()}, place.here / "w.pth")
    return prepare


def both(*steps):
    def prepare(place):
        for step in steps:
            step(place)
    return prepare


def images(count: int):
    def after(place):
        assert json.loads((place.here / "out" / "eval.json").read_text())["images"] == count
    return after


SYNSETS = (imagenet_synsets()[3], imagenet_synsets()[700])
W = f"--model {MODEL} --resume {{here}}/w.pth --output_dir {{here}}/out"


@table([
    Row("no such data", "--data_path /nowhere", 2, ("/nowhere/train",),
        after=lambda place: pytest.fail("a refused first start left a folder") if place.run.exists() else None),
    Row("no val folder", "", 2, ("{data}/val",), without("val")),
    Row("a class without images", "", 2, ("dog",), emptied),
    Row("val has a class more", TRAINED, 2, ("emu",), classes("cat", "dog", "emu"), base="eval"),
    Row("val has a class more, accepted", f"{TRAINED} --allow_class_mismatch true --output_dir {{here}}/out", 0,
        ("4 images",), classes("cat", "dog", "emu"), images(8), base="eval"),
    Row("classes by number that the checkpoint has not", f"{TRAINED} --nb_classes 3", 2, ("--nb_classes 3",), base="eval"),
    Row("flat val folder with labels", f"{TRAINED} --val_labels {{here}}/labels.csv --output_dir {{here}}/out", 0, (),
        lambda place: flat(place, "file,class\n0.JPEG,cat\n1.JPEG,dog\n2.JPEG,dog\n3.JPEG,cat\n"), images(4),
        base="eval"),
    Row("numbered folders and a file without class names", W, 2, ("'10' is class 2",),
        both(twelve_numbers, weights_of(12)), base="eval"),
    Row("numbered folders, accepted", f"{W} --allow_class_mismatch true", 0, ("'10' is class 2",),
        both(twelve_numbers, weights_of(12)), images(12), base="eval"),
    Row("a part of ImageNet with a 1000-class file", W, 0, ("2 of 1000 classes",),
        both(classes(*SYNSETS), weights_of(1000)), images(8), base="eval"),
    Row("a 22k head on two classes of ImageNet-1k", W, 0, ("1000 of its 10459 classes",),
        both(classes(*SYNSETS), weights_of(10459)), images(8), base="eval"),
    Row("a head of another size", W, 2, ("--nb_classes 7",), weights_of(7), base="eval"),
])
def test_data(row, place, capfd):
    check(row, place, capfd)


def test_names_that_are_not_utf_8_are_trained_and_evaluated_on(place, capfd):
    odd = os.fsencode(place.data / "val" / "cat") + b"/\xff\xfe\n.JPEG"
    with open(odd, "wb") as file:
        file.write((place.data / "val" / "cat" / "0.JPEG").read_bytes()[:-300])
    code, text = start(command("eval", TRAINED, place), capfd)
    assert code == 2 and "Traceback" not in text
    assert len(text[text.index("error: "):].strip().splitlines()) == 1 and r"\xff\xfe" in text
    code, text = start(command("eval", f"{TRAINED} --allow_bad_images true --report {{here}}/out", place), capfd)
    assert code == 0, text
