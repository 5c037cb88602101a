"""Learning rate and weight decay as pure functions of the global update."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from config.options import Options


def cosine(step: int, steps: int, base: float, final: float) -> float:
    """Half a cosine from `base` at step 0 towards `final` at `steps`."""
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / steps))


# The shapes of the way down after the warm-up, by name; `build_schedule` picks one.
SHAPES: dict[str, Callable[[int, int, float, float], float]] = {"cosine": cosine}


def value(update: int, base: float, final: float, total: int, warmup: int = 0,
          shape: str = "cosine") -> float:
    """Value at `update` of `total`: a line from 0 to `base` over `warmup` updates, then the shape down to
    `final`.

    The shape's position counts from the end of the warm-up, so `final` is approached and not reached. From
    `total` on the last value holds.
    """
    update = min(update, total - 1)
    if update < warmup:
        return base * update / (warmup - 1) if warmup > 1 else 0.0
    return SHAPES[shape](update - warmup, total - warmup, base, final)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate and weight decay of a run, per global update (0 is the first one).

    `warmup_steps` (updates) wins over `warmup_epochs` when it is above 0. Weight decay has no warm-up and
    stays constant when `weight_decay_end` is None. The learning rate is absolute: nothing here knows the
    batch.
    """
    base_lr: float
    min_lr: float
    base_weight_decay: float
    weight_decay_end: float | None
    epochs: int
    updates_per_epoch: int
    warmup_epochs: int = 0
    warmup_steps: int = -1
    shape: str = "cosine"  # of the learning rate, a name in SHAPES

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.epochs * self.updates_per_epoch

    @property
    def warmup(self) -> int:
        """Updates of the warm-up."""
        return self.warmup_steps if self.warmup_steps > 0 else self.warmup_epochs * self.updates_per_epoch

    def lr(self, update: int) -> float:
        """Learning rate of global update `update`, before a group's `lr_scale`."""
        return value(update, self.base_lr, self.min_lr, self.total, self.warmup, self.shape)

    def weight_decay(self, update: int) -> float:
        """Weight decay of global update `update` for the groups that decay."""
        end = self.base_weight_decay if self.weight_decay_end is None else self.weight_decay_end
        return value(update, self.base_weight_decay, end, self.total)

    def apply(self, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Write both into the groups of `optimizer` (those of `optim.groups.param_groups`)."""
        lr, weight_decay = self.lr(update), self.weight_decay(update)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if group.get("decays", group["weight_decay"] > 0):
                group["weight_decay"] = weight_decay


def build_schedule(options: Options, updates_per_epoch: int) -> Schedule:
    """The schedule of the resolved `options` (lr already scaled for the batch, if it is to be)."""
    return Schedule(base_lr=options.lr, min_lr=options.min_lr, base_weight_decay=options.weight_decay,
                    weight_decay_end=options.weight_decay_end, epochs=options.epochs,
                    updates_per_epoch=updates_per_epoch, warmup_epochs=options.warmup_epochs,
                    warmup_steps=options.warmup_steps)
