"""The rules between options: step one before anything is touched, step two when processes and pictures are known."""
from dataclasses import dataclass, replace
from typing import Any

from common.errors import UserError
from config.options import Options

_PUBLISHED_BATCH = 4096


def settle(options: Options, origins: dict[str, str]) -> list[str]:
    """Resolve what two options say about one thing (in place) and return one sentence for each flag without effect."""
    notices = []
    _settle_batch(options, origins, notices)
    if options.data_set == "SAMPLE" and not options.data_path:
        options.data_path = "data/digits"
    fields = Options.__dataclass_fields__
    given = {name for name, origin in origins.items() if origin == "flag"
             or origin == "recipe" and getattr(options, name) != fields[name].default}
    for name, field in fields.items():
        if field.metadata["no_effect"] and name in given:
            notices.append(f"--{name} has no effect: {field.metadata['no_effect']}.")
    pairs = (("amp_dtype", "use_amp", "--use_amp true"), ("model_ema_eval", "model_ema", "--model_ema true"),
             ("model_ema_force_cpu", "model_ema", "--model_ema true"), ("clip_by", "clip_grad", "--clip_grad"),
             ("clip_mode", "clip_grad", "--clip_grad"), ("wandb_ckpt", "enable_wandb", "--enable_wandb true"),
             ("check", "eval", "--eval true"), ("explain_difference", "eval", "--eval true"),
             ("report", "eval", "--eval true"))
    for name, needed, words in pairs:
        if name in given and getattr(options, name) and not getattr(options, needed):
            notices.append(f"--{name} has no effect without {words}.")
    if options.input_size >= 384 and "crop_pct" in given and options.crop_pct:
        notices.append(f"--crop_pct has no effect at --input_size {options.input_size}: from 384 on pictures are evaluated "
                       "whole.")
    if options.input_size <= 32 and "scale" in given and not options.eval:
        notices.append(f"--scale has no effect at --input_size {options.input_size}: up to 32 pictures are padded and "
                       "cropped.")
    for name in ("compile", "deterministic"):
        if options.eval and name in given and getattr(options, name):
            notices.append(f"--{name} has no effect with --eval true.")
    return notices


def _settle_batch(options: Options, origins: dict[str, str], notices: list[str]) -> None:
    if options.global_batch is None or origins["update_freq"] == "default":
        return
    if origins["global_batch"] == origins["update_freq"]:
        raise UserError(f"--global_batch {options.global_batch} and --update_freq {options.update_freq} are both "
                        "given; give one of them, the other follows from batch_size and the number of processes.")
    if origins["update_freq"] == "flag":
        notices.append(f"--update_freq {options.update_freq} replaces the recipe's global_batch "
                       f"{options.global_batch}.")
        options.global_batch, origins["global_batch"] = None, "flag"


def mixes(options: Options) -> bool:
    """Mixup or CutMix is on, so that pictures come in pairs."""
    return options.mixup > 0 or options.cutmix > 0 or bool(options.cutmix_minmax)


def check(options: Options, origins: dict[str, str]) -> None:
    """Refuse contradictions between options. Raises `UserError`."""
    if not options.print_config and not options.data_path and not (options.eval and options.eval_data_path):
        raise UserError("--data_path is missing; give the folder that holds train/ and val/, such as "
                        "--data_path /data/imagenet, or try --config recipes/quickstart.yaml without any data.")
    if options.pretrained and options.finetune:
        raise UserError(f"--pretrained true and --finetune {options.finetune} both name the weights to start from; "
                        "give one of them.")
    if options.resume and not options.resume[0].strip():
        options.resume = ()
    if not options.eval:
        _check_training(options)


def _check_training(options: Options) -> None:
    if len(options.resume) > 1:
        raise UserError(f"--resume takes one checkpoint in training, {len(options.resume)} were given; add --eval "
                        "true to evaluate several.")
    if options.weights == "both":
        raise UserError("--weights both is for --eval true; use auto, model or ema.")
    if options.warmup_steps <= 0 and options.warmup_epochs > options.epochs:
        raise UserError(f"--warmup_epochs {options.warmup_epochs} is longer than the run of --epochs {options.epochs}; "
                        f"give --warmup_epochs from 0 to {options.epochs}.")
    if options.start_epoch >= options.epochs:
        raise UserError(f"--start_epoch {options.start_epoch} is not below --epochs {options.epochs}; lower it or "
                        "raise --epochs.")
    if options.min_lr > options.lr:
        raise UserError(f"--min_lr {options.min_lr:g} is above --lr {options.lr:g}; give a smaller --min_lr.")
    if mixes(options) and options.batch_size % 2:
        raise UserError(f"--batch_size {options.batch_size} is odd, but mixup and CutMix mix pairs of pictures; give "
                        "an even number, or --mixup 0 --cutmix 0.")
    if options.global_batch is not None and options.global_batch < options.batch_size:
        raise UserError(f"--global_batch {options.global_batch} is below --batch_size {options.batch_size}; lower "
                        "--batch_size or raise --global_batch.")


@dataclass(frozen=True)
class BatchPlan:
    """Pictures per update, how it comes about, and the learning rate for it."""
    global_batch: int
    update_freq: int
    batch_size: int
    world_size: int
    lr: float
    notices: tuple[str, ...] = ()

    def apply(self, options: Options) -> Options:
        """A copy of `options` with the plan's accumulation, global batch and learning rate in it."""
        return replace(options, batch_size=self.batch_size, update_freq=self.update_freq, global_batch=self.global_batch,
                       lr=self.lr)

    @property
    def equation(self) -> str:
        passes = f"{self.update_freq} forward pass{'es' if self.update_freq > 1 else ''}"
        return (f"{self.global_batch} pictures per update = {self.batch_size} per forward pass x {passes} x "
                f"{self.world_size} process{'es' if self.world_size > 1 else ''}")


def plan_batch(resolved: Any, world_size: int, checkpoint_batch: int | None = None) -> BatchPlan:
    """Derive the accumulation for `world_size` processes, and scale the learning rate if asked to.

    Args: resolved: `config.parse.Resolved`. checkpoint_batch: the global batch of the run that is resumed; it wins
    over batch_size x update_freq x processes, so that a run goes on unchanged on another number of processes.
    Raises: UserError when nothing divides, or `--global_batch` asks for another than the checkpoint's.
    """
    options = resolved.options
    asked = options.global_batch
    if checkpoint_batch and asked not in (None, checkpoint_batch):
        raise UserError(f"--global_batch {asked} differs from the checkpoint's {checkpoint_batch}; give "
                        f"--global_batch {checkpoint_batch}, or start a new run in another --output_dir.")
    batch_size, per_pass = options.batch_size, options.batch_size * world_size
    wanted = checkpoint_batch or asked or per_pass * options.update_freq
    if wanted % per_pass:
        smaller = _smaller_batch(options, wanted, world_size)
        if not checkpoint_batch or smaller is None:
            raise UserError(_does_not_divide(options, wanted, world_size, bool(checkpoint_batch)))
        batch_size, per_pass = smaller, smaller * world_size
    update_freq = wanted // per_pass
    notices = []
    if checkpoint_batch and (batch_size != options.batch_size or asked is None and update_freq != options.update_freq):
        size = f"batch_size {batch_size} and " if batch_size != options.batch_size else ""
        notices.append(f"The checkpoint's global batch of {checkpoint_batch} is kept: {size}update_freq is {update_freq} "
                       f"on {world_size} process{'es' if world_size > 1 else ''}.")
    reference = resolved.reference_batch or _PUBLISHED_BATCH
    factor = wanted / reference
    lr = options.lr * {"none": 1.0, "linear": factor, "sqrt": factor ** 0.5}[options.lr_scale]
    if lr < options.min_lr and not options.eval:
        raise UserError(f"--lr_scale {options.lr_scale} gives lr {lr:g} for a global batch of {wanted}, below --min_lr "
                        f"{options.min_lr:g}; lower --min_lr.")
    if resolved.reference_batch and wanted != reference and options.lr_scale == "none" and not options.eval:
        notices.append(_not_the_recipes(resolved, wanted, per_pass))
    return BatchPlan(wanted, update_freq, batch_size, world_size, lr, tuple(notices))


def _not_the_recipes(resolved: Any, wanted: int, per_pass: int) -> str:
    options, reference = resolved.options, resolved.reference_batch
    recipe = next(r for r in (resolved.recipe, resolved.published) if r and r.global_batch == reference)
    scaled = options.lr * wanted / reference
    rate = ""
    if options.lr == recipe.values.get("lr", Options.lr):
        rate = f" linear scaling would give lr {scaled:g} instead of {options.lr:g} (--lr_scale linear),"
    asked = options.global_batch is not None or reference % per_pass
    way = f"--global_batch {reference}" if asked else f"--update_freq {reference // per_pass}"
    return f"The global batch is {wanted}, not the recipe's {reference}:{rate} {way} restores the recipe."


def _smaller_batch(options: Options, wanted: int, world_size: int) -> int | None:
    """The largest batch size, not above the asked one, that divides `wanted`; even where pictures are mixed in pairs."""
    step = 2 if mixes(options) else 1
    return next((b for b in range(options.batch_size, 0, -1) if wanted % (b * world_size) == 0 and b % step == 0), None)


def _does_not_divide(options: Options, wanted: int, world_size: int, resumed: bool) -> str:
    per_pass = options.batch_size * world_size
    size = _smaller_batch(options, wanted, world_size)
    smaller = f"--batch_size {size}" if size else ""
    if resumed:
        counts = [w for w in range(1, wanted + 1) if _smaller_batch(options, wanted, w)]
        fixes = f"numbers of processes that divide it: {', '.join(map(str, counts[:12]))}"
        name = "the checkpoint's global batch of"
    else:
        below = wanted // per_pass * per_pass
        near = [b for b in (below, below + per_pass) if b]
        fixes = "nearest: " + " or ".join(f"--global_batch {b}" for b in near) + (f", or {smaller}" if smaller else "")
        name = "--global_batch"
    return (f"{name} {wanted} is not a multiple of {per_pass} = --batch_size {options.batch_size} x {world_size} "
            f"processes; {fixes}.")


def validate_after_index(options: Options, plan: BatchPlan, num_pictures: int, num_classes: int) -> int:
    """Step two, when the training pictures are indexed: return updates per epoch, or raise `UserError`."""
    if options.nb_classes is not None and num_classes > options.nb_classes:
        raise UserError(f"--nb_classes {options.nb_classes} is below the {num_classes} classes of {options.data_path}; "
                        f"give --nb_classes {num_classes} or leave it out.")
    updates = num_pictures // plan.global_batch
    if updates == 0:
        raise UserError(_no_update(options, plan, num_pictures))
    total = updates * options.epochs
    if options.warmup_steps > total:
        raise UserError(f"--warmup_steps {options.warmup_steps} is longer than the run of {total} updates "
                        f"({options.epochs} epochs x {updates}); give a smaller --warmup_steps.")
    return updates


def _no_update(options: Options, plan: BatchPlan, num_pictures: int) -> str:
    step = 2 if mixes(options) else 1
    fitting = num_pictures // plan.world_size // step * step
    if fitting == 0:
        fix = f"use fewer than {plan.world_size} processes or more pictures"
    elif fitting >= plan.batch_size:
        accumulation = num_pictures // (plan.batch_size * plan.world_size)
        fix = (f"lower --global_batch to {accumulation * plan.batch_size * plan.world_size}" if options.global_batch
               else f"lower --update_freq to {accumulation}")
    else:
        fix = f"lower --batch_size to {fitting} or less, with --update_freq 1"
    return (f"--batch_size {plan.batch_size} with {plan.equation} is more than the {num_pictures} training pictures of "
            f"{options.data_path}, so an epoch would have no update; {fix}.")
