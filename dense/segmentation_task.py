"""Segmentation as a task of the Trainer: network, losses, mIoU."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

import engine
from common.errors import UserError
from common.random import key
from datasets.dataset import Batch
from dense.backbone import synchronised
from dense.data import UpdateSampler
from dense.draw import save_sample
from dense.inference import label_map
from dense.optim import DenseSchedule
from dense.options import SegmentationOptions
from dense.pixels import normalised
from dense.segmentor import AUXILIARY_WEIGHT, IGNORED, Segmentor, segmentation_loss
from dense.task import DenseTask, Leaves, Networks, went_through
from dense.zoo import HEADS, segmentor_filters
from launch.process import Process
from plan import Plan
from run.state import State


def build_segmentor(options: SegmentationOptions, classes: int) -> Segmentor:
    """The network of the options, freshly initialised from the seed: the same on every rank."""
    torch.manual_seed(key(options.seed, "init"))
    return Segmentor(options.model, classes, segmentor_filters(options.model), HEADS[options.head],
                     options.drop_path, options.head_width, options.head_width // 2,
                     options.layer_scale_init_value)


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate: options, device and processes."""
    options: SegmentationOptions
    process: Process
    classes: int

    def confusions(self, networks: Networks, loader: Iterable[Batch], leaves: Leaves,
                   keep: Callable[[Batch, np.ndarray], object]) -> list[Tensor] | None:
        """For each network a matrix int64 (classes, classes + 1), on the CPU, over all images of all ranks:
        pixels by label and prediction, the last column for those of unreadable images. None when `leaves()`
        said so on any rank. `keep(batch, labels uint8 (H, W))` gets the first network's predictions.

        In true float32; each rank passes its own share of the images.
        """
        found = [torch.zeros(self.classes, self.classes + 1, dtype=torch.int64) for _ in networks]

        def take(batch: Batch) -> None:
            labels = batch.targets[0].long()
            for number, (network, confusion) in enumerate(zip(networks, found)):
                predicted = torch.full_like(labels, self.classes)
                if len(batch.images):
                    scaled = [image.to(self.process.device) for image in batch.images]
                    size = labels.shape[0], labels.shape[1]
                    predicted = label_map(network, scaled, size, self.options)
                    if number == 0:
                        keep(batch, predicted.numpy().astype(np.uint8))
                count_pixels(confusion, labels, predicted)

        if not went_through(networks, loader, self.process, leaves, take):
            return None
        for confusion in found:
            self.process.all_reduce_(confusion, "sum")
        return found


def count_pixels(confusion: Tensor, labels: Tensor, predicted: Tensor) -> None:
    """Add the pixels with a label to a matrix (classes, classes + 1)."""
    valid = labels != IGNORED
    places = labels[valid] * confusion.shape[1] + predicted[valid]
    confusion += places.bincount(minlength=confusion.numel()).reshape(confusion.shape)


def scores(confusion: Tensor) -> dict[str, float | list[float]]:
    """mIoU, mAcc and aAcc in percent, and `iou` and `acc` of each class (NaN where there is none).

    A class counts for mIoU where it is labelled or predicted, for mAcc where it is labelled.
    """
    matrix = confusion.double().numpy()
    correct, labelled, predicted = np.diag(matrix), matrix.sum(1), matrix[:, :-1].sum(0)
    with np.errstate(invalid="ignore"):
        iou, acc = 100 * correct / (labelled + predicted - correct), 100 * correct / labelled
    total = max(labelled.sum(), 1.0)
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
    return {"miou": mean(iou), "macc": mean(acc), "aacc": float(100 * correct.sum() / total),
            "iou": iou.tolist(), "acc": acc.tolist()}


FIGURES = ("miou", "macc", "aacc")


class Segmentation(DenseTask):
    """The task: cross-entropy of both heads in training, mIoU in evaluation."""
    score = "test_miou"

    def __init__(self, plan: Plan, process: Process, state: State | None = None):
        options, updates = cast(SegmentationOptions, plan.options), plan.batch.updates_per_epoch
        if plan.batch.batch_size == 1 and not synchronised(process):
            raise UserError("--batch_size 1: BatchNorm has no statistics of one image's 1x1 pooling; give 2 "
                            "or more images per process.", code="contradiction")
        super().__init__(plan, process, state, network=build_segmentor(options, plan.data.num_classes),
                         sampler=partial(UpdateSampler, len(plan.train), updates=updates),
                         schedule=DenseSchedule(options, updates), depth="stage")
        self.evaluation = Evaluation(options, process, plan.data.num_classes)

    def losses(self, model: nn.Module, batch: Batch, update: int) -> tuple[Tensor, Tensor | None]:
        """Mean loss of a micro-batch of crops."""
        device = self.process.device
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.targets))
        draws = engine.drop_draws(self.drop_draws, self.seed, update, batch, device)
        with engine.autocast(device, self.autocast_dtype):
            both = model(normalised(images, batch.boxes[:, 0, 2:].to(device)), **draws)
        decode, auxiliary = (segmentation_loss(engine.full_precision(x), labels.long()) for x in both)
        return decode + AUXILIARY_WEIGHT * auxiliary, None

    def measure(self, networks: Networks, leaves: Leaves) -> list[Tensor] | None:
        """The confusions."""
        return self.evaluation.confusions(networks, self.loaders[1], leaves,
                                          partial(save_sample, self.folder, self.data))

    def figures(self, found: Tensor) -> engine.Figures:
        """mIoU, mAcc and aAcc."""
        result = scores(found)
        return {name: cast(float, result[name]) for name in FIGURES}
