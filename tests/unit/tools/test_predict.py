"""The command: answers as text and json, unreadable files, heat maps, mistakes."""
import json

import numpy as np
import pytest
from PIL import Image

from tests.kits.trained import checkpoint, lively
from tools.predict import main

CLASSES = ["ant", "bee", "猫", "dog"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint-best.pth"
    return checkpoint(path, lively(), lively(seed=1), classes=CLASSES, model="hornet_pico_gf", input_size=64, crop_pct=0.9)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "déjà vu").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "déjà vu/猫 \n.jpg", "z.webp", "grey.png"]):
        pixels = rng.integers(0, 256, (70 + 9 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if "grey" in name else "RGB").save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def test_answers_name_the_checkpoints_classes_whatever_the_batch_and_heat_maps_are_written(file, images, tmp_path, capsys):
    maps = tmp_path / "maps"
    assert main([str(images), "--resume", str(file), "--topk", "9", "--batch_size", "2", "--out", "json"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    bad = rows.pop(str(images / "broken.jpg"))
    assert len(rows) == 4 and bad["top"] == [] and bad["error"]
    assert main([str(images), "--resume", str(file.parent), "--batch_size", "1", "--heatmap", str(maps)]) == 0
    text = capsys.readouterr().out
    assert "not readable" in text and "猫" in text
    for row in rows.values():
        shares = [answer["probability"] for answer in row["top"]]
        assert row["error"] is None and shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
        assert all(answer["class"] == CLASSES[answer["index"]] for answer in row["top"])
        assert ", ".join(f"{answer['name']} {answer['probability']:.1%}" for answer in row["top"]) in text
    made = sorted(maps.iterdir())
    assert len(made) == 4 and Image.open(made[0]).size == (64, 64)


@pytest.mark.parametrize("argv, named", [
    (["EMPTY", "--resume", "FILE"], "empty"), (["IMAGES"], "--resume"), (["IMAGES", "--resume", "IMAGES"], "images"),
    (["IMAGES", "--resume", "FILE", "--topk", "0"], "--topk"),
    (["IMAGES", "--resume", "FILE", "--device", "gpu"], "--device gpu")])
def test_mistakes_are_one_sentence_and_exit_2(argv, named, file, images, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    places = {"FILE": file, "IMAGES": images, "EMPTY": tmp_path / "empty"}
    assert main([str(places.get(word, word)) for word in argv]) == 2
    err = capfd.readouterr().err.strip()
    assert named in err and len(err.splitlines()) == 1


def test_only_unreadable_files_end_with_1(file, images):
    assert main([str(images / "broken.jpg"), "missing.jpg", "--resume", str(file)]) == 1
