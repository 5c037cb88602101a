"""The table of options, recipes and image settings have the published values."""
from dataclasses import asdict

import pytest
import yaml
from timm.data import constants

from config.options import OPTIONS, ImageSettings, Options
from config.parse import RECIPES, differences, parse, published_recipe
from tests.kits.docs import ROOT
from tests.kits.errors import refused

PUBLISHED = yaml.safe_load((ROOT / "tests/data/published_options.yaml").read_text())


def test_defaults_are_the_published_ones_and_what_their_options_accept():
    for name, value in PUBLISHED["defaults"].items():
        assert OPTIONS[name].default == (tuple(value) if isinstance(value, list) else value), name
    for name, option in OPTIONS.items():
        values = option.default if isinstance(option.default, tuple) else (option.default,)
        assert option.convert(list(map(str, values)) or ["none"], name) == option.default, name


@pytest.mark.parametrize("name", PUBLISHED["recipes"])
def test_a_published_recipe_has_the_published_values(name):
    resolved = parse(["--config", str(RECIPES / f"{name}.yaml"), "--data_path", "x"])
    o, values = resolved.options, dict(PUBLISHED["recipes"][name])
    size = values["global_batch"]
    assert size % (values["batch_size"] * values.pop("gpus")) == 0
    assert {name: getattr(o, name) for name in values} == values
    assert published_recipe(o)["drop_path"] == o.drop_path and differences(o) == {}
    assert resolved.notices == [] and resolved.lr_batch == size


def test_image_settings_are_those_of_the_options_and_of_a_checkpoints_args():
    options = Options(input_size=64, crop_pct=1.0, imagenet_default_mean_and_std=False, layer_scale_init_value=0.0)
    settings = ImageSettings.of(options)
    assert (settings.input_size, settings.eval_crop_pct) == (64, 1.0)
    assert (settings.mean, settings.std) == (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)
    plain = ImageSettings()
    assert (plain.mean, plain.std) == (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
    assert ImageSettings(input_size=384).eval_crop_pct is None
    assert ImageSettings.from_args(asdict(settings) | {"lr": 1}) == settings
    assert ImageSettings.from_args({}) == plain == ImageSettings.of(Options())


@pytest.mark.parametrize("name, value", [
    ("input_size", 64.5), ("input_size", True), ("crop_pct", 2.0), ("crop_pct", float("nan")),
    ("imagenet_default_mean_and_std", [1]), ("layer_scale_init_value", None), ("input_size", "9" * 5000)])
def test_image_settings_from_a_strange_file_are_refused(name, value):
    with refused("invalid_value", name):
        ImageSettings.from_args({name: value})
