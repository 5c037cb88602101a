"""The published pixels: evaluation against stored figures, training against timm's own pipeline."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from common.random import key, seeded
from config.options import ImageSettings
from datasets.device import Normalise
from datasets.transforms import Erasing, eval_transform, train_transform
from tests.kits.fill import PARITY, parity_image
from tests.kits.options import data_options

FIGURES = json.loads((PARITY / "eval_transform.json").read_text())


@pytest.mark.parametrize("case", FIGURES)
def test_evaluation_pixels_are_the_published_ones(case):
    size, crop_pct, index, shape = case.split("|")
    size, (width, height) = int(size), map(int, shape.split("x"))
    image = Image.fromarray(parity_image(int(index), width, height))
    pixels = eval_transform(size, None if crop_pct == "None" else float(crop_pct))(image)
    images = Normalise(ImageSettings(), "cpu")(torch.from_numpy(pixels[None].copy()))
    x, expected = images[0].permute(2, 0, 1).double().numpy(), FIGURES[case]
    probes = [x[0, 0, 0], x[1, 5, 9], x[2, size // 2, size // 3], x[0, size - 1, size - 1], x[1, size // 4, size - 3]]
    assert list(x.shape) == expected["shape"]
    assert np.abs(x.mean(axis=(1, 2)) - expected["mean"]).max() < 1e-5
    assert abs(np.linalg.norm(x) - expected["norm"]) < 1e-5 * expected["norm"]
    assert np.abs(np.array(probes) - expected["probe"]).max() < 1e-5


@pytest.mark.parametrize("aa, hflip, scale, imagenet", [
    ("rand-m9-mstd0.5-inc1", 0.5, (0.08, 1.0), True), ("none", 0.0, (0.5, 1.0), False)])
def test_training_pixels_equal_timms_pipeline(aa, hflip, scale, imagenet):
    options = data_options(input_size=96, aa=aa, hflip=hflip, scale=scale, imagenet_default_mean_and_std=imagenet)
    ours, settings = train_transform(options), ImageSettings.of(options)
    timms = create_transform(96, is_training=True, color_jitter=0.4, auto_augment=None if aa == "none" else aa, re_prob=0.0,
                             interpolation="bicubic", hflip=hflip, scale=scale, mean=settings.mean, std=settings.std)
    normalise = Normalise(settings, "cpu")
    for index in range(12):
        image = Image.fromarray(parity_image(index, 160, 120))
        with seeded(key(0, "augment", 1, index)):
            pixels = ours(image)
        with seeded(key(0, "augment", 1, index)):
            expected = timms(image)
        assert torch.equal(normalise(torch.from_numpy(pixels.copy())[None])[0].permute(2, 0, 1), expected)


@pytest.mark.parametrize("count", [1, 3])
def test_erase_boxes_are_those_of_timm(count):
    timms = RandomErasing(0.5, mode="const", max_count=count, device="cpu")
    ours = Erasing(0.5, count)
    erased = 0
    for seed in range(60):
        random.seed(seed)
        expected = timms(torch.ones(3, 40, 56))
        random.seed(seed)
        image = torch.ones(3, 40, 56)
        for top, left, height, width in ours.boxes(40, 56).tolist():
            image[:, top:top + height, left:left + width] = 0
        assert torch.equal(image, expected)
        erased += int((image == 0).any())
    assert 15 < erased < 45


def test_small_images_are_padded_and_cropped_and_evaluated_as_they_are():
    options = data_options(input_size=32, aa="none", hflip=0.0, color_jitter=0.0)
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(eval_transform(32)(image), pixels)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    places = {padded[y:y + 32, x:x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    seen = set()
    for seed in range(40):
        with seeded(seed):
            seen.add(places[train_transform(options)(image).tobytes()])
    assert len(seen) > 20
    assert train_transform(options)(Image.new("RGB", (20, 9))).shape == (32, 32, 3)
    assert eval_transform(32)(Image.new("RGB", (200, 90))).shape == (32, 32, 3)
