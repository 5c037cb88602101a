"""Learning rate and weight decay as pure functions of the global update."""
import math
from dataclasses import dataclass


def cosine(update: int, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Value at `update` of `total`: a line from 0 to `base` over `warmup` updates, then half a cosine to `final`.

    The cosine's position counts from the end of the warm-up, so `final` is approached and not reached. From
    `total` on the last value holds.
    """
    update = min(update, total - 1)
    if update < warmup:
        return base * update / (warmup - 1) if warmup > 1 else 0.0
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of a run, per global update (0 is the first one).

    `warmup_steps` (updates) wins over `warmup_epochs` when it is above 0. Weight decay has no warm-up and stays
    constant when `weight_decay_end` is None. The learning rate is absolute: nothing here knows the batch.
    """
    base_lr: float
    min_lr: float
    base_weight_decay: float
    weight_decay_end: float | None
    epochs: int
    updates_per_epoch: int
    warmup_epochs: int = 0
    warmup_steps: int = -1

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
        return cosine(update, self.base_lr, self.min_lr, self.total, self.warmup)

    def weight_decay(self, update: int) -> float:
        """Weight decay of global update `update` for the groups that decay."""
        end = self.base_weight_decay if self.weight_decay_end is None else self.weight_decay_end
        return cosine(update, self.base_weight_decay, end, self.total)

    def apply(self, optimizer, update: int) -> None:
        """Write both into the groups of `optimizer` (those of `optim.groups.param_groups`)."""
        lr, weight_decay = self.lr(update), self.weight_decay(update)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if group.get("decays", group["weight_decay"] > 0):
                group["weight_decay"] = weight_decay


def build_schedule(options, updates_per_epoch: int) -> Schedule:
    """The schedule of the resolved `options` (lr already scaled for the batch, if it is to be)."""
    return Schedule(options.lr, options.min_lr, options.weight_decay, options.weight_decay_end, options.epochs,
                    updates_per_epoch, options.warmup_epochs, options.warmup_steps)
