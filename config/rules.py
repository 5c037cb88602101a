"""The rules between options: first before anything is touched, then when processes and images are known."""
from dataclasses import dataclass, replace

from common.errors import UserError
from common.text import plural
from config.options import Options


def mixes(options: Options) -> bool:
    """Mixup or CutMix is on, so that images come in pairs."""
    return options.mixup > 0 or options.cutmix > 0 or bool(options.cutmix_minmax)


def check(options: Options, origins: dict[str, str]) -> None:
    """Resolve (in place) what two options decide together, and refuse contradictions.

    Raises: UserError (`missing_data`, `contradiction`).
    """
    o = options
    if (origins["update_freq"], origins["global_batch"]) == ("flag", "recipe"):
        o.global_batch, origins["global_batch"] = None, "flag"
    if o.data_set == "SAMPLE" and not o.data_path:
        o.data_path = o.SAMPLE
    # A run's folder names its own data.
    known = o.eval and (o.eval_data_path or o.output_dir or o.resume or o.report)
    if not o.print_config and not o.data_path and not known:
        raise UserError(f"--data_path is missing; give the folder that holds {o.LAYOUT}, or try --config "
                        f"recipes/{o.QUICKSTART}.yaml without any data.", code="missing_data")
    rules = (
        (o.global_batch and origins["global_batch"] == origins["update_freq"],
         f"--global_batch {o.global_batch} and --update_freq {o.update_freq} are both given; give one."),
        (o.pretrained and o.finetune,
         f"--pretrained true and --finetune {o.finetune} both name the weights to start from; give one."),
        (o.freeze and not (o.pretrained or o.finetune or o.resume), f"--freeze {o.freeze} would keep random "
         "weights; give --finetune CHECKPOINT or --pretrained true to start from."),
        (len(o.resume) > 1 or o.weights == "both" or o.suite,
         "several checkpoints in --resume, --weights both and --suite are for --eval true; add it."),
        (o.warmup_steps <= 0 and o.warmup_epochs > o.epochs or o.start_epoch >= o.epochs,
         f"--epochs {o.epochs} is too few for --warmup_epochs {o.warmup_epochs} from --start_epoch "
         f"{o.start_epoch} on; raise it, or lower them."),
        (o.min_lr > o.lr, f"--min_lr {o.min_lr:g} is above --lr {o.lr:g}; lower --min_lr."),
        (mixes(o) and o.batch_size % 2, f"--batch_size {o.batch_size} is odd, but mixup and CutMix mix pairs "
         "of images; give an even number, or --mixup 0 --cutmix 0."),)
    for broken, sentence in () if o.eval else rules:
        if broken:
            raise UserError(sentence, code="contradiction")


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Images per update, how it comes about, the learning rate for it, and what a person should know."""
    global_batch: int
    update_freq: int
    batch_size: int
    world_size: int
    lr: float
    updates_per_epoch: int
    notices: tuple[str, ...] = ()

    @property
    def equation(self) -> str:
        """How the images of an update come together, for people."""
        return (f"{self.global_batch} images per update = {self.batch_size} per forward pass x "
                f"{plural(self.update_freq, 'forward pass')} x {plural(self.world_size, 'process')}")


def plan_batch(options: Options, world_size: int, num_images: int, *, lr_batch: int | None = None,
               checkpoint_batch: int | None = None) -> BatchPlan:
    """Derive the accumulation for `world_size` processes, and scale the learning rate if asked to.

    Args:
        num_images: those to train on.
        lr_batch: the global batch that the learning rate belongs to, None: the published 4096.
        checkpoint_batch: the global batch of the resumed run, which wins over batch_size x update_freq x
            processes, so that a run continues unchanged on another number of processes.

    Raises: UserError (`batch`) when nothing divides, `--global_batch` is not the checkpoint's, or an epoch
    has no whole update; (`contradiction`) when the warm-up is longer than the run, or the scaled learning
    rate is below `--min_lr`.
    """
    o = options
    if checkpoint_batch and o.global_batch not in (None, checkpoint_batch):
        raise UserError(f"--global_batch {o.global_batch} differs from the checkpoint's {checkpoint_batch}; "
                        "give that, or start a new run in another --output_dir.", code="batch")
    size, given = o.batch_size, o.batch_size * world_size * o.update_freq
    wanted = checkpoint_batch or o.global_batch or given
    if wanted % (size * world_size):
        if not checkpoint_batch:
            raise UserError(f"--global_batch {wanted} is not a multiple of {size * world_size} = "
                            f"--batch_size {size} x {plural(world_size, 'process')}; "
                            f"{_fitting(o, world_size, wanted)}.", code="batch")
        pairs = 1 + mixes(o)
        size = next((b for b in range(size, 0, -1) if not wanted % (b * world_size) and not b % pairs), 0)
        if not size:
            raise UserError(f"The checkpoint's global batch of {wanted} cannot be divided by "
                            f"{plural(world_size, 'process')}; use a number that divides it.", code="batch")
    factor = wanted / (lr_batch or 4096)
    plan = BatchPlan(global_batch=wanted, update_freq=wanted // (size * world_size), batch_size=size,
                     world_size=world_size, updates_per_epoch=o.updates_per_epoch(num_images, wanted),
                     lr=o.lr * {"none": 1.0, "linear": factor, "sqrt": factor ** 0.5}[o.lr_scale])
    updates = plan.updates_per_epoch * o.epochs
    if updates == 0:
        raise UserError(f"An update takes more images than the {num_images} of {o.data_path}: "
                        f"{plan.equation}; {_fitting(o, world_size, num_images)}.", code="batch")
    if o.warmup_steps > updates:
        raise UserError(f"--warmup_steps {o.warmup_steps} is longer than the run of {updates} updates; give "
                        "fewer.", code="contradiction")
    if o.lr_scale != "none" and plan.lr < o.min_lr:
        raise UserError(f"--lr_scale {o.lr_scale} gives a learning rate of {plan.lr:g} for {wanted} images "
                        f"per update, below --min_lr {o.min_lr:g}; lower --min_lr.", code="contradiction")
    notice = "" if checkpoint_batch else _small_data(o, plan, num_images)
    if wanted != given and not o.global_batch:
        notice = f"The checkpoint's global batch of {wanted} is kept: {plan.equation}."
    return replace(plan, notices=(notice,) if notice else ())


def _fitting(options: Options, world_size: int, most: int) -> str:
    """The fix: flags for the largest global batch of at most `most` images."""
    pairs = 1 + mixes(options)  # images are mixed in pairs
    size = min(options.batch_size, most // world_size // pairs * pairs)
    if size == 0:
        return "use fewer processes or more images"
    total = most // (size * world_size) * size * world_size
    return f"give --global_batch {total} --batch_size {size} without --update_freq"


def _small_data(options: Options, plan: BatchPlan, num_images: int) -> str:
    """A sentence when the global batch is large for the data: a tenth of the images or more unused, or less
    than 10 updates per epoch and 100 in all."""
    updates = plan.updates_per_epoch
    unused = num_images - updates * plan.global_batch
    passes = updates != num_images // plan.global_batch  # where all images are used
    if passes or unused < num_images // 10 and not (updates < 10 and updates * options.epochs < 100):
        return ""
    return (f"An epoch uses {num_images - unused} of the {num_images} training images in "
            f"{plural(updates, 'update')}, and the run has {plural(updates * options.epochs, 'update')}; for "
            f"more of both, {_fitting(options, plan.world_size, num_images // 10)}.")
