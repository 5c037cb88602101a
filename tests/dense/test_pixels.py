"""Pipelines give the published pixels: sizes, resizing, labels, photometric distortion, whole samples."""
import sys
import zlib

import numpy as np
import pytest
import torch

from dense import pixels
from dense.pixels import distort, fitted, normalised, resize, resize_labels
from tests.kits.dense import given, stored


class Scripted:
    """Gives the stored draws, and checks that they are asked for in their order."""

    def __init__(self, draws):
        self.draws = list(draws)

    def integers(self, low, high):
        name, bounds, value = self.draws.pop(0)
        assert name == "randint" and bounds in ([high], [low, high]) and (len(bounds) == 2 or low == 0)
        return value

    def uniform(self, low, high):
        name, bounds, value = self.draws.pop(0)
        assert (name, bounds) == ("uniform", [low, high])
        return value


def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def test_scaled_sizes():
    for box, table in stored("pipelines/sizes.json")["table"].items():
        for size, (width, height) in table.items():
            w, h = map(int, size.split("x"))
            assert fitted((h, w), [int(n) for n in box.split("x")]) == (height, width), (box, size)


@pytest.mark.parametrize("key", [key for key in stored("pipelines/test_transform.json") if key.startswith("seg")])
def test_evaluation_transform(key):
    expected = stored("pipelines/test_transform.json")[key]
    _, box, index, size = key.split("|")
    image = given(f"parity_image({index}, {size.replace('x', ', ')})").numpy()
    scaled = resize(image, fitted(image.shape[:2], [int(n) for n in box.split("x")]))
    assert crc(scaled) == expected["resized_rgb_crc32"]
    x = normalised(torch.from_numpy(scaled)[None])[0].numpy()
    assert list(x.shape) == expected["shape"]
    s, t = x.shape[1:]
    assert x.astype(np.float64).mean(axis=(1, 2)) == pytest.approx(expected["mean"], abs=1e-5)
    assert np.sqrt((x.astype(np.float64) ** 2).sum(axis=(1, 2))) == pytest.approx(expected["norm"], rel=1e-5)


def test_labels_are_resized_to_the_nearest():
    for case, expected in stored("pipelines/labels.json").items():
        box, _ = case.split("|")
        labels = given(expected["labels"])[0].numpy().astype(np.uint8)
        found = resize_labels(labels, fitted(labels.shape, [int(n) for n in box.split("x")]))
        assert list(found.shape) == expected["size"] and crc(found) == expected["crc32"]
        assert int(found.sum()) == expected["sum"]


@pytest.mark.parametrize("case", stored("pipelines/photometric.json"), ids=lambda case: case["picture"][13:15])
def test_photometric_distortion(case):
    draws = Scripted(case["draws"])
    found = distort(given(case["picture"]).numpy(), draws)
    assert not draws.draws and crc(found) == case["crc32_rgb"]


def test_a_missing_opencv_is_one_line(logged, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert pixels.opencv.__wrapped__() is None
    assert [("pip install opencv-python-headless" in line) for line in logged.messages] == [True]


def test_without_opencv_pixels_are_at_most_one_level_away(monkeypatch):
    image = given("parity_image(5, 131, 97)").numpy()
    sizes = [(61, 83), (194, 262), (97, 131), (333, 100)]
    exact = [resize(image, size) for size in sizes], pixels.to_hsv(image), pixels.from_hsv(pixels.to_hsv(image))
    monkeypatch.setattr(pixels, "opencv", lambda: None)
    own = [resize(image, size) for size in sizes], pixels.to_hsv(image), pixels.from_hsv(exact[1])
    for a, b in zip((*exact[0], *exact[1:]), (*own[0], *own[1:])):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
