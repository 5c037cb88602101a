"""Learning rate and weight decay as pure functions of the global update."""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from config.options import Options

Shape = Callable[[int, int, float, float], float]


def cosine(step: int, steps: int, base: float, final: float) -> float:
    """Half a cosine from `base` at step 0 towards `final` at `steps`."""
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / steps))


def value(update: int, base: float, final: float, total: int, warmup: int = 0,
          shape: Shape = cosine) -> float:
    """Value at `update` of `total`: a line from 0 to `base` over `warmup` updates, then the shape down to
    `final`.

    The shape's position counts from the end of the warm-up, so `final` is approached and not reached. From
    `total` on the last value holds.
    """
    update = min(update, total - 1)
    if update < warmup:
        return base * update / (warmup - 1) if warmup > 1 else 0.0
    return shape(update - warmup, total - warmup, base, final)


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of a run, per global update (0 is the first one).

    Of `options`, `warmup_steps` (updates) wins over `warmup_epochs` when it is above 0. Weight decay has no
    warm-up and stays constant when `weight_decay_end` is None. `lr` is absolute: nothing here knows the
    batch.
    """
    options: Options
    updates_per_epoch: int

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.options.epochs * self.updates_per_epoch

    @property
    def warmup(self) -> int:
        """Updates of the warm-up."""
        steps = self.options.warmup_steps
        return steps if steps > 0 else self.options.warmup_epochs * self.updates_per_epoch

    def lr(self, update: int) -> float:
        """Learning rate of global update `update`, before a group's `lr_scale`."""
        return value(update, self.options.lr, self.options.min_lr, self.total, self.warmup)

    def weight_decay(self, update: int) -> float:
        """Weight decay of global update `update` for the groups that decay."""
        base, end = self.options.weight_decay, self.options.weight_decay_end
        return value(update, base, base if end is None else end, self.total)

    def stretched(self, epochs: int, update: int) -> str | None:
        """A sentence when a run that had `epochs` of them continues at `update` at another rate."""
        now, then = self.lr(update), replace(self, options=replace(self.options, epochs=epochs)).lr(update)
        if abs(now - then) <= 0.01 * then:
            return None
        return (f"--epochs {self.options.epochs} instead of {epochs} stretches the schedule: the learning "
                f"rate continues at {now:.3g}, not at {then:.3g}; a new run with --finetune would begin with "
                "a warm-up.")

    def apply(self, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Write both into the groups of `optimizer` (those of `optim.groups.param_groups`)."""
        lr, weight_decay = self.lr(update), self.weight_decay(update)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if group.get("decays", group["weight_decay"] > 0):
                group["weight_decay"] = weight_decay
