"""Predictions, features, heat maps and FLOPs from Python."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from models.inspect import (
    as_rgb,
    class_titles,
    complexity,
    extract_features,
    heatmap,
    image_transform,
    overlay,
    predict,
)
from tests.kits.errors import refused
from tests.kits.trained import lively

CLASSES = ["ant", "bee", "猫", "dog"]


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "déjà vu 猫.jpg", "grey.png")]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 256, (70 + 9 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if path.stem == "grey" else "RGB").save(path)
    return paths


def test_paths_images_and_tensors_give_the_same_one_or_many(model, files):
    transform = image_transform(model)
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
    wanted = predict(model, batch, topk=2, class_names=CLASSES)
    assert len(wanted) == 3 and len(wanted[0]) == 2 and wanted[0][0].name == CLASSES[wanted[0][0].index]
    mixed = [str(files[0]), files[1], Image.open(files[2])]
    assert predict(model, mixed, topk=2, class_names=CLASSES) == wanted
    one = predict(model, batch[:1], topk=2, class_names=CLASSES)
    for single in (files[0], str(files[0]), Image.open(files[0]), batch[0]):
        assert predict(model, single, topk=2, class_names=CLASSES) == one
        assert extract_features(model, single).shape == (1, 64) and heatmap(model, single).shape[0] == 1


def test_mistakes(model, files, tmp_path):
    with pytest.raises(ValueError, match="3 class names"):
        predict(model, files, class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="no images"):
        predict(model, [])
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for path in (tmp_path / "broken.jpg", tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(OSError, match=path.name):
            predict(model, path)


def test_16_bit_images_are_scaled_not_cut_off(tmp_path):
    pixels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    found = np.asarray(as_rgb(tmp_path / "deep.png"))
    assert np.array_equal(found, np.asarray(as_rgb(Image.open(tmp_path / "deep.png"))))
    assert found.shape == (64, 64, 3) and (found[0, 0, 0], found[-1, -1, 0]) == (0, 255) and found.std() > 70
    for other in (np.int32, np.float32):
        Image.fromarray(pixels.astype(other)).save(tmp_path / "wide.tif")
        with refused("unreadable_image", "wide.tif"):
            as_rgb(tmp_path / "wide.tif")


def test_imagenet_names_come_from_timm():
    torch.manual_seed(0)
    small = timm.create_model("hornet_pico_7x7", num_classes=1000)
    top = predict(small, torch.randn(1, 3, 64, 64), topk=1000)[0]
    assert {p.index: p.name for p in top}[0] == "tench, Tinca tinca"
    large = timm.create_model("hornet_pico_7x7", num_classes=10459)  # ImageNet-22k's
    top = predict(large, torch.randn(1, 3, 64, 64), topk=10459)[0]
    assert {p.index: p.name for p in top}[10450] == "Japanese spaniel"
    assert class_titles(["n02123045", "mine", "n99999999"]) == ["tabby, tabby cat", "mine", "n99999999"]


def test_heatmap_equals_grad_cam_by_finite_differences(model):
    """The gradient of a logit with respect to each channel of the last stage, measured instead of derived."""
    model = lively().double()
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
    assert found.shape == (64, 64) and found.min() >= 0 and found.max() == 1


def test_features_are_what_the_classifier_sees_and_mode_and_gradients_are_left_alone():
    model, x = lively().train(), torch.randn(3, 3, 64, 96)
    predict(model, x, class_names=CLASSES)
    features = extract_features(model, x, batch_size=2)
    torch.testing.assert_close(model.head(features), model(x), rtol=1e-5, atol=1e-5)
    assert extract_features(model, x, pooled=False).shape == (3, model.num_features, 2, 3)
    assert heatmap(model, x).shape == (3, 64, 96)
    assert complexity(model, (64, 96)).flops > complexity(model, 64).flops
    assert model.training and all(p.grad is None for p in model.parameters())
    assert overlay(Image.new("RGB", (300, 200)), heatmap(model, x)[0]).size == (96, 64)
