"""The last steps before the network, on its device: normalise, erase, mix; all draws keyed by image or
place.

The number of kernels does not depend on the number of images: what differs between them (places, boxes,
shares) is drawn on the host and becomes tensors.
"""
from contextlib import nullcontext

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor

from common.devices import asynchronous, to_device
from common.random import key, seeded
from config.options import ImageSettings, Options
from config.rules import mixes
from datasets.dataset import Batch

GROUP = 64  # consecutive positions of an epoch that share one choice of mixing
Choice = tuple[float, tuple[int, ...] | None]  # share of the own image; CutMix' top, bottom, left, right


class Normalise:
    """uint8 NHWC pixels of the host → float32 NHWC on `device`, with the operations of ToTensor and Normalize
    in their order.

    On CUDA they are copied by a stream of their own: the copy runs while what was given to the device before
    is still computed, and the host waits for neither.
    """

    def __init__(self, settings: ImageSettings, device: torch.device | str):
        self.device = torch.device(device)
        self._stream = torch.Stream(self.device) if asynchronous(self.device) else None
        # Tensors on the device: PyTorch divides by a plain number on a GPU as a product with its inverse.
        self._values = [torch.tensor(values, device=device)
                        for values in ((255.0, 255.0, 255.0), settings.mean, settings.std)]
        self._rows: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, H, W, 3) float32."""
        with self._stream or nullcontext():
            pixels = pixels.to(self.device, non_blocking=True)
        if self._stream is not None:
            current = torch.accelerator.current_stream(self.device)
            current.wait_stream(self._stream)
            pixels.record_stream(current)  # its memory is not reused before `current` is done with it
        # Rows of W x 3 values keep the inner loops long; a mean of three values would make them three long.
        if not self._rows or len(self._rows[0]) != 3 * pixels.shape[2]:
            self._rows = [values.repeat(pixels.shape[2]) for values in self._values]
        scale, mean, std = self._rows
        return pixels.flatten(2).float().div_(scale).sub_(mean).div_(std).view(pixels.shape)


class Prepare:
    """A batch ready for the network: (images float32 (B, 3, H, W) channels_last, targets).

    Targets are soft, float32 (B, classes), when anything is mixed, which takes the number of classes (None in
    evaluation), otherwise int64 (B,). The result for an image depends on (seed, epoch, image, global
    position), not on the batch it came in. The target of an image that could not be read is -100, which no
    prediction equals and torch's cross entropy passes over: in evaluation (only with allow_bad_images) it
    counts as incorrect and stays in the denominator.
    """

    def __init__(self, options: Options, device: torch.device | str, num_classes: int | None = None):
        self.device, self.normalise = torch.device(device), Normalise(ImageSettings.of(options), device)
        self.mixup = GroupMixup(options, num_classes) if num_classes and mixes(options) else None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, targets = self.normalise(batch.images), to_device(batch.targets, self.device)
        if batch.erased:
            places, fills = (to_device(tensor, self.device) for tensor in batch.erased)
            images.view(-1, 3).index_copy_(0, places, fills)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets, batch.epoch, batch.positions.numpy())
        return images.permute(0, 3, 1, 2), targets


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

    def choices(self, epoch: int, group: int, height: int, width: int) -> list[Choice]:
        """The 64 choices of a group: `lam` of the own label remains; with a box the partner's pixels fill it,
        without one the images are blended."""
        chosen: list[Choice] = []
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
                chosen += self._size * [(float(lam), box)]
        return chosen

    def plan(self, epoch: int, positions: np.ndarray, height: int, width: int) -> list[Choice]:
        """The choice for each of consecutive global `positions`, which start even and are even in number."""
        first, count = int(positions[0]), len(positions)
        if first % 2 or count % 2 or int(positions[-1]) != first + count - 1:
            raise ValueError(f"mixing pairs neighbours: {count} positions from {first} on are no whole pairs")
        groups = range(first // GROUP, (first + count - 1) // GROUP + 1)
        found = [choice for group in groups for choice in self.choices(epoch, group, height, width)]
        return found[first % GROUP:][:count]

    def __call__(self, images: Tensor, targets: Tensor, epoch: int, positions: np.ndarray
                 ) -> tuple[Tensor, Tensor]:
        """Mix `images` (B, H, W, 3) in place and make soft targets.

        targets: int64 (B,) on the images' device. Returns (images, targets float32 (B, num_classes)).
        """
        count, height, width, _ = images.shape
        plan = self.plan(epoch, positions, height, width)
        # A blend is a box over the whole image; within a CutMix box nothing of the own image remains.
        edges = np.array([box or (0, height, 0, width) for _, box in plan])[:, :, None]
        rows, columns = ((start <= at) & (at < stop) for start, stop, at in (
            (edges[:, 0], edges[:, 1], np.arange(height)), (edges[:, 2], edges[:, 3], np.arange(width))))
        shares = [(lam, lam, 1.0 - lam) if box is None else (lam, 0.0, 1.0) for lam, box in plan]
        table = torch.from_numpy(np.hstack([shares, rows, columns]).astype(np.float32))
        lam, own, other, *inside = to_device(table, images.device).split([1, 1, 1, height, width], dim=1)
        box = (inside[0][:, :, None] * inside[1][:, None, :])[..., None] > 0
        partners = images.view(count // 2, 2, *images.shape[1:]).flip(1).view_as(images)
        images.mul_(torch.where(box, own[..., None, None], 1.0))
        images.add_(partners.mul_(torch.where(box, other[..., None, None], 0.0)))
        off = self.smoothing / self.num_classes
        own = torch.full((count, self.num_classes), off, dtype=torch.float32, device=images.device)
        own.scatter_(1, targets[:, None], 1.0 - self.smoothing + off)
        return images, own * lam + own.view(-1, 2, self.num_classes).flip(1).view_as(own) * (1.0 - lam)
