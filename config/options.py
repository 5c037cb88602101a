"""Every option of `main.py` in one table: type, default, one sentence of help and the accepted values.

Names and defaults are those of the published training code where it has the option. No torch in here.
"""
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from common.errors import UserError
from common.text import listed, plain

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | None
T = TypeVar("T")
_SWITCH = {word: value for words, value in (("true yes y t 1 on", True), ("false no n f 0 off", False))
           for word in words.split()}


@dataclass(frozen=True)
class Accepts:
    """What an option takes beyond its type: `words` for people, `test` for the program."""
    words: str
    test: Callable[..., bool]


def one_of(*words: str) -> Accepts:
    return Accepts(listed(words), lambda value: value in words)


def at_least(low: int, high: int = 2 ** 31 - 1) -> Accepts:
    words = f"{low} or more" if high == 2 ** 31 - 1 else f"from {low} to {high}"
    return Accepts(words, lambda value: low <= value <= high)


_AUGMENT = re.compile(r"none|rand(-(m|n|mstd|mmax|inc|w|p|t)[0-9.]+)*|augmix(-(m|w|d|a|b|mstd)[0-9.]+)*"
                      r"|(original|originalr|v0|v0r|3a)(-(mstd)[0-9.]+)*")
POSITIVE = Accepts("above 0", lambda v: v > 0)
NOT_NEGATIVE = Accepts("0 or more", lambda v: v >= 0)
FRACTION = Accepts("from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_ONE = Accepts("from 0 to below 1", lambda v: 0 <= v < 1)
PART = Accepts("above 0 and at most 1", lambda v: 0 < v <= 1)
PAIR = Accepts("above 0 and at most 1, twice, the lower one first",
               lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)
BETAS = Accepts("from 0 to below 1, one to three times",
                lambda v: 1 <= len(v) <= 3 and all(0 <= b < 1 for b in v))
SUITE = Accepts("imagenet, v2, a, r and sketch, with commas and =FOLDER where not beside data_path",
                lambda v: re.fullmatch(r"((imagenet|v2|a|r|sketch)(=[^,]+)?(,|$))*", v) is not None)
DEVICE = Accepts("auto, cpu, mps, cuda, xpu, or one of them with a number such as cuda:1",
                 lambda v: re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", v) is not None)
_PART = r"(backbone|stem|stages\.[0-3](-[0-3])?)"
PARTS = Accepts("backbone (all but the head), or stem and stages such as stem,stages.0-2",
                lambda v: re.fullmatch(f"{_PART}(,{_PART})*", v) is not None)
AUGMENT = Accepts("none or a timm policy such as rand-m9-mstd0.5-inc1", lambda v: bool(_AUGMENT.fullmatch(v)))


def _group(title: str):
    """What makes the options of a group, as `--help` shows it."""
    def option(default: T, help: str, accepts: Accepts | None = None) -> T:
        return field(default=default, metadata={"group": title, "help": help, "accepts": accepts})
    return option


RECIPE_GROUPS = ("Model and weights", "Training", "Augmentation")
_model, _train, _augment = map(_group, RECIPE_GROUPS)
_start, _data, _batch, _eval, _speed, _run, _process, _log = map(_group, (
    "Start here", "Data", "Batch", "Evaluation", "Precision and speed", "Run folder, saving and resuming",
    "Processes", "Logging"))


@dataclass
class Options:
    """The resolved options of one run. `None` stands for `none`; several values are a tuple.

    A subclass is the options of another command (see `dense.options`): `OMITTED` names those that it does not
    take, and that keep its defaults.
    """
    USAGE: ClassVar[str] = """main.py [--config RECIPE] [--FLAG VALUE ...]

  python main.py --config recipes/quickstart.yaml
  python main.py --eval true --model hornet_tiny_7x7 --resume CHECKPOINT --data_path IMAGENET
  torchrun --nproc_per_node 8 main.py --config recipes/hornet_tiny_7x7.yaml --output_dir RUN"""
    LAYOUT: ClassVar[str] = "train/ and val/"  # what --data_path holds
    QUICKSTART: ClassVar[str] = "quickstart"
    SAMPLE: ClassVar[str] = "data/digits"
    OMITTED: ClassVar[frozenset[str]] = frozenset()

    config: str | None = _start(None, "recipe (YAML) whose values replace the defaults; flags win")
    print_config: bool = _start(False, "print each value with its origin and the published one, then end")
    dry_run: bool = _start(False, "check options, data, model, memory and speed, then end")
    eval: bool = _start(False, "evaluate only")
    device: str = _start("auto", "auto takes the first of cuda, xpu, mps, cpu", DEVICE)
    output_dir: str = _start("", "folder of this run: checkpoints, log, report; '': nothing is saved")

    data_set: str = _data("IMNET", "kind of data; image_folder: data_path is itself the training folder",
                          one_of("IMNET", "image_folder", "CIFAR", "SAMPLE"))
    data_path: str = _data("", "folder of the images, in any form that README.md lists")
    eval_data_path: str | None = _data(None, "folder of the evaluation images when it is not data_path/val")
    nb_classes: int | None = _data(None, "classes; none: ImageNet's 1000, else one per folder", at_least(1))
    val_labels: str | None = _data(None, "labels of a flat val folder: CSV of name, synset; or the devkit's")
    val_fraction: float = _data(0.0, "part of the training images held back where there is no val", BELOW_ONE)
    allow_slow_parquet: bool = _data(False, "train from parquet, which reads a group of rows for each image")
    allow_class_mismatch: bool = _data(False, "accept a val folder with classes missing or added")
    allow_bad_images: bool = _data(False, "evaluate unreadable images too, each counts as incorrect")
    reindex: bool = _data(False, "read the data folder again instead of using the saved index")
    exif_orientation: bool = _data(False, "turn each image as its EXIF entry says; the published ones do not")
    index_cache: str | None = _data(None, "folder for the saved index of the data; none: the user's cache")
    imagenet_default_mean_and_std: bool = _data(True, "ImageNet's mean and deviation; false: Inception's")
    num_workers: int = _data(10, "loader processes per training process", at_least(0, 512))
    pin_mem: bool = _data(True, "keep batches in page-locked memory on the way to a GPU")

    model: str = _model("hornet_tiny_gf", "such as hornet_base_7x7; `python -m tools.zoo list` shows all")
    pretrained: bool = _model(False, "start from, or evaluate, the published weights of the model")
    finetune: str = _model("", "checkpoint (path or URL) to start from, with a new head where needed")
    input_size: int = _model(224, "side of the network's input in pixels", at_least(32, 4096))
    drop_path: float = _model(0.0, "rate of stochastic depth in the last block", BELOW_ONE)
    layer_scale_init_value: float = _model(1e-6, "start of the layer scale; 0: no layer scale", NOT_NEGATIVE)
    head_init_scale: float = _model(1.0, "factor on the new head's weights", NOT_NEGATIVE)
    grad_checkpointing: bool = _model(False, "recompute activations backwards: less memory, slower")
    model_key: str = _model("model|module", "entries of a checkpoint to look for the weights in")
    model_prefix: str = _model("", "prefix of the parameter names in the checkpoint")
    weights: str = _model("auto", "of a checkpoint; auto: the best", one_of("auto", "model", "ema", "both"))
    allow_partial: bool = _model(False, "accept a checkpoint of which less than 95 % fits")

    batch_size: int = _batch(64, "images per process in one forward pass", at_least(1, 2 ** 20))
    update_freq: int = _batch(1, "forward passes per update (gradient accumulation)", at_least(1, 2 ** 20))
    global_batch: int | None = _batch(None, "images per update, which gives update_freq", at_least(1))
    lr_scale: str = _batch("none", "scale lr with the global batch", one_of("none", "linear", "sqrt"))

    epochs: int = _train(300, "passes over the training images", at_least(1, 10 ** 6))
    lr: float = _train(4e-3, "highest learning rate, absolute (4e-3 is for 4096 images per update)", POSITIVE)
    min_lr: float = _train(1e-6, "learning rate at the end", NOT_NEGATIVE)
    warmup_epochs: int = _train(20, "epochs of linear warm-up", at_least(0, 10 ** 6))
    warmup_steps: int = _train(-1, "updates of warm-up; above 0 it wins over warmup_epochs", at_least(-1))
    opt: str = _train("adamw", "optimizer, by timm's name")
    opt_eps: float | None = _train(1e-8, "optimizer's epsilon; none: its own default", POSITIVE)
    opt_betas: tuple[float, ...] | None = _train(None, "optimizer's betas; none: its own default", BETAS)
    momentum: float = _train(0.9, "momentum of SGD", BELOW_ONE)
    weight_decay: float = _train(0.05, "weight decay", NOT_NEGATIVE)
    weight_decay_end: float | None = _train(None, "weight decay at the end; none: constant", NOT_NEGATIVE)
    layer_decay: float = _train(1.0, "factor on the rate from each layer to the one below", PART)
    clip_grad: float | None = _train(None, "limit of the gradient; none: no clipping", POSITIVE)
    clip_by: str = _train("norm", "what clip_grad limits", one_of("norm", "value", "agc"))
    clip_mode: str = _train("step", "once per update, or after every pass", one_of("step", "official"))
    model_ema: bool = _train(False, "keep a moving average of the weights")
    model_ema_decay: float = _train(0.9999, "decay of the moving average per update", BELOW_ONE)
    model_ema_eval: bool = _train(False, "evaluate the moving average after each epoch too")
    smoothing: float = _train(0.1, "label smoothing", BELOW_ONE)
    freeze: str | None = _train(None, "parts that keep the weights they start from", PARTS)
    start_epoch: int = _train(0, "first epoch when nothing is resumed", at_least(0))

    aa: str | None = _augment("rand-m9-mstd0.5-inc1", "automatic augmentation, by timm's name", AUGMENT)
    scale: tuple[float, ...] = _augment((0.08, 1.0), "area of the random crop as a part of the image", PAIR)
    hflip: float = _augment(0.5, "chance of a horizontal flip", FRACTION)
    color_jitter: float | None = _augment(0.4, "colour jitter, used when aa is none", NOT_NEGATIVE)
    train_interpolation: str = _augment("bicubic", "of random crops", one_of("bicubic", "bilinear", "random"))
    reprob: float = _augment(0.25, "chance of random erasing", FRACTION)
    remode: str = _augment("pixel", "what random erasing fills in", one_of("pixel", "rand", "const"))
    recount: int = _augment(1, "rectangles of random erasing", at_least(1, 64))
    mixup: float = _augment(0.8, "alpha of mixup; 0: none", NOT_NEGATIVE)
    cutmix: float = _augment(1.0, "alpha of CutMix; 0: none", NOT_NEGATIVE)
    cutmix_minmax: tuple[float, ...] | None = _augment(None, "limits of CutMix' side ratio", PAIR)
    mixup_prob: float = _augment(1.0, "chance that a group of images is mixed", FRACTION)
    mixup_switch_prob: float = _augment(0.5, "chance of CutMix where both are on", FRACTION)
    mixup_mode: str = _augment("batch", "one draw per group, pair or image", one_of("batch", "pair", "elem"))

    suite: str = _eval("", "ImageNet's validation sets to evaluate, with ReaL's labels too", SUITE)
    crop_pct: float | None = _eval(None, "input_size / resized short side, below 384; none: 0.875", PART)
    check: bool = _eval(False, "end with 0 only if the (first) checkpoint has the published accuracy")
    explain_difference: bool = _eval(False, "list what departs from the published protocol")
    report: str | None = _eval(None, "folder for per-class results, confusions and predictions")
    disable_eval: bool = _eval(False, "train without evaluating")

    use_amp: bool = _speed(False, "mixed precision")
    amp_dtype: str = _speed("bf16", "number format of mixed precision", one_of("bf16", "fp16"))
    compile: bool = _speed(False, "torch.compile, once one batch agrees with eager PyTorch; for GPUs")
    fast_math: bool = _speed(False, "allow TF32 on NVIDIA GPUs: faster, with other last digits")
    deterministic: bool = _speed(False, "deterministic algorithms on GPUs: bit-equal reruns, slower")
    model_ema_force_cpu: bool = _speed(False, "keep the moving average in main memory")

    resume: tuple[str, ...] = _run((), "checkpoint to resume or evaluate: path, URL, latest or best")
    auto_resume: bool = _run(True, "resume the newest valid checkpoint in output_dir")
    save_ckpt: bool = _run(True, "save checkpoints")
    save_ckpt_freq: int = _run(1, "epochs between checkpoints", at_least(1))
    save_ckpt_num: int = _run(3, "newest checkpoints to keep, beside best and every 50th", at_least(1))
    save_every_minutes: float = _run(15.0, "minutes between saves within an epoch; 0: none", NOT_NEGATIVE)
    on_nonfinite: str = _run("skip", "after a loss or gradient that is not finite: skip drops the update and "
                             "rolls back after three in a row", one_of("stop", "skip", "rollback"))
    seed: int = _run(0, "seed of every random draw", at_least(0, 2 ** 63 - 1))

    hang_timeout: float = _process(180.0, "seconds without progress until the run ends, tenfold at start, "
                                   "threefold for the first update and saving; 0: never", NOT_NEGATIVE)
    rendezvous_timeout: float = _process(180.0, "seconds to wait for all processes at the start", POSITIVE)
    stop_before_end: float = _process(120.0, "seconds before the time limit to save and stop", NOT_NEGATIVE)

    print_freq: int = _log(10, "updates between lines of figures, TensorBoard too", at_least(1))
    log_dir: str | None = _log(None, "folder for TensorBoard; none: tensorboard/ in output_dir")
    track: str | None = _log(None, "log to this package too (pip install it)", one_of("wandb", "trackio"))
    enable_wandb: bool = _log(False, "the same as --track wandb")
    project: str = _log("hornet", "project of the tracked run")
    wandb_ckpt: bool = _log(False, "upload the best and the last checkpoint there at the end")
    exp_name: str = _log("default", "name of the tracked run")

    def updates_per_epoch(self, images: int, global_batch: int) -> int:
        """Updates between two evaluations: those of a pass over the images, without what is left over."""
        return images // global_batch


# What `--help` shows; `--help all` shows every option.
COMMON = ("config", "print_config", "dry_run", "eval", "device", "output_dir", "data_set", "data_path",
          "num_workers", "model", "pretrained", "finetune", "input_size", "batch_size", "update_freq",
          "epochs", "lr", "model_ema", "use_amp", "resume")

# Published flags, accepted from the command line and recipes, that change nothing here.
NO_EFFECT = ("resplit", "dist_eval", "dist_url", "dist_on_itp", "world_size", "local_rank")


def _name(text: str) -> str:
    # No file system takes longer names; they would fail at any of a hundred places.
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if "\0" in text or "://" not in text and (longest > 255 or len(text) > 4000):
        raise ValueError
    # The shell leaves the tilde alone in --name=~/folder, and so does YAML.
    return os.path.expanduser(text) if text.startswith("~/") else text


# For each kind of value: how it is written, in short and in words, and what makes it of a text.
KINDS: dict[type, tuple[str, str, Callable[[str], Scalar]]] = {
    bool: ("true|false", "true or false", lambda text: _SWITCH[text.strip().lower()]),
    int: ("N", "a whole number", int), float: ("X", "a number", float),
    str: ("TEXT", "text, with names of at most 255 bytes", _name)}


@dataclass(frozen=True)
class Option:
    """One row of the table, and how its value is made of text; `element` is bool, int, float or str."""
    name: str
    default: Value
    group: str
    help: str
    accepts: Accepts | None
    element: type
    optional: bool  # takes `none`
    several: bool   # takes one or more values

    def convert(self, texts: Sequence[str], label: str) -> Value:
        """The value written as `texts`; `label` names it in errors (`--lr`, or a key of a recipe).

        Raises: UserError (`invalid_value`) for a wrong type or number of values, NaN, out of range.
        """
        text, (_, words, convert) = " ".join(texts), KINDS[self.element]
        empty = ("none", "null", "~", *[""] * self.several) if self.optional or self.several else ()
        if text.strip().lower() in empty:
            return None if self.optional else ()
        with suppress(LookupError, ValueError):
            values = tuple(map(convert, texts))
            value = values if self.several else values[0]
            if ((self.several or len(values) == 1) and (self.accepts is None or self.accepts.test(value))
                    and all(math.isfinite(v) for v in values if isinstance(v, float))):
                return value
        if self.accepts is not None:
            words = self.accepts.words if self.element is str else f"{words} {self.accepts.words}"
        words += ", or none" if self.optional and "none" not in words else ""
        raise UserError(f"{label} {plain(text) or repr(text)} is not accepted; it takes {words}.",
                        code="invalid_value")


@cache
def table(kind: type[Options]) -> dict[str, Option]:
    """The options that a command takes, by name."""
    found, hints = {}, get_type_hints(kind)
    for f in fields(kind):
        inner, *none = get_args(hints[f.name]) if type(None) in get_args(hints[f.name]) else (hints[f.name],)
        several = get_origin(inner) is tuple
        if f.name not in kind.OMITTED:
            found[f.name] = Option(f.name, getattr(kind, f.name), optional=bool(none), several=several,
                                   element=get_args(inner)[0] if several else inner, **f.metadata)
    return found


OPTIONS = table(Options)


def from_checkpoint(args: Mapping[str, object], names: Iterable[str]) -> dict[str, Any]:
    """The options `names` in a checkpoint's `args`, as far as they are there.

    Raises: UserError (`invalid_value`) for a value that the option does not take.
    """
    return {name: OPTIONS[name].convert([str(args[name])], f"the checkpoint's {name}")
            for name in names if name in args}


@dataclass(frozen=True)
class ImageSettings:
    """How images reach a network, one definition for training, evaluation, checkpoints and tools.

    Attributes:
        input_size: height and width of the network's input in pixels.
        crop_pct: input_size / resized short side in evaluation, None: the default; unused from 384 pixels on.
        imagenet_default_mean_and_std: normalise with ImageNet's mean and deviation, else Inception's 0.5.
        exif_orientation: turn each image as its EXIF entry says.
        train_interpolation: of the random crop in training; evaluation is always bicubic.
        layer_scale_init_value: 0 means that the network has no layer scale at all.
    """
    input_size: int = 224
    crop_pct: float | None = None
    imagenet_default_mean_and_std: bool = True
    exif_orientation: bool = False
    train_interpolation: str = "bicubic"
    layer_scale_init_value: float = 1e-6

    SMALL: ClassVar[int] = 32  # up to this size (CIFAR) nothing is resized

    @classmethod
    def of(cls, options: Options) -> "ImageSettings":
        """Those of the options."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls)})

    @classmethod
    def from_args(cls, args: Mapping[str, object]) -> "ImageSettings":
        """Those in a checkpoint's `args`, as `from_checkpoint`; defaults for what is missing."""
        return cls(**from_checkpoint(args, (f.name for f in fields(cls))))

    @property
    def eval_crop_pct(self) -> float | None:
        """The crop of evaluation; None where it sees the whole image, resized to the input size without
        keeping its shape: the published protocol from 384 pixels on, below which it crops 0.875."""
        return None if self.input_size >= 384 else self.crop_pct or 0.875

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean per channel (RGB) of pixels in 0..1."""
        return (0.485, 0.456, 0.406) if self.imagenet_default_mean_and_std else (0.5, 0.5, 0.5)

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation per channel (RGB) of pixels in 0..1."""
        return (0.229, 0.224, 0.225) if self.imagenet_default_mean_and_std else (0.5, 0.5, 0.5)
