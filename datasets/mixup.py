"""Mixup and CutMix whose choices belong to global positions, so that no split of a global batch changes them.

One draw holds for a group of 64 consecutive positions of the epoch, and position p is mixed with p xor 1. timm mixes
each process's batch with its reverse instead: the same distribution, but another result for every split.
"""
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from common.errors import UserError
from common.random import key, seeded

GROUP = 64
_PER_UNIT = {"batch": GROUP, "pair": 2, "elem": 1}


@dataclass(frozen=True)
class Run:
    """Neighbouring images [start, stop) of a batch that share one choice: `lam` of the own label remains; with a
    `box` (top, bottom, left, right) the partner's pixels fill it, without one the images are blended."""

    start: int
    stop: int
    lam: float
    box: tuple[int, int, int, int] | None


class GroupMixup:
    """Keyed mixing of NHWC float batches; parameters as in timm's Mixup. Modes: 'batch' (one choice per group of 64
    positions), 'pair' and 'elem'."""

    def __init__(self, num_classes: int, seed: int, *, mixup: float = 0.8, cutmix: float = 1.0,
                 cutmix_minmax: tuple[float, float] | None = None, prob: float = 1.0, switch_prob: float = 0.5,
                 mode: str = "batch", smoothing: float = 0.1):
        if mode not in _PER_UNIT:
            raise UserError(f"--mixup_mode {mode} is not one of batch, pair, elem.")
        self.num_classes, self.seed, self.mode, self.smoothing = num_classes, seed, mode, smoothing
        self._timm = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, cutmix_minmax=cutmix_minmax or None, prob=prob,
                           switch_prob=switch_prob, mode=mode, label_smoothing=smoothing, num_classes=num_classes)

    def choices(self, epoch: int, group: int, height: int, width: int) -> list[tuple[float, tuple | None]]:
        """(lam, box) of each unit of a group: one for 'batch', 32 for 'pair', 64 for 'elem'."""
        units = GROUP // _PER_UNIT[self.mode]
        chosen = []
        with seeded(key(self.seed, "mix", epoch, group)):
            if self.mode == "batch":
                lams, cuts = (np.atleast_1d(drawn) for drawn in self._timm._params_per_batch())
            else:
                lams, cuts = self._timm._params_per_elem(units)
            for lam, cut in zip(lams.tolist(), cuts.tolist(), strict=True):
                box = None
                if cut and lam != 1.0:
                    box, lam = cutmix_bbox_and_lam((3, height, width), lam, ratio_minmax=self._timm.cutmix_minmax)
                    box = tuple(int(edge) for edge in box)
                chosen.append((float(lam), box))
        return chosen

    def runs(self, epoch: int, positions: np.ndarray, height: int, width: int) -> list[Run]:
        """The runs of a batch at consecutive global `positions`, which start even and are even in number."""
        first, count = int(positions[0]), len(positions)
        if first % 2 or count % 2 or int(positions[-1]) != first + count - 1:
            raise UserError(f"Mixup pairs neighbours, so --batch_size must be even, not {count}; or switch it off with "
                            "--mixup 0 --cutmix 0.")
        size, runs, known = _PER_UNIT[self.mode], [], {}
        start = 0
        while start < count:
            group, unit = divmod(first + start, GROUP)
            unit //= size
            stop = min(count, group * GROUP + (unit + 1) * size - first)
            if group not in known:
                known[group] = self.choices(epoch, group, height, width)
            runs.append(Run(start, stop, *known[group][unit]))
            start = stop
        return runs

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, epoch: int,
                 positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix `images` (B, H, W, 3) in place and make soft targets.

        targets: int64 (B,) on the images' device. Returns (images, targets float32 (B, num_classes)).
        """
        count, height, width = images.shape[:3]
        runs = self.runs(epoch, positions, height, width)
        partners = images.view(count // 2, 2, *images.shape[1:]).flip(1).view_as(images)
        for run in runs:
            mine, other = images[run.start:run.stop], partners[run.start:run.stop]
            if run.box is not None:
                top, bottom, left, right = run.box
                mine[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            elif run.lam != 1.0:
                mine.mul_(run.lam).add_(other.mul_(1.0 - run.lam))
        lam = torch.tensor([run.lam for run in runs for _ in range(run.stop - run.start)], dtype=torch.float32)
        return images, self._soft(targets, lam.to(images.device, non_blocking=True)[:, None])

    def _soft(self, targets: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        off = self.smoothing / self.num_classes
        own = torch.full((len(targets), self.num_classes), off, dtype=torch.float32, device=targets.device)
        own.scatter_(1, targets[:, None], 1.0 - self.smoothing + off)
        other = own.view(-1, 2, self.num_classes).flip(1).view_as(own)
        return own * lam + other * (1.0 - lam)


def build_mixup(options, num_classes: int) -> GroupMixup | None:
    """GroupMixup from the options, or None when mixup, cutmix and cutmix_minmax are all off."""
    if not (options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax):
        return None
    return GroupMixup(num_classes, options.seed, mixup=options.mixup, cutmix=options.cutmix,
                      cutmix_minmax=options.cutmix_minmax, prob=options.mixup_prob,
                      switch_prob=options.mixup_switch_prob, mode=options.mixup_mode, smoothing=options.smoothing)
