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
from datasets.images import decode, read_file
from datasets.transforms import eval_transform
from models.inspect import as_rgb
from run.checkpoint import BEST, BEST_EMA, Checkpoints
from tests.kits.errors import refused
from tests.kits.trained import checkpoint, lively

CLASSES = ["ant", "bee", "猫", "dog"]
TWO = lively(seed=0), lively(seed=1)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.fixture
def run(tmp_path):
    """A run whose moving average scored 46 and whose raw weights scored 39."""
    for name, scored, score in (("checkpoint-best", "model", 39), ("checkpoint-best-ema", "model_ema", 46)):
        path = checkpoint(tmp_path / f"{name}.pth", *TWO, classes=CLASSES, scored=scored, model="hornet_pico_gf",
                          input_size=64, crop_pct=0.9)
        path.with_name(f"{path.name}.json").write_text(json.dumps({"score": score}))
    checkpoint(tmp_path / "checkpoint-7.pth", *TWO, scored=None, model="hornet_pico_gf")
    return tmp_path


def test_a_run_gives_what_scored_best_with_its_classes_and_settings(run):
    trained = models.load(run)
    assert trained.source == run / "checkpoint-best-ema.pth" and trained.weights == "model_ema"
    assert same(trained.model, TWO[1]) and not trained.model.training
    assert (trained.name, trained.classes) == ("hornet_pico_gf", CLASSES)
    assert trained.settings == ImageSettings(input_size=64, crop_pct=0.9)
    assert same(models.load(trained.source, weights="model").model, TWO[0])
    (run / "checkpoint-best.pth.json").write_text(json.dumps({"score": 50}))
    assert same(models.load(str(run)).model, TWO[0])
    for name in ("checkpoint-best.pth", "checkpoint-best-ema.pth"):
        (run / name).unlink()
    assert models.load(run).source == run / "checkpoint-7.pth"


@pytest.mark.parametrize("size, crop_pct, imagenet, turn", [
    (64, None, True, False), (64, 1.0, False, True), (384, None, True, True), (32, None, True, False)])
@pytest.mark.parametrize("width, height", [(90, 70), (33, 200), (32, 32)])
def test_the_transform_gives_the_values_of_the_evaluation(tmp_path, size, crop_pct, imagenet, turn, width, height):
    """Of an image that its EXIF entry says is turned."""
    run = checkpoint(tmp_path / "c.pth", TWO[0], model="hornet_pico_gf", input_size=size, crop_pct=crop_pct,
                     imagenet_default_mean_and_std=imagenet, exif_orientation=turn)
    pixels, path = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8), str(tmp_path / "i.jpg")
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    image.save(path, exif=image.getexif())
    pixels = torch.tensor(eval_transform(size, crop_pct)(decode(read_file(path), turn)))
    wanted = Normalise(ImageSettings(imagenet_default_mean_and_std=imagenet), "cpu")(pixels[None])[0].permute(2, 0, 1)
    for opened in (decode(read_file(path)), as_rgb(path)):
        assert torch.equal(models.load(run).transform(opened), wanted)
    assert models.load(run, input_size=96).transform(image).shape == (3, 96, 96)


def test_files_of_others(tmp_path):
    """A bare state dict, without a word on its model, and a checkpoint without layer scale."""
    torch.save(TWO[0].state_dict(), tmp_path / "bare.pth")
    trained = models.load(tmp_path / "bare.pth")
    assert (trained.name, trained.weights, trained.classes) == ("hornet_pico_gf", "", ["0", "1", "2", "3"])
    assert trained.settings.input_size == 64 and same(trained.model, TWO[0])
    without = lively("hornet_pico_7x7", layer_scale_init_value=0)
    path = checkpoint(tmp_path / "scale.pth", without, model="hornet_pico_7x7", layer_scale_init_value=0.0)
    assert same(models.load(path).model, without)


@pytest.mark.parametrize("source, options, code, named", [
    ("empty", {}, "missing_checkpoint", "empty"), ("other.pth", {}, "unknown_model", "--model"),
    ("checkpoint-7.pth", dict(model="hornet_tine"), "unknown_model", "hornet_tine"),
    ("checkpoint-7.pth", dict(model="hornet_nano_7x7"), "other_model", "hornet_pico_gf"),
    ("checkpoint-7.pth", dict(input_size=16), "invalid_value", "--input_size 16")])
def test_mistakes_are_one_sentence(run, source, options, code, named):
    (run / "empty").mkdir()
    torch.save({"w": torch.zeros(3)}, run / "other.pth")
    with refused(code, named):
        models.load(run / source, **options)


@pytest.mark.parametrize("scores, index", [({BEST: 39.0}, 0), ({BEST_EMA: 46.0}, 1)])
def test_timm_finds_what_scored_in_its_own_ways(tmp_path, scores, index):
    """`checkpoint_path` takes the average wherever it finds one, unless the file says otherwise in timm's words."""
    Checkpoints(tmp_path).save({"format": 3, "model": TWO[0].state_dict(), "model_ema": TWO[1].state_dict(), "args": {},
                                "epoch": 0}, scores, wait=True)
    best, last = (str(tmp_path / name) for name in (next(iter(scores)), "checkpoint-0.pth"))
    for words, wanted in ((dict(checkpoint_path=best), TWO[index]), (dict(checkpoint_path=last), models.load(last).model),
                          (dict(pretrained=True, pretrained_cfg_overlay=dict(file=best)), TWO[index])):
        assert same(timm.create_model("hornet_pico_gf", num_classes=4, **words), wanted)
    weights = sum(value.nbytes for model in TWO for value in model.state_dict().values())
    assert (tmp_path / "checkpoint-0.pth").stat().st_size < 1.3 * weights  # nothing is stored twice
