"""Predictions, features, heat maps and FLOPs from Python."""
import numpy as np
import pytest
import torch
from PIL import Image

from models import inspect
from tests.kits.errors import refused
from tests.kits.trained import lively

CLASSES = ["ant", "bee", "猫", "dog"]


def test_paths_images_and_tensors_give_the_same_one_or_many(tmp_path):
    model, files = lively(), [tmp_path / name for name in ("a.png", "déjà vu 猫.jpg", "grey.png")]
    for i, path in enumerate(files):
        pixels = np.random.default_rng(i).integers(0, 256, (70 + 9 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if path.stem == "grey" else "RGB").save(path)
    batch = torch.stack([inspect.image_transform(model)(Image.open(path).convert("RGB")) for path in files])
    wanted = inspect.predict(model, batch, topk=2, class_names=CLASSES)
    assert len(wanted) == 3 and len(wanted[0]) == 2 and wanted[0][0].name == CLASSES[wanted[0][0].index]
    assert inspect.predict(model, [str(files[0]), files[1], Image.open(files[2])], topk=2, class_names=CLASSES) == wanted
    one = inspect.predict(model, batch[:1], topk=2, class_names=CLASSES)
    for single in (files[0], str(files[0]), Image.open(files[0]), batch[0]):
        assert inspect.predict(model, single, topk=2, class_names=CLASSES) == one
        assert inspect.extract_features(model, single).shape == (1, 64) and inspect.heatmap(model, single).shape[0] == 1
    files[0].write_bytes(b"no image")
    for images, names, words in ((files, CLASSES[1:], "3 class names"), ([], None, "no images")):
        with pytest.raises(ValueError, match=words):
            inspect.predict(model, images, class_names=names)
    for path in (files[0], tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(OSError, match=path.name):
            inspect.predict(model, path)


def test_16_bit_images_are_scaled_not_cut_off_and_32_bits_are_refused(tmp_path):
    pixels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name, kind in (("deep.png", np.uint16), ("deep.pgm", np.uint16), ("deep.tif", np.uint16), ("i.tif", np.int32),
                       ("f.tif", np.float32)):
        Image.fromarray(pixels.astype(kind)).save(tmp_path / name)
        if kind is np.uint16:
            found = np.asarray(inspect.as_rgb(tmp_path / name))
            assert found.shape == (64, 64, 3) and np.array_equal(found[:, :, 0], (pixels.astype(np.uint16) + 128.) // 257)
        else:
            with refused("unreadable_image", name):
                inspect.as_rgb(Image.open(tmp_path / name))


def test_imagenet_names_come_from_timm():
    for classes, index, name in ((1000, 0, "tench, Tinca tinca"), (10459, 10450, "Japanese spaniel")):
        answers = inspect.predict(lively("hornet_pico_7x7", classes), torch.randn(1, 3, 64, 64), topk=classes)[0]
        assert {p.index: p.name for p in answers}[index] == name
    assert inspect.class_titles(["n02123045", "mine", "n99999999"]) == ["tabby, tabby cat", "mine", "n99999999"]


def test_heatmap_equals_grad_cam_by_finite_differences():
    """The gradient of a logit with respect to each channel of the last stage, measured instead of derived."""
    model, weights, step = lively().double(), [], 1e-5
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = inspect.heatmap(model, x, classes=[2])[0]
    with torch.no_grad():
        features = model.forward_features(x)
        for move in torch.eye(features.shape[1])[:, :, None, None] * step:
            weights.append((model.forward_head(features + move) - model.forward_head(features))[0, 2] / step)
        cam = (torch.stack(weights)[:, None, None] * features[0]).sum(0).relu()
        large = torch.nn.functional.interpolate(cam[None, None].float(), (64, 64), mode="bilinear")[0, 0]
    torch.testing.assert_close(found, large / large.max(), rtol=1e-3, atol=1e-3)
    assert found.min() >= 0 and found.max() == 1


def test_features_are_what_the_classifier_sees_and_mode_and_gradients_are_left_alone():
    model, x = lively().train(), torch.randn(3, 3, 64, 96)
    inspect.predict(model, x, class_names=CLASSES)
    torch.testing.assert_close(model.head(inspect.extract_features(model, x, batch_size=2)), model(x), rtol=1e-5, atol=1e-5)
    assert inspect.extract_features(model, x, pooled=False).shape == (3, model.num_features, 2, 3)
    assert inspect.overlay(Image.new("RGB", (300, 200)), inspect.heatmap(model, x)[2]).size == (96, 64)
    assert model.training and all(p.grad is None for p in model.parameters())
