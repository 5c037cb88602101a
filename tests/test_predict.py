"""Predictions, features and heat maps, from Python and as a command, agree with the evaluation of main.py."""
import csv
import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models  # noqa: F401  (registers the models with timm)
from datasets.transforms import eval_transform
from models.inspect import class_titles, extract_features, heatmap, overlay, image_transform, predict
from tools.loading import load_trained
from tools.predict import main

CLASSES = ["ant", "bee", "猫", "dog"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small trained-looking model: random weights large enough for clear answers, with names and settings."""
    torch.manual_seed(0)
    model = timm.create_model("hornet_pico_gf", num_classes=4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    path = tmp_path_factory.mktemp("model") / "checkpoint-best.pth"
    ema = {k: v + 0.05 * torch.randn_like(v) for k, v in model.state_dict().items()}
    torch.save({"format": 2, "model": model.state_dict(), "model_ema": ema, "scored": "model", "classes": CLASSES,
                "args": {"model": "hornet_pico_gf", "input_size": 64, "crop_pct": 0.9}}, path)
    return path, model.eval()


@pytest.fixture()
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "déjà vu").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "déjà vu/猫 \n.jpg", "z.webp", "grey.png"]):
        pixels = rng.integers(0, 256, (70 + 9 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if "grey" in name else "RGB").save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def expected(model, path, crop_pct=0.9):
    pixels = eval_transform(64, crop_pct)(Image.open(path).convert("RGB"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    batch = ((torch.tensor(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        return model(batch).softmax(-1)[0]


def test_json_output_has_the_checkpoints_names_transform_and_bad_files(checkpoint, pictures, capsys):
    path, model = checkpoint
    assert main([str(pictures), "--resume", str(path), "--out", "json", "--topk", "9", "--batch_size", "2"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 5
    bad = rows[str(pictures / "broken.jpg")]
    assert bad["top"] == [] and "WebP" in bad["error"]
    for name in ("a.png", "déjà vu/猫 \n.jpg", "grey.png"):
        row, wanted = rows[str(pictures / name)], expected(model, pictures / name)
        assert row["error"] is None and [t["index"] for t in row["top"]] == wanted.argsort(descending=True).tolist()
        shares = wanted.sort(descending=True).values.tolist()
        assert [t["probability"] for t in row["top"]] == pytest.approx(shares, abs=1e-5)
        assert [t["class"] for t in row["top"]] == [CLASSES[t["index"]] for t in row["top"]]


def test_csv_to_a_file(checkpoint, pictures, tmp_path):
    out = tmp_path / "answers.csv"
    assert main([str(pictures), "--resume", str(checkpoint[0]), "--out", str(out), "--topk", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text("utf-8"), newline="")))
    assert len(rows) == 4 * 2 + 1 and {r["rank"] for r in rows} == {"1", "2", ""}
    assert [r["error"] for r in rows if r["rank"] == ""] != [""]


def test_batches_and_workers_change_nothing(checkpoint, pictures, capsys):
    texts = []
    for extra in (["--batch_size", "1"], ["--batch_size", "4"], ["--num_workers", "1", "--batch_size", "2"]):
        assert main([str(pictures), "--resume", str(checkpoint[0]), *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and "not readable" in texts[0] and "猫" in texts[0]


def test_ema_weights_and_heat_maps(checkpoint, pictures, tmp_path, capsys):
    path, _ = checkpoint
    raw, ema = load_trained(resume=str(path)), load_trained(resume=str(path), weights="ema")
    x = torch.randn(1, 3, 64, 64)
    assert (raw.model(x) - ema.model(x)).abs().max() > 1e-3
    assert main([str(pictures), "--resume", str(path), "--heatmap", str(tmp_path / "maps")]) == 0
    made = sorted((tmp_path / "maps").iterdir())
    assert len(made) == 4 and Image.open(made[0]).size == (64, 64)


def test_a_model_without_layer_scale_is_loaded_as_such(tmp_path):
    model = timm.create_model("hornet_pico_7x7", num_classes=2, layer_scale_init_value=0)
    torch.save({"model": model.state_dict(), "args": {"model": "hornet_pico_7x7", "layer_scale_init_value": 0.0}},
               tmp_path / "c.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_trained(resume=str(tmp_path / "c.pth")).model(x), model.eval()(x))


@pytest.mark.parametrize("argv, part", [
    (["missing.jpg", "--resume", "CHECKPOINT"], "missing.jpg does not exist"),
    (["EMPTY", "--resume", "CHECKPOINT"], "no pictures in"),
    (["PICTURES"], "--resume CHECKPOINT, or --model"),
    (["PICTURES", "--model", "hornet_tine"], "not known"),
    (["PICTURES", "--resume", "PICTURES"], "is a folder"),
    (["PICTURES", "--resume", "CHECKPOINT", "--out", "xml"], "--out xml is not accepted"),
    (["PICTURES", "--resume", "CHECKPOINT", "--topk", "0"], "must be 1 or more"),
    (["PICTURES", "--resume", "CHECKPOINT", "--input_size", "16"], "from 32 on"),
    (["PICTURES", "--resume", "CHECKPOINT", "--model", "hornet_nano_7x7"], "does not hold this model"),
    (["PICTURES", "--resume", "CHECKPOINT", "--device", "gpu"], "--device gpu: not a device"),
])
def test_mistakes_are_one_sentence_and_exit_2(argv, part, checkpoint, pictures, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    places = {"CHECKPOINT": checkpoint[0], "PICTURES": pictures, "EMPTY": tmp_path / "empty"}
    assert main([str(places.get(word, word)) for word in argv]) == 2
    said = capfd.readouterr().err.strip()
    assert part in said and "Traceback" not in said


def test_only_bad_files_end_with_1(checkpoint, pictures):
    assert main([str(pictures / "broken.jpg"), "--resume", str(checkpoint[0])]) == 1


def test_predict_from_python_takes_pictures_and_tensors(checkpoint, pictures):
    _, model = checkpoint
    images = [Image.open(pictures / "a.png"), Image.open(pictures / "grey.png")]
    transform = image_transform(model)
    from_pictures = predict(model, images, topk=2, class_names=CLASSES)
    batch = torch.stack([transform(i.convert("RGB")) for i in images])
    from_tensor = predict(model, batch, topk=2, class_names=CLASSES)
    assert from_pictures == from_tensor and len(from_pictures[0]) == 2
    assert from_pictures[0][0].name == CLASSES[from_pictures[0][0].index]
    with pytest.raises(ValueError, match="3 class names"):
        predict(model, images, class_names=["a", "b", "c"])


def test_imagenet_names_come_from_timm():
    torch.manual_seed(0)
    model = timm.create_model("hornet_pico_7x7", num_classes=1000)
    top = predict(model, torch.randn(1, 3, 64, 64), topk=1000)[0]
    assert {p.index: p.name for p in top}[0] == "tench, Tinca tinca"
    large = timm.create_model("hornet_pico_7x7", num_classes=10459)  # ImageNet-22k's
    top = predict(large, torch.randn(1, 3, 64, 64), topk=10459)[0]
    assert {p.index: p.name for p in top}[10450] == "Japanese spaniel"
    assert class_titles(["n02123045", "mine", "n99999999"]) == ["tabby, tabby cat", "mine", "n99999999"]


def test_features_are_what_the_classifier_sees(checkpoint):
    _, model = checkpoint
    x = torch.randn(3, 3, 64, 64)
    features = extract_features(model, x, batch_size=2)
    assert features.shape == (3, model.num_features)
    torch.testing.assert_close(model.head(features), model(x), rtol=1e-5, atol=1e-5)
    assert extract_features(model, x, pooled=False).shape == (3, model.num_features, 2, 2)


def test_heatmap_equals_grad_cam_by_finite_differences(checkpoint):
    """The gradient of a logit with respect to each channel of the last stage, measured instead of derived."""
    model = checkpoint[1].double()
    try:
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = heatmap(model, x, classes=[2])[0]
        with torch.no_grad():
            features, step = model.forward_features(x), 1e-5
            weights = []
            for c in range(features.shape[1]):
                moved = features.clone()
                moved[:, c] += step
                weights.append((model.forward_head(moved) - model.forward_head(features))[0, 2] / step)
            cam = (torch.stack(weights)[:, None, None] * features[0]).sum(0).relu()
            large = torch.nn.functional.interpolate(cam[None, None].float(), (64, 64), mode="bilinear")[0, 0]
        torch.testing.assert_close(found, large / large.max(), rtol=1e-3, atol=1e-3)
        assert found.shape == (64, 64) and 0 <= found.min() and found.max() == 1
    finally:
        model.float()


def test_inspection_leaves_mode_and_gradients_alone(checkpoint):
    _, model = checkpoint
    model.train()
    try:
        x = torch.randn(2, 3, 64, 96)
        predict(model, x, class_names=CLASSES), extract_features(model, x)
        assert heatmap(model, x).shape == (2, 64, 96)
        assert model.training and all(p.grad is None for p in model.parameters())
    finally:
        model.eval()
    assert overlay(Image.new("RGB", (300, 200)), heatmap(model, x)[0]).size == (96, 64)
