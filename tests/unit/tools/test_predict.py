"""The command: answers as text and json, unreadable files, heat maps, mistakes."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images import decode_path
from models import load
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


def test_json_has_the_checkpoints_names_and_transform_and_unreadable_files(file, images, capsys):
    assert main([str(images), "--resume", str(file), "--topk", "9", "--batch_size", "2", "--out", "json"]) == 0
    rows, trained = {row["path"]: row for row in json.loads(capsys.readouterr().out)}, load(file)
    assert len(rows) == 5
    bad = rows[str(images / "broken.jpg")]
    assert bad["top"] == [] and bad["error"]
    for name in ("a.png", "déjà vu/猫 \n.jpg", "grey.png"):
        with torch.no_grad():
            wanted = trained.model(trained.transform(decode_path(str(images / name)))[None]).softmax(-1)[0]
        row = rows[str(images / name)]
        assert row["error"] is None and [t["index"] for t in row["top"]] == wanted.argsort(descending=True).tolist()
        assert [t["probability"] for t in row["top"]] == pytest.approx(wanted.sort(descending=True).values.tolist(), abs=1e-5)
        assert [t["class"] for t in row["top"]] == [CLASSES[t["index"]] for t in row["top"]]


def test_batches_change_nothing_and_heat_maps_are_written(file, images, tmp_path, capsys):
    texts = []
    for size in "14":
        assert main([str(images), "--resume", str(file.parent), "--batch_size", size, "--heatmap", str(tmp_path / "maps")]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "not readable" in texts[0] and "猫" in texts[0]
    made = sorted((tmp_path / "maps").iterdir())
    assert len(made) == 4 and Image.open(made[0]).size == (64, 64)


@pytest.mark.parametrize("argv, named", [
    (["EMPTY", "--resume", "FILE"], "empty"),
    (["IMAGES"], "--resume"), (["IMAGES", "--model", "hornet_tine"], "hornet_tine"),
    (["IMAGES", "--resume", "IMAGES"], "images"), (["IMAGES", "--resume", "FILE", "--topk", "0"], "--topk"),
    (["IMAGES", "--resume", "FILE", "--device", "gpu"], "--device gpu"),
])
def test_mistakes_are_one_sentence_and_exit_2(argv, named, file, images, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    places = {"FILE": file, "IMAGES": images, "EMPTY": tmp_path / "empty"}
    assert main([str(places.get(word, word)) for word in argv]) == 2
    err = capfd.readouterr().err.strip()
    assert named in err and "Traceback" not in err and len(err.splitlines()) == 1


def test_only_unreadable_files_end_with_1(file, images):
    assert main([str(images / "broken.jpg"), "missing.jpg", "--resume", str(file)]) == 1
