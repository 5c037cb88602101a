"""The table of options and the image settings."""
from dataclasses import asdict

import pytest
from timm.data import constants

from config.options import OPTIONS, ImageSettings, Options
from tests.kits.errors import refused

PUBLISHED_DEFAULTS = dict(
    batch_size=64, epochs=300, update_freq=1, model="hornet_tiny_gf", drop_path=0, input_size=224,
    layer_scale_init_value=1e-6, model_ema=False, model_ema_decay=0.9999, model_ema_eval=False,
    model_ema_force_cpu=False, opt="adamw", opt_eps=1e-8, opt_betas=None, clip_grad=None, momentum=0.9,
    weight_decay=0.05, weight_decay_end=None, lr=4e-3, layer_decay=1.0, min_lr=1e-6, warmup_epochs=20,
    warmup_steps=-1, color_jitter=0.4, aa="rand-m9-mstd0.5-inc1", smoothing=0.1, cutmix_minmax=None,
    train_interpolation="bicubic", crop_pct=None, reprob=0.25, remode="pixel", recount=1, mixup=0.8, cutmix=1.0,
    mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch", finetune="", head_init_scale=1.0,
    model_key="model|module", model_prefix="", data_path="", eval_data_path=None,
    imagenet_default_mean_and_std=True, data_set="IMNET", output_dir="", log_dir=None, device="auto", seed=0,
    resume=(), auto_resume=True, save_ckpt=True, save_ckpt_freq=1, save_ckpt_num=3, start_epoch=0, eval=False,
    disable_eval=False, num_workers=10, pin_mem=True, use_amp=False, enable_wandb=False, project="hornet",
    wandb_ckpt=False, exp_name="default", nb_classes=None, hflip=0.5, scale=(0.08, 1.0))


def test_defaults_are_the_published_ones_and_what_their_options_accept():
    assert {name: asdict(Options())[name] for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    for name, option in OPTIONS.items():
        values = option.default if isinstance(option.default, tuple) else (option.default,)
        assert option.convert(list(map(str, values)) or ["none"], name) == option.default, name


def test_image_settings_are_those_of_the_options_and_of_a_checkpoints_args():
    options = Options(input_size=64, crop_pct=1.0, imagenet_default_mean_and_std=False, layer_scale_init_value=0.0)
    settings = ImageSettings.of(options)
    assert (settings.input_size, settings.eval_crop_pct) == (64, 1.0)
    assert (settings.mean, settings.std) == (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)
    assert (ImageSettings().mean, ImageSettings().std) == (
        constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
    assert not settings.whole and ImageSettings(input_size=384).eval_crop_pct is None
    assert ImageSettings.from_args(asdict(settings) | {"lr": 1}) == settings
    assert ImageSettings.from_args({}) == ImageSettings() == ImageSettings.of(Options())
    assert ImageSettings.from_args({"layer_scale_init_value": 0}).layer_scale_init_value == 0


@pytest.mark.parametrize("name, value", [
    ("input_size", 16), ("input_size", 64.5), ("input_size", True), ("crop_pct", 2.0),
    ("crop_pct", float("nan")), ("imagenet_default_mean_and_std", [1]), ("train_interpolation", "x"),
    ("layer_scale_init_value", None), ("input_size", "9" * 5000)])
def test_image_settings_from_a_strange_file_are_refused(name, value):
    with refused("invalid_value", name):
        ImageSettings.from_args({name: value})
