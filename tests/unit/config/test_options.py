"""The image settings."""
import pytest
from timm.data import constants

from common.errors import UserError
from config.options import ImageSettings, Options


def test_image_settings_are_those_of_the_options_and_of_a_checkpoints_args():
    options = Options(input_size=64, crop_pct=1.0, imagenet_default_mean_and_std=False, layer_scale_init_value=0.0)
    settings = ImageSettings.of(options)
    assert (settings.input_size, settings.eval_crop_pct, settings.mean, settings.whole) == (64, 1.0, (0.5, 0.5, 0.5), False)
    assert ImageSettings.from_args(settings.args() | {"lr": 1}) == settings
    assert ImageSettings.from_args({}) == ImageSettings() == ImageSettings.of(Options())
    assert ImageSettings.from_args({"input_size": 64}, input_size=384, crop_pct=None).eval_crop_pct is None
    assert ImageSettings.from_args({"layer_scale_init_value": 0}).layer_scale_init_value == 0


@pytest.mark.parametrize("name, value", [
    ("input_size", 16), ("input_size", "224"), ("input_size", True), ("crop_pct", 2.0), ("crop_pct", float("nan")),
    ("imagenet_default_mean_and_std", 1), ("train_interpolation", "x"), ("layer_scale_init_value", None)])
def test_image_settings_from_a_strange_file_are_refused(name, value):
    with pytest.raises(UserError) as caught:
        ImageSettings.from_args({name: value})
    assert caught.value.code == "invalid_checkpoint" and name in str(caught.value)


def test_mean_and_deviation_are_those_of_timm():
    settings = ImageSettings()
    assert (settings.mean, settings.std) == (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
    settings = ImageSettings(imagenet_default_mean_and_std=False)
    assert (settings.mean, settings.std) == (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)
