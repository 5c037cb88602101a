"""The published recipes of dense prediction: learning-rate scales by stage or layer, and their schedules."""
from collections.abc import Callable
from dataclasses import dataclass

from optim.groups import layer_id
from optim.schedule import Schedule

WARMUP_RATIO = {"poly": 1e-6, "step": 1e-3}  # the warm-up's first factor
GAMMA = 0.1                                  # of each milestone


def scale_by_depth(rate: float, layers: int, by: str) -> Callable[[str], float]:
    """The learning-rate scale of a parameter of a segmentor or detector by its full name.

    It is rate^(layers + 1 - id), 1 for all but the backbone's downsampling layers and stages. Ids by "stage":
    0 for every downsampling layer, s + 1 for stage s. By "layer": those of classification, up to 12, whatever
    `layers` says: with 6 of them, as published for HorFPN's detectors, deep layers get scales above 1.
    """
    def scale(name: str) -> float:
        part, _, inner = name.removeprefix("backbone.").partition(".")
        if not name.startswith("backbone.") or part not in ("downsample_layers", "stages"):
            return 1.0
        if by == "layer":
            identifier = layer_id(f"{part}.{inner}")
        else:
            identifier = 0 if part == "downsample_layers" else int(inner.partition(".")[0]) + 1
        return rate ** (layers + 1 - identifier)
    return scale


@dataclass(frozen=True)
class DenseSchedule(Schedule):
    """A learning rate that falls in a line to `min_lr` ("poly", power 1) or by a factor of ten after each of
    the epochs `milestones` ("step"); the warm-up is a factor on top of that, from `WARMUP_RATIO` to 1."""
    shape: str = "poly"
    milestones: tuple[int, ...] = ()

    def lr(self, update: int) -> float:
        """Learning rate of global update `update`, before a group's scale."""
        if self.shape == "poly":
            share = 1 - min(update, self.total - 1) / self.total
            value = (self.options.lr - self.options.min_lr) * share + self.options.min_lr
        else:
            passed = sum(update >= epoch * self.updates_per_epoch for epoch in self.milestones)
            value = self.options.lr * GAMMA ** passed
        if update < self.warmup:
            value *= 1 - (1 - update / self.warmup) * (1 - WARMUP_RATIO[self.shape])
        return value
