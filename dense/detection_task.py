"""Detection as a task of the Trainer: network, losses, batches, COCO's average precision."""
from collections.abc import Callable, Iterable, Sequence
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
from datasets.dataset import UNREADABLE_TARGET, Batch, make_loader
from datasets.sample import ensure_sample
from dense.backbone import replace_batchnorm, same_statistics, start_from
from dense.coco import CocoSet, average_precision, encoded, read_coco, write_scenes
from dense.coco_images import CocoImages, DetectionBatch, OrientedSampler, Scales
from dense.data import SceneData
from dense.detection_options import DetectionOptions
from dense.detector import Detections, Detector
from dense.draw import save_objects
from dense.optim import DenseSchedule, scale_by_depth
from dense.segmentation_task import share
from dense.zoo import HEADS, detector_filters
from evaluation import amp_dtype
from launch.process import Process
from optim.build import build_optimizer
from optim.schedule import Schedule
from plan import Plan
from run.state import State

FIGURES = {"box": "bbox", "mask": "segm"}


def build_detector(options: DetectionOptions, classes: int) -> Detector:
    """The network of the options, freshly initialised from the seed: the same on every rank."""
    torch.manual_seed(key(options.seed, "init"))
    model = Detector(options.model, classes, detector_filters(options.model), HEADS[options.head],
                     options.system, options.drop_path, options.head_width, options.layer_scale_init_value,
                     options.roi_samples)
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


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


def find_scenes(options: Options, process: Process, state: State) -> Data:
    """The data of a training, with the classes of the run to resume."""
    return process.local_first(lambda: find_data(cast(DetectionOptions, options), state.get("classes"),
                                                 train=True, evaluate=not options.disable_eval))


def rows_of(found: Detections, image: int, categories: Sequence[int]) -> list[dict]:
    """Objects of an image as COCO's results have them: bbox x, y, width, height; masks run-length coded."""
    corners = found.boxes.tolist()
    return [{"image_id": image, "category_id": categories[label], "score": score,
             "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": code}
            for (x1, y1, x2, y2), score, label, code in zip(
                corners, found.scores.tolist(), found.labels.tolist(), encoded(found.masks.cpu().numpy()))]


@torch.no_grad()
def results(networks: Sequence[nn.Module], loader: Iterable[Batch], images: CocoSet, process: Process,
            leaves: Callable[[], bool] = lambda: False,
            keep: Callable[[int, Detections], object] | None = None) -> list[list[dict]] | None:
    """COCO's results of each network over all images of all ranks, on every rank; None when `leaves()` said
    so on any rank. In true float32; an unreadable image has no objects. `keep(index, detections)` gets those
    of the first network."""
    categories = list(images.categories)
    found: list[list[dict]] = [[] for _ in networks]
    left = False
    for network in networks:
        network.eval()
        same_statistics(network, process)
    with float32_products(False):
        for batch in cast(Iterable[DetectionBatch], loader):
            if left := leaves():
                break
            if batch.targets[0] == UNREADABLE_TARGET:
                continue
            photo, (height, width) = images.photos[int(batch.indices[0])], batch.sizes[0].tolist()
            for rows, network in zip(found, networks):
                detections = cast(Detector, network).detect(
                    batch.network_input(process.device), (height, width), photo.size)
                rows += rows_of(detections, photo.id, categories)
                if keep is not None and network is networks[0]:
                    keep(int(batch.indices[0]), detections)
    if process.any(left):
        return None
    return [[row for part in process.all_gather_object(rows) for row in part] for rows in found]


def keeper(folder: str, images: CocoSet, process: Process) -> Callable[[int, Detections], object] | None:
    """What keeps rank 0's first images with their objects in a run folder, for the report."""
    if not folder or not process.is_main:
        return None
    return lambda index, found: save_objects(folder, images, index, found)


def precision(rows: Sequence[dict], images: CocoSet, process: Process) -> dict[str, dict]:
    """`coco.average_precision`, computed on rank 0, under "box" and "mask"."""
    figures = process.on_rank_zero(lambda: average_precision(images.file, rows))
    return {name: figures[kind] for name, kind in FIGURES.items()}


class Detection:
    """The task (see `engine.Task`): losses of anchors and stages, average precision in evaluation."""
    score = "test_box_ap"

    def __init__(self, plan: Plan, process: Process, state: State | None = None):
        options, data, batch = cast(DetectionOptions, plan.options), plan.data, plan.batch
        self.seed, self.autocast_dtype, self.process = options.seed, amp_dtype(options), process
        self.folder = options.output_dir
        model = build_detector(options, data.num_classes)
        self.drop_draws = model.num_drop_draws
        if state is None:
            start_from(model.backbone, options, process)
        synchronised = process.world_size > 1 and process.device.type == "cuda"
        self.model: nn.Module = replace_batchnorm(model, synchronised).to(process.device)
        self.optimizer = build_optimizer(self.model, options, scale_by_depth(
            options.decay_rate, options.decay_layers, by="layer"))
        self.schedule: Schedule = DenseSchedule(
            options, plan.updates_per_epoch, shape="step", milestones=options.milestones)
        train = cast(CocoImages, plan.train)
        landscape = np.array([photo.size[1] > photo.size[0] for photo in train.rows.photos])
        self.sampler = OrientedSampler(landscape, batch.global_batch, batch.batch_size, batch.update_freq,
                                       process.rank, process.world_size, options.seed)
        self.loaders = [make_loader(plan.train, options, self.sampler)]
        if data.val is not None:
            self.loaders.append(share(data, options, process))
            self.images = cast(CocoImages, data.val).rows

    def batches(self, epoch: int, first_update: int) -> Iterable[Batch]:
        """Micro-batches of `epoch` from `first_update` on."""
        self.sampler.set_start(epoch, first_update)
        return self.loaders[0]

    def losses(self, model: nn.Module, batch: Batch, update: int) -> tuple[Tensor, Tensor | None]:
        """The sum of all losses of a micro-batch."""
        device, rows = self.process.device, cast(DetectionBatch, batch)
        draws = engine.drop_draws(self.drop_draws, self.seed, update, batch, device)
        truths = rows.truths(self.seed, update, device)
        with engine.autocast(device, self.autocast_dtype):
            losses = model(rows.network_input(device), truths, **draws)
        return torch.stack([value.sum() for name, value in losses.items() if "loss" in name]).sum(), None

    def evaluate(self, networks: Sequence[tuple[str, nn.Module]], observer: engine.Observer,
                 update: int) -> engine.Figures | None:
        """All networks in one pass over the images, each image on one rank."""
        def leaves() -> bool:
            observer.on_phase("evaluation", update)
            return observer.leaves_evaluation()

        keep = keeper(self.folder, self.images, self.process)
        with native.packed(*(network for _, network in networks)):
            found = results([network for _, network in networks], self.loaders[1], self.images, self.process,
                            leaves, keep)
        if found is None:
            return None
        figures = {}
        for (suffix, _), rows in zip(networks, found):
            each = precision(rows, self.images, self.process)
            figures |= {f"test_{kind}_{name.lower()}{suffix}": 100 * each[kind][name]
                        for kind in FIGURES for name in ("AP", "AP50", "AP75")}
        return figures
