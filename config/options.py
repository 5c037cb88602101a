"""Every option of `main.py` in one table: name, type, default, one sentence of help and the accepted values.

Names and defaults are those of the published training code where it has the option. Nothing here imports torch.
"""
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from common.errors import UserError
from common.text import quote


@dataclass(frozen=True)
class Accepts:
    """What an option takes beyond its type: `words` for the person, `test` for the program."""
    words: str
    test: Callable[[Any], bool]


def one_of(*words: str) -> Accepts:
    return Accepts(" or ".join([", ".join(words[:-1]), words[-1]]), lambda value: value in words)


def at_least(low: int, high: int = 2 ** 31 - 1) -> Accepts:
    words = f"{low} or more" if high == 2 ** 31 - 1 else f"from {low} to {high}"
    return Accepts(words, lambda value: low <= value <= high)


def _increasing_pair(values: tuple[float, ...]) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1] <= 1


_AUGMENT = re.compile(r"rand(-(m|n|mstd|mmax|inc|w|p|t)[0-9.]+)*"
                      r"|augmix(-(m|w|d|a|b|mstd)[0-9.]+)*"
                      r"|(original|originalr|v0|v0r|3a)(-(mstd)[0-9.]+)*")

POSITIVE = Accepts("above 0", lambda v: v > 0)
NOT_NEGATIVE = Accepts("0 or more", lambda v: v >= 0)
FRACTION = Accepts("from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_ONE = Accepts("from 0 to below 1", lambda v: 0 <= v < 1)
PART = Accepts("above 0 and at most 1", lambda v: 0 < v <= 1)
PAIR = Accepts("above 0 and at most 1, twice, the lower one first", _increasing_pair)
BETAS = Accepts("from 0 to below 1, one to three times", lambda v: 1 <= len(v) <= 3 and all(0 <= b < 1 for b in v))
DEVICE = Accepts("auto, cpu, mps, cuda, xpu, or one of them with a number such as cuda:1",
                 lambda v: re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", v) is not None)
AUGMENT = Accepts("none or a timm policy such as rand-m9-mstd0.5-inc1",
                  lambda v: _AUGMENT.fullmatch(v) is not None)


def _group(title: str, recipe: bool = False) -> Callable[..., Any]:
    """Make the options of one group; those of a `recipe` group are compared with the published recipe."""
    def option(default: Any, help: str, accepts: Accepts | None = None, *, common: bool = False,
               no_effect: str = "") -> Any:
        return field(default=default, metadata={"group": title, "recipe": recipe, "help": help, "accepts": accepts,
                                                "common": common, "no_effect": no_effect})
    return option


_start = _group("Start here")
_data = _group("Data")
_model = _group("Model and weights", recipe=True)
_batch = _group("Batch")
_train = _group("Training", recipe=True)
_augment = _group("Augmentation", recipe=True)
_eval = _group("Evaluation")
_speed = _group("Precision and speed")
_run = _group("Run folder, saving and resuming")
_process = _group("Processes")
_log = _group("Logging")


@dataclass
class Options:
    """The resolved options of one run. `None` stands for `none`; several values are a tuple."""
    config: str | None = _start(None, "recipe (YAML) whose values replace the defaults; flags win", common=True)
    print_config: bool = _start(False, "print every value, its origin and its difference from the published recipe, "
                                "and end", common=True)
    dry_run: bool = _start(False, "check options, data, model, memory and speed, then end", common=True)
    eval: bool = _start(False, "evaluate only", common=True)
    device: str = _start("auto", "auto takes the first of cuda, xpu, mps, cpu", DEVICE, common=True)
    output_dir: str = _start("", "folder of this run: checkpoints, log.txt, report; nothing is saved without it",
                             common=True)

    data_set: str = _data("IMNET", "layout of the data: IMNET (train/ and val/ with one folder per class), "
                          "image_folder (data_path is the train folder itself), CIFAR (CIFAR-100), SAMPLE (digits)",
                          one_of("IMNET", "image_folder", "CIFAR", "SAMPLE"), common=True)
    data_path: str = _data("", "folder of the data set: class folders or .tar files", common=True)
    eval_data_path: str | None = _data(None, "folder of the evaluation pictures when it is not data_path/val")
    nb_classes: int | None = _data(None, "number of classes; none: 1000 for folders named by ImageNet's synsets, "
                                   "100 for CIFAR, otherwise the number of folders", at_least(1))
    val_labels: str | None = _data(None, "labels of a flat val folder: CSV of file name and synset, or the devkit's "
                                   "ground-truth file")
    allow_class_mismatch: bool = _data(False, "accept a val folder with classes missing or added")
    allow_bad_images: bool = _data(False, "evaluate although some pictures cannot be read (each counts as wrong)")
    reindex: bool = _data(False, "read the data folder anew instead of using the saved index")
    index_cache: str | None = _data(None, "folder for the saved index of the pictures; none: the user's cache folder")
    imagenet_default_mean_and_std: bool = _data(True, "normalise with ImageNet's mean and deviation; "
                                                "false: Inception's")
    num_workers: int = _data(10, "loader processes per training process", at_least(0, 512), common=True)
    pin_mem: bool = _data(True, "keep batches in page-locked memory on the way to a GPU")

    model: str = _model("hornet_tiny_gf", "hornet_tiny, _small, _base or _large with _7x7 or _gf, hornet_base_gf_img384, "
                        "hornet_large_gf_img384; hornet_nano_7x7 or _gf for small pictures", common=True)
    pretrained: bool = _model(False, "start from, or evaluate, the published weights of the model", common=True)
    finetune: str = _model("", "checkpoint (path or https URL) to start training from, with a new head where needed",
                           common=True)
    input_size: int = _model(224, "height and width of the network's input in pixels", at_least(32, 4096), common=True)
    drop_path: float = _model(0.0, "rate of stochastic depth in the last block", BELOW_ONE)
    layer_scale_init_value: float = _model(1e-6, "start of the layer scale; 0 leaves it out", NOT_NEGATIVE)
    head_init_scale: float = _model(1.0, "factor on the new head's weights", NOT_NEGATIVE)
    grad_checkpointing: bool = _model(False, "recompute activations in the backward pass: less memory, slower")
    model_key: str = _model("model|module", "entries of a checkpoint that may hold the weights, in this order")
    model_prefix: str = _model("", "prefix of the parameter names in the checkpoint")
    weights: str = _model("auto", "weights to take from a checkpoint; auto: those that the file says were best",
                          one_of("auto", "model", "ema", "both"))
    allow_partial: bool = _model(False, "accept a checkpoint of which fewer than 95 % of the tensors fit")

    batch_size: int = _batch(64, "pictures per process in one forward pass", at_least(1, 2 ** 20), common=True)
    update_freq: int = _batch(1, "forward passes per update (gradient accumulation)", at_least(1, 2 ** 20), common=True)
    global_batch: int | None = _batch(None, "pictures per update over all processes, from which update_freq is derived",
                                      at_least(1))
    lr_scale: str = _batch("none", "scale lr by global batch / the recipe's global batch, or by its root",
                           one_of("none", "linear", "sqrt"))

    epochs: int = _train(300, "passes over the training pictures", at_least(1, 10 ** 6), common=True)
    lr: float = _train(4e-3, "highest learning rate, absolute (4e-3 belongs to 4096 pictures per update)", POSITIVE,
                       common=True)
    min_lr: float = _train(1e-6, "learning rate at the end", NOT_NEGATIVE)
    warmup_epochs: int = _train(20, "epochs of linear warm-up", at_least(0, 10 ** 6))
    warmup_steps: int = _train(-1, "updates of linear warm-up; above 0 it wins over warmup_epochs", at_least(-1))
    opt: str = _train("adamw", "optimizer, by timm's name")
    opt_eps: float | None = _train(1e-8, "optimizer's epsilon; none: its own default", POSITIVE)
    opt_betas: tuple[float, ...] | None = _train(None, "optimizer's betas; none: its own default", BETAS)
    momentum: float = _train(0.9, "momentum of SGD", BELOW_ONE)
    weight_decay: float = _train(0.05, "weight decay", NOT_NEGATIVE)
    weight_decay_end: float | None = _train(None, "weight decay at the end of its cosine; none: constant", NOT_NEGATIVE)
    layer_decay: float = _train(1.0, "factor on the learning rate from each layer to the one below", PART)
    clip_grad: float | None = _train(None, "limit of the gradient; none: no clipping", POSITIVE)
    clip_by: str = _train("norm", "what clip_grad limits", one_of("norm", "value", "agc"))
    clip_mode: str = _train("step", "step clips once per update; official clips after every forward pass, as the "
                            "published code does", one_of("step", "official"))
    model_ema: bool = _train(False, "keep a moving average of the weights", common=True)
    model_ema_decay: float = _train(0.9999, "decay of the moving average per update", BELOW_ONE)
    model_ema_eval: bool = _train(False, "evaluate the moving average after each epoch too")
    smoothing: float = _train(0.1, "label smoothing", BELOW_ONE)
    start_epoch: int = _train(0, "first epoch when nothing is resumed", at_least(0))

    aa: str | None = _augment("rand-m9-mstd0.5-inc1", "automatic augmentation, by timm's name", AUGMENT)
    scale: tuple[float, ...] = _augment((0.08, 1.0), "area of the random crop as a part of the picture", PAIR)
    hflip: float = _augment(0.5, "chance of a horizontal flip", FRACTION)
    color_jitter: float | None = _augment(0.4, "colour jitter, used when aa is none", NOT_NEGATIVE)
    train_interpolation: str = _augment("bicubic", "interpolation of the random crop",
                                        one_of("bicubic", "bilinear", "random"))
    reprob: float = _augment(0.25, "chance of random erasing", FRACTION)
    remode: str = _augment("pixel", "what random erasing fills in", one_of("pixel", "rand", "const"))
    recount: int = _augment(1, "rectangles of random erasing", at_least(1, 64))
    resplit: bool = _augment(False, "published flag", no_effect="the published training code never reads it")
    mixup: float = _augment(0.8, "alpha of mixup; 0: none", NOT_NEGATIVE)
    cutmix: float = _augment(1.0, "alpha of CutMix; 0: none", NOT_NEGATIVE)
    cutmix_minmax: tuple[float, ...] | None = _augment(None, "limits of CutMix' side ratio instead of alpha", PAIR)
    mixup_prob: float = _augment(1.0, "chance that a group of pictures is mixed", FRACTION)
    mixup_switch_prob: float = _augment(0.5, "chance of CutMix where both are on", FRACTION)
    mixup_mode: str = _augment("batch", "one choice and ratio per group (batch), pair or picture (elem)",
                               one_of("batch", "pair", "elem"))

    crop_pct: float | None = _eval(None, "input_size / resized short side, below 384 pixels (none: 0.875); from 384 on "
                                   "pictures are evaluated whole", PART)
    check: bool = _eval(False, "end with 0 only if the (first) checkpoint reaches the published accuracy (PASS), else with 1")
    explain_difference: bool = _eval(False, "list each setting that departs from the published protocol")
    report: str | None = _eval(None, "folder for per-class results, confusions and predictions of an evaluation")
    disable_eval: bool = _eval(False, "train without evaluating")
    dist_eval: bool = _eval(True, "published flag", no_effect="each picture is evaluated exactly once by any number of "
                            "processes")

    use_amp: bool = _speed(False, "mixed precision", common=True)
    amp_dtype: str = _speed("bf16", "number format of mixed precision", one_of("bf16", "fp16"))
    compile: bool = _speed(False, "use torch.compile once one batch has agreed with eager PyTorch; for GPUs: on a CPU "
                           "it takes the place of the kernels built here")
    fast_math: bool = _speed(False, "allow TF32 in products and convolutions on NVIDIA GPUs: faster, with other last digits")
    deterministic: bool = _speed(False, "only deterministic algorithms on GPUs: bit-equal reruns, slower")
    model_ema_force_cpu: bool = _speed(False, "keep the moving average in main memory")

    resume: tuple[str, ...] = _run((), "checkpoint to go on from or to evaluate: path, https URL, latest or best; "
                                   "several with --eval true", common=True)
    auto_resume: bool = _run(True, "go on from the newest valid checkpoint in output_dir")
    save_ckpt: bool = _run(True, "save checkpoints")
    save_ckpt_freq: int = _run(1, "epochs between checkpoints", at_least(1))
    save_ckpt_num: int = _run(3, "checkpoints to keep beside the best and every 50th", at_least(1))
    save_every_minutes: float = _run(15.0, "minutes between checkpoints within an epoch; 0: none", NOT_NEGATIVE)
    on_nonfinite: str = _run("skip", "after an infinite or undefined loss or gradient: skip leaves the update out and "
                            "goes back to the last checkpoint after three in a row, rollback goes back at once, stop ends the run",
                             one_of("stop", "skip", "rollback"))
    seed: int = _run(0, "seed of every random draw", at_least(0, 2 ** 63 - 1))

    hang_timeout: float = _process(180.0, "seconds without progress until the run ends and names who waits for whom (ten "
                                   "times that at start-up, three times for the first update and for saving); 0: never", NOT_NEGATIVE)
    rendezvous_timeout: float = _process(180.0, "seconds to wait for all processes at the start", POSITIVE)
    stop_before_end: float = _process(120.0, "seconds before the job's time limit at which to save and stop",
                                      NOT_NEGATIVE)
    dist_url: str = _process("env://", "published flag", no_effect="the launcher says where the processes meet")
    local_rank: int = _process(-1, "set by the launcher", at_least(-1))
    world_size: int = _process(1, "published flag", at_least(1), no_effect="the launcher sets the number of processes")
    dist_on_itp: bool = _process(False, "published flag", no_effect="the launcher is recognised by itself")

    print_freq: int = _log(10, "updates between lines of figures (console or progress bar, TensorBoard)", at_least(1))
    log_dir: str | None = _log(None, "folder for TensorBoard; none: tensorboard/ in output_dir")
    enable_wandb: bool = _log(False, "log to Weights & Biases (pip install wandb)")
    project: str = _log("hornet", "project name there")
    wandb_ckpt: bool = _log(False, "store the best and the last checkpoint there too, at the end of the run")
    exp_name: str = _log("default", "name of this run there")


@dataclass(frozen=True)
class ImageSettings:
    """How images reach a network, one definition for training, evaluation, checkpoints and tools.

    Attributes:
        input_size: height and width of the network's input in pixels.
        crop_pct: input_size / resized short side in evaluation, None: the default; no effect from 384 pixels on.
        imagenet_default_mean_and_std: normalise with ImageNet's mean and deviation, else Inception's 0.5.
        train_interpolation: of the random crop in training; evaluation is always bicubic.
        layer_scale_init_value: 0 means that the network has no layer scale at all.
    """
    input_size: int = 224
    crop_pct: float | None = None
    imagenet_default_mean_and_std: bool = True
    train_interpolation: str = "bicubic"
    layer_scale_init_value: float = 1e-6

    # The published protocol: from this size on the whole image is resized, below it a part is cropped ...
    WHOLE_FROM: ClassVar[int] = 384
    DEFAULT_CROP_PCT: ClassVar[float] = 0.875  # ... of this share; and up to this size (CIFAR) nothing is resized.
    SMALL: ClassVar[int] = 32

    @classmethod
    def of(cls, options: Options) -> "ImageSettings":
        """Those of the options."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls)})

    @classmethod
    def from_args(cls, args: Mapping[str, Any], **replaced: Any) -> "ImageSettings":
        """Those that a checkpoint's `args` hold; defaults for what is missing. `replaced` values win unless None.

        Raises: UserError (`invalid_checkpoint`) for a value that the option does not take.
        """
        known = {f.name: f for f in fields(cls)}
        found = {name: args[name] for name in known if name in args}
        found |= {name: value for name, value in replaced.items() if value is not None}
        for name, value in found.items():
            accepts = Options.__dataclass_fields__[name].metadata["accepts"]
            wanted = type(known[name].default) if known[name].default is not None else float
            optional = known[name].default is None and value is None
            number = wanted is float and type(value) is int
            if not optional and (type(value) is not wanted and not number or not finite(value)
                                 or accepts is not None and not accepts.test(value)):
                words = accepts.words if accepts else "true or false"
                raise UserError(f"{name} {quote(str(value))} is not accepted; it takes {words}.",
                                code="invalid_checkpoint")
        return cls(**found)

    def args(self) -> dict[str, Any]:
        """Plain values under the names of the options, for checkpoints and exported files."""
        return asdict(self)

    @property
    def whole(self) -> bool:
        """Evaluation sees the whole image, resized to the input size without keeping its shape."""
        return self.input_size >= self.WHOLE_FROM

    @property
    def eval_crop_pct(self) -> float | None:
        """The crop of evaluation, None where the whole image is seen."""
        return None if self.whole else self.crop_pct or self.DEFAULT_CROP_PCT

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean per channel (RGB) of pixels in 0..1."""
        return (0.485, 0.456, 0.406) if self.imagenet_default_mean_and_std else (0.5, 0.5, 0.5)

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation per channel (RGB) of pixels in 0..1."""
        return (0.229, 0.224, 0.225) if self.imagenet_default_mean_and_std else (0.5, 0.5, 0.5)


def finite(value: Any) -> bool:
    """No NaN or infinity in `value`, which may be a tuple."""
    values = value if isinstance(value, tuple) else (value,)
    return all(not isinstance(v, float) or math.isfinite(v) for v in values)
