"""The last steps before the network, on its device: normalise, erase, mix; all draws keyed by image or
place."""
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from common.random import key, seeded
from config.options import ImageSettings, Options
from config.rules import mixes
from datasets.dataset import Batch

GROUP = 64  # consecutive positions of an epoch that share one choice of mixing


class Normalise:
    """uint8 NHWC pixels → float32 NHWC, with the operations of ToTensor and Normalize in their order."""

    def __init__(self, settings: ImageSettings, device: torch.device | str):
        # Tensors on the device: PyTorch divides by a plain number on a GPU as a product with its inverse.
        self._values = [torch.tensor(values, device=device)
                        for values in ((255.0, 255.0, 255.0), settings.mean, settings.std)]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 → (B, H, W, 3) float32 on the same device."""
        # Rows of W x 3 values keep the inner loops long; a mean of three values would make them three long.
        scale, mean, std = (values.repeat(pixels.shape[2]) for values in self._values)
        return pixels.flatten(2).float().div_(scale).sub_(mean).div_(std).view(pixels.shape)


class TrainPrepare:
    """A training batch ready for the network: (images float32 (B, 3, H, W) channels_last, targets).

    Targets are soft, float32 (B, classes), when anything is mixed, otherwise int64 (B,). The result for an
    image depends on (seed, epoch, image, global position), not on the batch it came in. Noise in erased boxes
    is equal bit for bit on one kind of device (CPUs and GPUs draw differently).
    """

    def __init__(self, options: Options, num_classes: int, device: torch.device | str):
        self.device, self.seed, self.mode = torch.device(device), options.seed, options.remode
        self.normalise = Normalise(ImageSettings.of(options), device)
        self.mixup = GroupMixup(options, num_classes) if mixes(options) else None
        self._generator = torch.Generator(device=self.device)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.normalise(batch.images.to(self.device, non_blocking=True))
        targets = batch.targets.to(self.device, non_blocking=True)
        self._erase(images, batch)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets, batch.epoch, batch.positions.numpy())
        return images.permute(0, 3, 1, 2), targets

    def _erase(self, images: torch.Tensor, batch: Batch) -> None:
        # The boxes are on the host, so choosing the few erased images makes nothing wait for the device.
        boxes = batch.boxes
        for row in (boxes[:, :, 2] > 0).any(1).nonzero().flatten().tolist():
            self._generator.manual_seed(key(self.seed, "erase", batch.epoch, int(batch.indices[row])))
            for top, left, height, width in boxes[row].tolist():
                if height > 0:
                    images[row, top:top + height, left:left + width] = self._fill(height, width)

    def _fill(self, height: int, width: int) -> torch.Tensor:
        if self.mode == "const":
            return torch.zeros(3, device=self.device)
        shape = (height, width, 3) if self.mode == "pixel" else (3,)
        return torch.empty(shape, device=self.device).normal_(generator=self._generator)


class EvalPrepare:
    """An evaluation batch ready for the network: (images float32 (B, 3, H, W) channels_last, targets int64
    (B,)).

    The target of an image that could not be read (only with allow_bad_images) is -100, which no prediction
    equals and torch's cross entropy passes over: it counts as incorrect and stays in the denominator.
    """

    def __init__(self, options: Options, device: torch.device | str):
        self.device = torch.device(device)
        self.normalise = Normalise(ImageSettings.of(options), device)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.normalise(batch.images.to(self.device, non_blocking=True))
        return images.permute(0, 3, 1, 2), batch.targets.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Run:
    """Neighbouring images [start, stop) of a batch that share one choice: `lam` of the own label remains;
    with a `box` (top, bottom, left, right) the partner's pixels fill it, without one the images are
    blended."""

    start: int
    stop: int
    lam: float
    box: tuple[int, ...] | None


class GroupMixup:
    """Mixup and CutMix of NHWC float batches whose choices belong to global positions, so that no split of a
    global batch changes them; drawn as timm's Mixup draws them.

    One choice holds for a group of 64 consecutive positions of the epoch (mode 'batch'), for a pair or for
    one image ('elem'), and position p is mixed with p xor 1. timm mixes each process's batch with its reverse
    instead: the same distribution, but another result for every split.
    """

    def __init__(self, options: Options, num_classes: int):
        self.num_classes, self.seed, self.smoothing = num_classes, options.seed, options.smoothing
        self._size = {"batch": GROUP, "pair": 2, "elem": 1}[options.mixup_mode]
        self._timm = Mixup(mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, prob=options.mixup_prob,
                           cutmix_minmax=options.cutmix_minmax or None, switch_prob=options.mixup_switch_prob)

    def choices(self, epoch: int, group: int, height: int, width: int) -> list[tuple[float, tuple | None]]:
        """(lam, box) of each unit of a group: one for 'batch', 32 for 'pair', 64 for 'elem'."""
        chosen = []
        with seeded(key(self.seed, "mix", epoch, group)):
            if self._size == GROUP:
                lams, cuts = (np.atleast_1d(drawn) for drawn in self._timm._params_per_batch())
            else:
                lams, cuts = self._timm._params_per_elem(GROUP // self._size)
            for lam, cut in zip(lams.tolist(), cuts.tolist(), strict=True):
                box = None
                if cut and lam != 1.0:
                    limits = self._timm.cutmix_minmax
                    box, lam = cutmix_bbox_and_lam((3, height, width), lam, ratio_minmax=limits)
                    box = tuple(int(edge) for edge in box)
                chosen.append((float(lam), box))
        return chosen

    def runs(self, epoch: int, positions: np.ndarray, height: int, width: int) -> list[Run]:
        """The runs of a batch at consecutive global `positions`, which start even and are even in number."""
        first, count = int(positions[0]), len(positions)
        if first % 2 or count % 2 or int(positions[-1]) != first + count - 1:
            raise ValueError(f"mixing pairs neighbours: {count} positions from {first} on are no whole pairs")
        runs, known, start = [], {}, 0
        while start < count:
            group, place = divmod(first + start, GROUP)
            unit = place // self._size
            stop = min(count, group * GROUP + (unit + 1) * self._size - first)
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
        lam = torch.tensor([run.lam for run in runs for _ in range(run.start, run.stop)], dtype=torch.float32)
        lam, off = lam.to(images.device, non_blocking=True)[:, None], self.smoothing / self.num_classes
        own = torch.full((count, self.num_classes), off, dtype=torch.float32, device=images.device)
        own.scatter_(1, targets[:, None], 1.0 - self.smoothing + off)
        return images, own * lam + own.view(-1, 2, self.num_classes).flip(1).view_as(own) * (1.0 - lam)
