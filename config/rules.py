"""The rules between options: first before anything is touched, then when processes and images are known."""
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from common.errors import UserError
from common.text import plural
from config.options import ImageSettings, Options

if TYPE_CHECKING:
    from config.parse import Resolved

_PUBLISHED_BATCH = 4096
_FEW_UPDATES, _UNUSED_SHARE = 100, 0.1
# option → (the option it needs, how to give that one)
_NEEDS = {"amp_dtype": ("use_amp", "--use_amp true"), "model_ema_eval": ("model_ema", "--model_ema true"),
          "model_ema_force_cpu": ("model_ema", "--model_ema true"), "clip_by": ("clip_grad", "--clip_grad"),
          "clip_mode": ("clip_grad", "--clip_grad"), "wandb_ckpt": ("enable_wandb", "--enable_wandb true"),
          "check": ("eval", "--eval true"), "explain_difference": ("eval", "--eval true"),
          "report": ("eval", "--eval true")}


def settle(options: Options, origins: dict[str, str]) -> list[str]:
    """Resolve (in place) what two options decide together; one sentence for each option without effect."""
    notices = []
    if options.global_batch is not None and origins["update_freq"] != "default":
        if origins["global_batch"] == origins["update_freq"]:
            raise UserError(f"--global_batch {options.global_batch} and --update_freq {options.update_freq} "
                            "are both given; give one of them, the other follows from batch_size and the "
                            "number of processes.", code="contradiction")
        if origins["update_freq"] == "flag":
            notices.append(f"--update_freq {options.update_freq} replaces the recipe's global_batch "
                           f"{options.global_batch}.")
            options.global_batch, origins["global_batch"] = None, "flag"
    if options.data_set == "SAMPLE" and not options.data_path:
        options.data_path = "data/digits"
    if options.resume and not options.resume[0].strip():
        options.resume = ()
    given = {f.name for f in fields(Options) if origins[f.name] == "flag"
             or origins[f.name] == "recipe" and getattr(options, f.name) != f.default}
    set_here = {name for name in given if getattr(options, name)}
    notices += [f"--{name} has no effect without {words}." for name, (needed, words) in _NEEDS.items()
                if name in set_here and not getattr(options, needed)]
    size = options.input_size
    if "crop_pct" in set_here and size >= ImageSettings.WHOLE_FROM:
        notices.append(f"--crop_pct has no effect at --input_size {size}: from {ImageSettings.WHOLE_FROM} "
                       "pixels on images are evaluated whole.")
    if "scale" in given and size <= ImageSettings.SMALL and not options.eval:
        notices.append(f"--scale has no effect at --input_size {size}: up to {ImageSettings.SMALL} pixels "
                       "images are padded and cropped.")
    return notices + [f"--{name} has no effect with --eval true." for name in ("compile", "deterministic")
                      if options.eval and name in set_here]


def mixes(options: Options) -> bool:
    """Mixup or CutMix is on, so that images come in pairs."""
    return options.mixup > 0 or options.cutmix > 0 or bool(options.cutmix_minmax)


def check(options: Options) -> None:
    """Refuse contradictions between options. Raises `UserError` (`missing_data`, `contradiction`)."""
    o = options
    if not o.print_config and not o.data_path and not (o.eval and o.eval_data_path):
        raise UserError("--data_path is missing; give the folder that holds train/ and val/, such as "
                        "--data_path /data/imagenet, or try --config recipes/quickstart.yaml without any "
                        "data.",
                        code="missing_data")
    training = not o.eval
    rules = (
        (o.pretrained and o.finetune, f"--pretrained true and --finetune {o.finetune} both name the weights "
         "to start from; give one of them."),
        (training and len(o.resume) > 1, f"--resume takes one checkpoint in training, {len(o.resume)} were "
         "given; add --eval true to evaluate several."),
        (training and o.weights == "both", "--weights both is for --eval true; use auto, model or ema."),
        (training and o.warmup_steps <= 0 and o.warmup_epochs > o.epochs, "--warmup_epochs "
         f"{o.warmup_epochs} is longer than the run of --epochs {o.epochs}; give --warmup_epochs from 0 to "
         f"{o.epochs}."),
        (training and o.start_epoch >= o.epochs, f"--start_epoch {o.start_epoch} is not below --epochs "
         f"{o.epochs}; lower it or raise --epochs."),
        (training and o.min_lr > o.lr, f"--min_lr {o.min_lr:g} is above --lr {o.lr:g}; give a smaller "
                                       "--min_lr."),
        (training and mixes(o) and o.batch_size % 2, f"--batch_size {o.batch_size} is odd, but mixup and "
         "CutMix mix pairs of images; give an even number, or --mixup 0 --cutmix 0."),
        (training and (o.global_batch or o.batch_size) < o.batch_size, f"--global_batch {o.global_batch} is "
         f"below --batch_size {o.batch_size}; lower --batch_size or raise --global_batch."),
    )
    for broken, sentence in rules:
        if broken:
            raise UserError(sentence, code="contradiction")


@dataclass(frozen=True)
class BatchPlan:
    """Images per update, how it comes about, and the learning rate for it."""
    global_batch: int
    update_freq: int
    batch_size: int
    world_size: int
    lr: float
    notices: tuple[str, ...] = ()

    def apply(self, options: Options) -> Options:
        """A copy of `options` with the plan's accumulation, global batch and learning rate in it."""
        return replace(options, batch_size=self.batch_size, update_freq=self.update_freq,
                       global_batch=self.global_batch, lr=self.lr)

    @property
    def equation(self) -> str:
        """How the images of an update come together, for people."""
        return (f"{self.global_batch} images per update = {self.batch_size} per forward pass x "
                f"{plural(self.update_freq, 'forward pass')} x {plural(self.world_size, 'process')}")


def plan_batch(resolved: "Resolved", world_size: int, checkpoint_batch: int | None = None) -> BatchPlan:
    """Derive the accumulation for `world_size` processes, and scale the learning rate if asked to.

    Args: checkpoint_batch: the global batch of the resumed run, which wins over batch_size x update_freq x
    processes, so that a run continues unchanged on another number of processes.
    Raises: UserError (`batch`) when nothing divides, or `--global_batch` is not the checkpoint's.
    """
    options = resolved.options
    asked = options.global_batch
    if checkpoint_batch and asked not in (None, checkpoint_batch):
        raise UserError(f"--global_batch {asked} differs from the checkpoint's {checkpoint_batch}; give "
                        f"--global_batch {checkpoint_batch}, or start a new run in another "
                        "--output_dir.", code="batch")
    batch_size, per_pass = options.batch_size, options.batch_size * world_size
    wanted = checkpoint_batch or asked or per_pass * options.update_freq
    if wanted % per_pass:
        smaller = _smaller_batch(options, wanted, world_size)
        if not checkpoint_batch or smaller is None:
            sentence = _does_not_divide(options, wanted, world_size, resumed=bool(checkpoint_batch))
            raise UserError(sentence, code="batch")
        batch_size, per_pass = smaller, smaller * world_size
    plan = BatchPlan(wanted, wanted // per_pass, batch_size, world_size, options.lr)
    notices = []
    other_size = batch_size != options.batch_size
    if checkpoint_batch and (other_size or asked is None and plan.update_freq != options.update_freq):
        size = f"batch_size {batch_size} and " if other_size else ""
        notices.append(f"The checkpoint's global batch of {wanted} is kept: {size}update_freq is "
                       f"{plan.update_freq} on {plural(world_size, 'process')}.")
    reference = resolved.reference
    factor = wanted / (reference and reference.global_batch or _PUBLISHED_BATCH)
    lr = options.lr * {"none": 1.0, "linear": factor, "sqrt": factor ** 0.5}[options.lr_scale]
    if lr < options.min_lr and not options.eval:
        raise UserError(f"--lr_scale {options.lr_scale} gives lr {lr:g} for a global batch of {wanted}, "
                        f"below --min_lr {options.min_lr:g}; lower --min_lr.", code="contradiction")
    if reference and factor != 1 and options.lr_scale == "none" and not options.eval:
        scaled = (f" linear scaling would give lr {lr * factor:g} instead of {lr:g} (--lr_scale linear),"
                  if lr == reference.values.get("lr", Options.lr) else "")
        recipes = reference.global_batch or 0
        way = f"--update_freq {recipes // per_pass}"
        way = f"--global_batch {recipes}" if asked or recipes % per_pass else way
        notices.append(f"The global batch is {wanted}, not the recipe's {recipes}:{scaled} {way} restores "
                       "the recipe.")
    return replace(plan, lr=lr, notices=tuple(notices))


def _step(options: Options) -> int:
    """Batch sizes are multiples of this: images are mixed in pairs."""
    return 2 if mixes(options) else 1


def _smaller_batch(options: Options, wanted: int, world_size: int) -> int | None:
    """The largest batch size, at most the one asked for, with which `world_size` processes make `wanted`."""
    sizes = range(options.batch_size, 0, -1)
    return next((b for b in sizes if wanted % (b * world_size) == 0 and b % _step(options) == 0), None)


def _does_not_divide(options: Options, wanted: int, world_size: int, resumed: bool) -> str:
    per_pass = options.batch_size * world_size
    if resumed:
        counts = [w for w in range(1, wanted + 1) if _smaller_batch(options, wanted, w)]
        name, fixes = "the checkpoint's global batch of", f"use {', '.join(map(str, counts[:12]))} processes"
    else:
        name, below = "--global_batch", wanted // per_pass * per_pass
        size = _smaller_batch(options, wanted, world_size)
        fixes = "nearest: " + " or ".join(f"--global_batch {b}" for b in (below, below + per_pass) if b)
        fixes += f", or --batch_size {size}" if size else ""
    return (f"{name} {wanted} is not a multiple of {per_pass} = --batch_size {options.batch_size} x "
            f"{world_size} processes; {fixes}.")


def validate_after_index(options: Options, plan: BatchPlan, num_images: int, num_classes: int) -> int:
    """When the training images are indexed: return updates per epoch, or raise `UserError`."""
    if options.nb_classes is not None and num_classes > options.nb_classes:
        raise UserError(f"--nb_classes {options.nb_classes} is below the {num_classes} classes of "
                        f"{options.data_path}; give --nb_classes {num_classes} or remove the "
                        "flag.", code="classes")
    updates = num_images // plan.global_batch
    if updates == 0:
        raise UserError(f"--batch_size {plan.batch_size} with {plan.equation} is more than the {num_images} "
                        f"training images of {options.data_path}, so an epoch would have no update; "
                        f"{_fitting(options, plan, num_images)}.", code="batch")
    total = updates * options.epochs
    if options.warmup_steps > total:
        raise UserError(f"--warmup_steps {options.warmup_steps} is longer than the run of {total} updates "
                        f"({options.epochs} epochs x {updates}); give a smaller "
                        "--warmup_steps.", code="contradiction")
    return updates


def _fitting(options: Options, plan: BatchPlan, num_images: int) -> str:
    per_process = num_images // plan.world_size // _step(options) * _step(options)
    if per_process == 0:
        return f"use fewer than {plan.world_size} processes or more images"
    if per_process < plan.batch_size:
        return f"lower --batch_size to {per_process} or less, with --update_freq 1"
    freq = num_images // (plan.batch_size * plan.world_size)
    return (f"lower --global_batch to {freq * plan.batch_size * plan.world_size}" if options.global_batch
            else f"lower --update_freq to {freq}")


def small_data_notice(options: Options, plan: BatchPlan, num_images: int) -> str | None:
    """A sentence when the global batch is too large for the data: many images unused, or few updates in all.

    It names the largest `--global_batch` (with the `--batch_size` for it) that ends both, as far as possible.
    """
    updates, unused = divmod(num_images, plan.global_batch)
    if unused < _UNUSED_SHARE * num_images and updates * options.epochs >= _FEW_UPDATES:
        return None
    step = _step(options) * plan.world_size
    sizes = [b for b in range(step, plan.global_batch, step) if num_images % b < _UNUSED_SHARE * num_images]
    enough = [b for b in sizes if num_images // b * options.epochs >= _FEW_UPDATES] or sizes[:1]
    found = (f"Each epoch uses {num_images - unused} of the {num_images} training images (others in every "
             f"epoch) in {plural(updates, 'update')}, {updates * options.epochs} in the whole run")
    if not enough:
        return f"{found}: too few to learn much; more epochs or images would help."
    size = _smaller_batch(options, enough[-1], plan.world_size)
    more = "" if size == options.batch_size else f" --batch_size {size}"
    return (f"{found}; --global_batch {enough[-1]}{more} (without --update_freq) would give "
            f"{num_images // enough[-1] * options.epochs} updates that leave out {num_images % enough[-1]} "
            "images per epoch.")


def resumed_schedule_notice(*, epochs: int, earlier_epochs: int, lr: float, earlier_lr: float) -> str | None:
    """A sentence when `--epochs` other than the checkpoint's moves the learning rate of a resumed run.

    Args: lr: learning rate of the next update in a run of `epochs`; earlier_lr: in one of `earlier_epochs`.
    """
    if epochs == earlier_epochs or abs(lr - earlier_lr) <= 0.01 * earlier_lr:
        return None
    return (f"--epochs {epochs} instead of {earlier_epochs} stretches the schedule: the learning rate "
            f"continues at {lr:.3g}, not at {earlier_lr:.3g}; a new run with --finetune would begin with a "
            "warm-up.")
