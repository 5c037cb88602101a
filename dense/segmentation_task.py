"""Segmentation as a task of the Trainer: network, losses, batches, mIoU."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

import engine
import native
from common.devices import float32_products
from common.errors import UserError
from common.random import key
from config.options import Options
from datasets.build import Data
from datasets.dataset import Batch, make_loader
from dense.backbone import replace_batchnorm, same_statistics, start_from
from dense.data import UpdateSampler, find_data
from dense.draw import save_sample
from dense.inference import label_map
from dense.optim import DenseSchedule, scale_by_depth
from dense.options import SegmentationOptions
from dense.pixels import normalised
from dense.segmentor import AUXILIARY_WEIGHT, IGNORED, Segmentor, segmentation_loss
from dense.zoo import HEADS, segmentor_filters
from evaluation import amp_dtype
from launch.process import Process
from optim.build import build_optimizer
from optim.schedule import Schedule
from plan import Plan
from run.state import State


def build_segmentor(options: SegmentationOptions, classes: int) -> Segmentor:
    """The network of the options, freshly initialised from the seed: the same on every rank."""
    torch.manual_seed(key(options.seed, "init"))
    model = Segmentor(options.model, classes, segmentor_filters(options.model), HEADS[options.head],
                      options.drop_path, options.head_width, options.head_width // 2,
                      options.layer_scale_init_value)
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def find_scenes(options: Options, process: Process, state: State) -> Data:
    """The data of a training, with the classes of the run to resume."""
    options = cast(SegmentationOptions, options)
    return process.local_first(lambda: find_data(options, state.get("classes"), train=True,
                                                 evaluate=not options.disable_eval))


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate: options, device and processes."""
    options: SegmentationOptions
    process: Process
    classes: int

    @torch.no_grad()
    def confusions(self, networks: Sequence[nn.Module], loader: Iterable[Batch],
                   leaves: Callable[[], bool] = lambda: False,
                   keep: Callable[[Batch, np.ndarray], object] | None = None) -> list[Tensor] | None:
        """For each network a matrix int64 (classes, classes + 1), on the CPU, over all images of all ranks:
        pixels by label and prediction, the last column for those of unreadable images. None when `leaves()`
        said so on any rank. `keep(batch, labels uint8 (H, W))` gets the first network's predictions.

        In true float32; each rank passes its own share of the images.
        """
        found = [torch.zeros(self.classes, self.classes + 1, dtype=torch.int64) for _ in networks]
        left = False
        for network in networks:
            network.eval()
            same_statistics(network, self.process)
        with float32_products():
            for batch in loader:
                if left := leaves():
                    break
                labels = batch.targets[0].long()
                for number, (network, confusion) in enumerate(zip(networks, found)):
                    predicted = torch.full_like(labels, self.classes)
                    if len(batch.images):
                        scaled = [image.to(self.process.device) for image in batch.images]
                        size = labels.shape[0], labels.shape[1]
                        predicted = label_map(network, scaled, size, self.options)
                        if keep is not None and number == 0:
                            keep(batch, predicted.numpy().astype(np.uint8))
                    count_pixels(confusion, labels, predicted)
        if self.process.any(left):
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


class Segmentation:
    """The task (see `engine.Task`): cross-entropy of both heads in training, mIoU in evaluation."""
    score = "test_miou"

    def __init__(self, plan: Plan, process: Process, state: State | None = None):
        options, data, batch = cast(SegmentationOptions, plan.options), plan.data, plan.batch
        synchronised = process.world_size > 1 and process.device.type == "cuda"
        if batch.batch_size == 1 and not synchronised:
            raise UserError("--batch_size 1: BatchNorm has no statistics of one image's 1x1 pooling; give 2 "
                            "or more images per process.", code="contradiction")
        self.seed, self.autocast_dtype, self.data = options.seed, amp_dtype(options), data
        model = build_segmentor(options, data.num_classes)
        self.drop_draws = model.num_drop_draws
        if state is None:
            start_from(model.backbone, options, process)
        self.model: nn.Module = replace_batchnorm(model, synchronised).to(process.device)
        self.optimizer = build_optimizer(self.model, options, scale_by_depth(
            options.decay_rate, options.decay_layers, by="stage"))
        self.schedule: Schedule = DenseSchedule(options, plan.updates_per_epoch)
        self.sampler = UpdateSampler(len(plan.train), batch.global_batch, batch.batch_size, batch.update_freq,
                                     process.rank, process.world_size, options.seed,
                                     updates=plan.updates_per_epoch)
        self.loaders = [make_loader(plan.train, options, self.sampler)]
        if data.val is not None:
            self.loaders.append(share(data, options, process))
        self.evaluation = Evaluation(options, process, data.num_classes)

    def batches(self, epoch: int, first_update: int) -> Iterable[Batch]:
        """Micro-batches of the updates from `first_update` of `epoch` on."""
        self.sampler.set_start(epoch, first_update)
        return self.loaders[0]

    def losses(self, model: nn.Module, batch: Batch, update: int) -> tuple[Tensor, Tensor | None]:
        """Mean loss of a micro-batch of crops."""
        device = self.evaluation.process.device
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.targets))
        draws = engine.drop_draws(self.drop_draws, self.seed, update, batch, device)
        with engine.autocast(device, self.autocast_dtype):
            both = model(normalised(images, batch.boxes[:, 0, 2:].to(device)), **draws)
        decode, auxiliary = (segmentation_loss(engine.full_precision(x), labels.long()) for x in both)
        return decode + AUXILIARY_WEIGHT * auxiliary, None

    def evaluate(self, networks: Sequence[tuple[str, nn.Module]], observer: engine.Observer,
                 update: int) -> engine.Figures | None:
        """All networks in one pass over the images, each image on one rank."""
        def leaves() -> bool:
            observer.on_phase("evaluation", update)
            return observer.leaves_evaluation()

        folder, data = self.evaluation.options.output_dir, self.data
        keep = lambda batch, labels: save_sample(folder, batch, labels, data)
        with native.packed(*(network for _, network in networks)):
            found = self.evaluation.confusions([network for _, network in networks], self.loaders[1], leaves,
                                               keep if folder and self.evaluation.process.is_main else None)
        if found is None:
            return None
        results = [(suffix, scores(confusion)) for (suffix, _), confusion in zip(networks, found)]
        return {f"test_{name}{suffix}": cast(float, result[name]) for suffix, result in results
                for name in FIGURES}


def share(data: Data, options: Options, process: Process, refuse_bad: bool = False):
    """This rank's images of the evaluation, one at a time."""
    assert data.val is not None
    mine = range(process.rank, len(data.val), process.world_size)
    return make_loader(data.val, options, [[index] for index in mine], refuse_bad=refuse_bad)
