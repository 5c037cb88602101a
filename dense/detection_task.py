"""Detection as a task of the Trainer: network, losses, COCO's average precision."""
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import engine
from common.errors import UserError
from common.random import key
from datasets.dataset import UNREADABLE_TARGET, Batch
from datasets.sample import ensure_sample
from dense.coco import CocoSet, average_precision, encoded, read_coco, write_scenes
from dense.coco_images import CocoImages, DetectionBatch, OrientedSampler, Scales
from dense.data import SceneData
from dense.detector import Detections, Detector
from dense.draw import save_objects
from dense.optim import DenseSchedule
from dense.options import DetectionOptions
from dense.task import DenseTask, Leaves, Networks, went_through
from dense.zoo import HEADS, detector_filters
from launch.process import Process
from plan import Plan
from run.state import State

FIGURES = {"box": "bbox", "mask": "segm"}


def build_detector(options: DetectionOptions, classes: int) -> Detector:
    """The network of the options, freshly initialised from the seed: the same on every rank."""
    torch.manual_seed(key(options.seed, "init"))
    return Detector(options.model, classes, detector_filters(options.model), HEADS[options.head],
                    options.system, options.drop_path, options.head_width, options.layer_scale_init_value,
                    options.roi_samples)


def find_data(options: DetectionOptions, classes: list[str] | None, *, train: bool, evaluate: bool
              ) -> SceneData:
    """The sets that are wanted, with one list of classes; `classes` is that of a checkpoint."""
    if options.data_set == "SAMPLE":
        ensure_sample(options.data_path, write_scenes, ("annotations",), "drawn scenes")
    scales = Scales(train=options.train_sides, test=options.test_side, longest=options.longest_side,
                    crop=Scales().crop if options.crops else None)
    sets: dict[str, CocoSet] = {}
    for name in [options.train_set] * train + [options.val_set] * evaluate:
        sets[name] = read_coco(options.data_path, name, train=name == options.train_set and train)
        classes = classes or sets[name].class_names
        if sets[name].class_names != classes:
            ours, theirs = (", ".join(names[:5]) for names in (sets[name].class_names, classes))
            raise UserError(f"{sets[name].file} has the categories {ours} and not those of the training, "
                            f"{theirs}; they must be the same.", code="other_classes")
    images = {name: CocoImages(found, scales, options.seed) for name, found in sets.items()}
    notes = [f"{name}: {len(found)} images, {len(classes or ())} classes" for name, found in images.items()]
    notes += [sentence for found in sets.values() for sentence in found.left_out]
    return SceneData(images[options.train_set] if train else None,
                         images[options.val_set] if evaluate else None, list(classes or ()), notes)


def rows_of(found: Detections, image: int, categories: Sequence[int]) -> list[dict]:
    """Objects of an image as COCO's results have them: bbox x, y, width, height; masks run-length coded."""
    corners = found.boxes.tolist()
    return [{"image_id": image, "category_id": categories[label], "score": score,
             "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": code}
            for (x1, y1, x2, y2), score, label, code in zip(
                corners, found.scores.tolist(), found.labels.tolist(), encoded(found.masks.cpu().numpy()))]


def results(networks: Networks, loader: Iterable[Batch], images: CocoSet, process: Process, leaves: Leaves,
            keep: Callable[[int, Detections], object]) -> list[list[dict]] | None:
    """COCO's results of each network over all images of all ranks, on every rank; None when `leaves()` said
    so on any rank. In true float32; an unreadable image has no objects. `keep(index, detections)` gets those
    of the first network."""
    categories = list(images.categories)
    found: list[list[dict]] = [[] for _ in networks]

    def take(batch: Any) -> None:
        if batch.targets[0] == UNREADABLE_TARGET:
            return
        photo, (height, width) = images.photos[int(batch.indices[0])], batch.sizes[0].tolist()
        for rows, network in zip(found, networks):
            detections = cast(Detector, network).detect(
                batch.network_input(process.device), (height, width), photo.size)
            rows += rows_of(detections, photo.id, categories)
            if network is networks[0]:
                keep(int(batch.indices[0]), detections)

    if not went_through(networks, loader, process, leaves, take):
        return None
    return [[row for part in process.all_gather_object(rows) for row in part] for rows in found]


def precision(rows: Sequence[dict], images: CocoSet, process: Process) -> dict[str, dict]:
    """`coco.average_precision`, computed on rank 0, under "box" and "mask"."""
    figures = process.on_rank_zero(lambda: average_precision(images.file, rows))
    return {name: figures[kind] for name, kind in FIGURES.items()}


class Detection(DenseTask):
    """The task: losses of anchors and stages, average precision in evaluation."""
    score = "test_box_ap"

    def __init__(self, plan: Plan, process: Process, state: State | None = None):
        options, train = cast(DetectionOptions, plan.options), cast(CocoImages, plan.train)
        landscape = np.array([photo.size[1] > photo.size[0] for photo in train.rows.photos])
        schedule = DenseSchedule(options, plan.batch.updates_per_epoch, shape="step",
                                 milestones=options.milestones)
        super().__init__(plan, process, state, network=build_detector(options, plan.data.num_classes),
                         sampler=partial(OrientedSampler, landscape), schedule=schedule, depth="layer")

    def losses(self, model: nn.Module, batch: Batch, update: int) -> tuple[Tensor, Tensor | None]:
        """The sum of all losses of a micro-batch."""
        device, rows = self.process.device, cast(DetectionBatch, batch)
        draws = engine.drop_draws(self.drop_draws, self.seed, update, batch, device)
        truths = rows.truths(self.seed, update, device)
        with engine.autocast(device, self.autocast_dtype):
            losses = model(rows.network_input(device), truths, **draws)
        return torch.stack([value.sum() for name, value in losses.items() if "loss" in name]).sum(), None

    def measure(self, networks: Networks, leaves: Leaves) -> list[list[dict]] | None:
        """COCO's results."""
        return results(networks, self.loaders[1], self.images, self.process, leaves,
                       partial(save_objects, self.folder, self.images))

    def figures(self, found: list[dict]) -> engine.Figures:
        """AP, AP50 and AP75 of boxes and masks, in percent."""
        each = precision(found, self.images, self.process)
        return {f"{kind}_{name.lower()}": 100 * each[kind][name]
                for kind in FIGURES for name in ("AP", "AP50", "AP75")}

    @property
    def images(self) -> CocoSet:
        """Those of the evaluation."""
        return cast(CocoImages, self.data.val).rows
