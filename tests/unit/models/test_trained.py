"""`models.load`: what scored, of a folder, a file or a published name, with its classes and the evaluation's
images."""
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models
from config.options import ImageSettings
from datasets.device import Normalise
from datasets.images import decode_path
from datasets.transforms import eval_transform
from models.inspect import as_rgb
from run.checkpoint import BEST, BEST_EMA, Checkpoints
from tests.kits.errors import refused
from tests.kits.trained import checkpoint, lively

CLASSES = ["ant", "bee", "猫", "dog"]


def drawn(width, height):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.fixture(scope="module")
def two():
    return lively(seed=0), lively(seed=1)


@pytest.fixture
def run(tmp_path, two):
    """A run whose moving average scored 46 and whose raw weights scored 39."""
    for name, scored, score in (("checkpoint-best", "model", 39), ("checkpoint-best-ema", "model_ema", 46)):
        path = checkpoint(tmp_path / f"{name}.pth", *two, classes=CLASSES, scored=scored, model="hornet_pico_gf",
                          input_size=64, crop_pct=0.9)
        path.with_name(f"{path.name}.json").write_text(json.dumps({"score": score}))
    checkpoint(tmp_path / "checkpoint-7.pth", *two, scored=None, model="hornet_pico_gf")
    return tmp_path


def test_a_run_gives_what_scored_best_with_its_classes_and_settings(run, two):
    trained = models.load(run)
    assert trained.source == run / "checkpoint-best-ema.pth" and trained.weights == "model_ema"
    assert same(trained.model, two[1]) and not trained.model.training
    assert (trained.name, trained.classes) == ("hornet_pico_gf", CLASSES)
    assert trained.settings == ImageSettings(input_size=64, crop_pct=0.9)
    (run / "checkpoint-best.pth.json").write_text(json.dumps({"score": 50}))
    assert same(models.load(str(run)).model, two[0])
    for name in ("checkpoint-best.pth", "checkpoint-best-ema.pth"):
        (run / name).unlink()
    assert models.load(run).source == run / "checkpoint-7.pth"


@pytest.mark.parametrize("name, weights, index", [
    ("checkpoint-best.pth", "auto", 0), ("checkpoint-best-ema.pth", "auto", 1), ("checkpoint-best.pth", "ema", 1),
    ("checkpoint-best-ema.pth", "model", 0), ("checkpoint-7.pth", "auto", 0)])
def test_a_file_gives_what_it_says_scored(run, two, name, weights, index):
    assert same(models.load(run / name, weights=weights).model, two[index])


@pytest.mark.parametrize("size, crop_pct, imagenet", [(64, None, True), (64, 1.0, False), (384, None, True), (32, None, True)])
@pytest.mark.parametrize("width, height", [(90, 70), (33, 200), (32, 32)])
def test_the_transform_gives_the_values_of_the_evaluation(tmp_path, two, size, crop_pct, imagenet, width, height):
    path = checkpoint(tmp_path / "c.pth", two[0], model="hornet_pico_gf", input_size=size, crop_pct=crop_pct,
                      imagenet_default_mean_and_std=imagenet)
    image = drawn(width, height)
    pixels = torch.tensor(eval_transform(size, crop_pct)(image))
    settings = ImageSettings(imagenet_default_mean_and_std=imagenet)
    wanted = Normalise(settings, "cpu")(pixels[None])[0].permute(2, 0, 1)
    assert torch.equal(models.load(path).transform(image), wanted)
    assert models.load(path, input_size=96).transform(image).shape == (3, 96, 96)


def test_a_run_with_exif_orientation_turns_images_here_too(tmp_path, two):
    image = drawn(90, 60)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    for turn in (False, True):
        path = checkpoint(tmp_path / "c.pth", two[0], model="hornet_pico_gf", input_size=64, exif_orientation=turn)
        pixels = torch.tensor(eval_transform(64)(decode_path(str(tmp_path / "turned.jpg"), turn)))
        wanted = Normalise(ImageSettings(), "cpu")(pixels[None])[0].permute(2, 0, 1)
        for opened in (decode_path(str(tmp_path / "turned.jpg")), as_rgb(tmp_path / "turned.jpg")):
            assert torch.equal(models.load(path).transform(opened), wanted)


def test_files_of_others(tmp_path, two):
    """A bare state dict, one without a word on its model, and one without layer scale."""
    torch.save(two[0].state_dict(), tmp_path / "bare.pth")
    trained = models.load(tmp_path / "bare.pth")
    assert (trained.name, trained.weights, trained.classes) == ("hornet_pico_gf", "", ["0", "1", "2", "3"])
    assert trained.settings.input_size == 64 and same(trained.model, two[0])
    without = lively("hornet_pico_7x7", layer_scale_init_value=0)
    path = checkpoint(tmp_path / "scale.pth", without, model="hornet_pico_7x7", layer_scale_init_value=0.0)
    assert same(models.load(path).model, without)


def test_mistakes_are_one_sentence(tmp_path, run):
    file = run / "checkpoint-best.pth"
    (tmp_path / "empty").mkdir()
    with refused("missing_checkpoint", tmp_path / "empty"):
        models.load(tmp_path / "empty")
    with refused("unknown_model", "hornet_tine"):
        models.load(file, model="hornet_tine")
    with refused("other_model", "hornet_pico_gf"):
        models.load(file, model="hornet_nano_7x7")
    with refused("invalid_value", "--input_size 16"):
        models.load(file, input_size=16)
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pth")
    with refused("unknown_model", "other.pth", "--model"):
        models.load(tmp_path / "other.pth")


@pytest.mark.parametrize("scores, index", [({BEST: 39.0}, 0), ({BEST_EMA: 46.0}, 1)])
def test_timm_finds_what_scored_in_its_own_ways(tmp_path, two, scores, index):
    """`checkpoint_path` takes the average wherever it finds one, unless the file says otherwise in timm's words."""
    Checkpoints(tmp_path).save({"format": 3, "model": two[0].state_dict(), "model_ema": two[1].state_dict(), "args": {},
                                "epoch": 0}, scores, wait=True)
    best, last = (str(tmp_path / name) for name in (next(iter(scores)), "checkpoint-0.pth"))
    for words, wanted in ((dict(checkpoint_path=best), two[index]), (dict(checkpoint_path=last), models.load(last).model),
                          (dict(pretrained=True, pretrained_cfg_overlay=dict(file=best)), two[index])):
        assert same(timm.create_model("hornet_pico_gf", num_classes=4, **words), wanted)
    weights = sum(value.nbytes for model in two for value in model.state_dict().values())
    assert (tmp_path / "checkpoint-0.pth").stat().st_size < 1.3 * weights  # nothing is stored twice
