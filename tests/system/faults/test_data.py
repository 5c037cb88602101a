"""Data folders that are not what the options say: classes, labels, layouts, indices."""
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import timm
import torch

import models  # noqa: F401
from common.synsets import imagenet_synsets, published_22k_synsets
from tests.kits.faults import EVAL, MODEL, Place, Row, check, command, start, table
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
    for picture in (place.data / "train" / "dog").iterdir():
        picture.unlink()


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
    Row("no such data", "--data_path /nowhere", 2,
        ("There is no folder /nowhere/train", "--data_path must hold train/ and val/"),
        after=lambda place: pytest.fail("a refused first start left a folder") if place.run.exists() else None),
    Row("the train folder instead of its parent", "--data_path {data}/train", 2,
        ("There is no folder {data}/train/train",)),
    Row("a picture instead of a folder", "--data_path {data}/train/cat/0.JPEG", 2, ("There is no folder",)),
    Row("no val folder", "", 2, ("There is no folder {data}/val",), without("val")),
    Row("own pictures without a val folder", "--data_set image_folder --data_path {data}/train", 2,
        ("--eval_data_path FOLDER", "--disable_eval true")),
    Row("a class without pictures", "", 2, ("1 class folders in", "hold no image, such as dog"), emptied),
    Row("no pictures at all", "", 2, ("holds no images (.jpg",),
        lambda place: [p.rename(p.with_suffix(".txt")) for p in place.data.rglob("*.JPEG")]),
    Row("pictures without class folders",
        "--data_set image_folder --data_path {data}/train/cat --eval_data_path {data}/val", 2,
        ("holds images but no class folders",)),
    Row("val lacks a class", TRAINED, 2,
        ("has no folder for cat", "--allow_class_mismatch true"), without("val", "cat"),
        base="eval"),
    Row("val has a class more", TRAINED, 2,
        ("has folders of no known class: emu",), classes("cat", "dog", "emu"), base="eval"),
    Row("val has a class more, accepted", f"{TRAINED} --allow_class_mismatch true --output_dir {{here}}/out", 0,
        ("4 images of folders without a class are left out",), classes("cat", "dog", "emu"), images(8), base="eval"),
    Row("val has other classes", TRAINED, 2,
        ("None of the 2 class folders", "(cow, emu) is one of the 2 classes (cat, dog)"),
        classes("cow", "emu"), base="eval"),
    Row("classes by number that the checkpoint has not", f"{TRAINED} --nb_classes 3", 2,
        ("--nb_classes 3 does not fit the 2 class folders",), base="eval"),
    Row("flat val folder", TRAINED, 2, ("holds images but no class folders", "--val_labels FILE"), flat, base="eval"),
    Row("flat val folder with labels", f"{TRAINED} --val_labels {{here}}/labels.csv --output_dir {{here}}/out", 0,
        ("4 images in 2 of 2 classes",),
        lambda place: flat(place, "file,class\n0.JPEG,cat\n1.JPEG,dog\n2.JPEG,dog\n3.JPEG,cat\n"), images(4),
        base="eval"),
    Row("a picture without a label", f"{TRAINED} --val_labels {{here}}/labels.csv", 2,
        ("has no line for 3 of 4 pictures, such as 1.JPEG",),
        lambda place: flat(place, "0.JPEG,cat\n"), base="eval"),
    Row("labels that are a picture", f"{TRAINED} --val_labels {{data}}/train/cat/0.JPEG", 2,
        ("--val_labels", "cannot be read"), flat, base="eval"),
    Row("devkit labels without their meta file", f"{TRAINED} --val_labels {{here}}/labels.csv", 2,
        ("needs the devkit's meta.mat",),
        lambda place: flat(place, "1\n2\n3\n4\n"), base="eval"),
    Row("numbered folders and a file without class names", W, 2, ("folder '10' is class 2", "leading zeros"),
        both(twelve_numbers, weights_of(12)), base="eval"),
    Row("numbered folders, accepted", f"{W} --allow_class_mismatch true", 0, ("folder '10' is class 2",),
        both(twelve_numbers, weights_of(12)), images(12), base="eval"),
    Row("a part of ImageNet with a 1000-class file", W, 0, ("2 of 1000 classes have a folder",),
        both(classes(*SYNSETS), weights_of(1000)), images(8), base="eval"),
    Row("a 22k head on two classes of ImageNet-1k", W, 0,
        ("The head's rows of 1000 of its 10459 classes are taken by their names",),
        both(classes(*SYNSETS), weights_of(10459)), images(8), base="eval"),
    Row("a head of another size", W, 2, ("has a head for 7 classes, and the model has one for 2", "--nb_classes 7"),
        weights_of(7), base="eval"),
])
def test_data(row, place, capfd):
    check(row, place, capfd)


def test_the_22k_order_is_complete():
    assert len(published_22k_synsets()) == 10459 and set(SYNSETS) <= set(published_22k_synsets())


class Mine:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def cached_index(place: Place, capfd):
    """An evaluation whose index is kept, and the file it is kept in."""
    for folder, _, _ in os.walk(place.data):
        os.utime(folder, (1e9, 1e9))
    argv = command(EVAL, f"{TRAINED} --output_dir {{here}}/out", place)
    assert start(argv, capfd)[0] == 0
    [cache] = place.cache.glob("*.npz")
    return argv, cache


def test_a_hostile_index_is_not_executed_and_made_anew(place, capfd):
    argv, cache = cached_index(place, capfd)
    with np.load(cache) as stored:
        data = dict(stored)
    data["names"] = np.array([Mine(place.here / "executed")], dtype=object)
    np.savez(cache, **data)
    assert start(argv, capfd)[0] == 0
    cache.write_bytes(pickle.dumps(Mine(place.here / "executed")))
    assert start(argv, capfd)[0] == 0
    assert not (place.here / "executed").exists()
    images(8)(place)


def test_an_index_of_another_folder_or_cut_short_is_made_anew(place, capfd):
    argv, cache = cached_index(place, capfd)
    whole = cache.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", whole[:100] + b"\xff" * 50 + whole[150:]):
        cache.write_bytes(damaged)
        assert start(argv, capfd)[0] == 0
        images(8)(place)


def test_names_that_are_not_utf_8_are_trained_and_evaluated_on(place, capfd):
    odd = os.fsencode(place.data / "val" / "cat") + b"/\xff\xfe\n.JPEG"
    with open(odd, "wb") as file:
        file.write((place.data / "val" / "cat" / "0.JPEG").read_bytes()[:-300])
    code, text = start(command("eval", TRAINED, place), capfd)
    assert code == 2 and "Traceback" not in text
    assert len(text[text.index("error: "):].strip().splitlines()) == 1 and r"\xff\xfe" in text
    code, text = start(command("eval", f"{TRAINED} --allow_bad_images true --report {{here}}/out", place), capfd)
    assert code == 0, text
