"""`--eval true` of detection: find the weights, one pass over the images, average precision, the published
figure."""
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

import native
from common.errors import UserError
from common.files import write_json
from common.outcome import ExitCode
from common.safe_load import safe_torch_load
from config.parse import Resolved
from dense.backbone import load_published
from dense.coco import CocoSet
from dense.coco_images import CocoImages
from dense.detection_options import DetectionOptions
from dense.detection_task import build_detector, find_data, keeper, precision, results
from dense.detector import Detector
from dense.evaluation import evaluate_each, heartbeat, own_options, verdict
from dense.segmentation_task import share
from dense.zoo import DETECTORS, PublishedDetector
from launch.process import Process
from launch.watchdog import Watchdog
from models.weights import select_weights
from models.zoo import VARIANTS

COCO_IMAGES = 5000
# What a checkpoint knows about its own network and images, taken unless a flag or recipe names it.
_OWN = ("model", "head", "system", "head_width", "layer_scale_init_value", "test_side", "longest_side")


@dataclass(frozen=True)
class TrainedDetector:
    """A detector in evaluation mode, the options and classes it was trained with (none for a published file),
    and the file's entry."""
    model: Detector
    options: DetectionOptions
    classes: list[str]
    entry: str


def load_detector(path: str | os.PathLike, options: DetectionOptions | None = None,
                  origins: dict[str, str] | None = None, device: torch.device | str = "cpu"
                  ) -> TrainedDetector:
    """Load a checkpoint of this project or a published file.

    Options whose origin is not "default" win over the file's own. Raises UserError (`other_model`, …).
    """
    checkpoint, origins, options = safe_torch_load(path), origins or {}, options or DetectionOptions()
    state = {name.removeprefix("module."): value for name, value in
             select_weights(checkpoint, str(path), weights=options.weights)[0].items()}
    last = next((name for name in state if name.endswith("fc_cls.bias")), None)
    if last is None:
        raise UserError(f"{path} holds no detector; name a checkpoint of dense.detection or a published "
                        "file.", code="other_model")
    own, classes = own_options(checkpoint, DetectionOptions, _OWN), checkpoint.get("classes")
    if own is None and (published := identify(state)):
        own = {"model": published.model, "head": published.head, "system": published.system,
               "head_width": 256}
    options = replace(options, **{name: value for name, value in (own or {}).items()
                                  if origins.get(name, "default") == "default"})
    model = build_detector(options, len(state[last]) - 1)
    entry = load_published(model, path, checkpoint, options.weights)
    model = model.to(device).eval()
    native.attach(model)
    return TrainedDetector(model, options, list(classes or ()), entry)


def identify(state: dict[str, torch.Tensor]) -> PublishedDetector | None:
    """The published detector that a state has the shape of, by its width, filters, pyramid and stages."""
    stem = state.get("backbone.downsample_layers.0.0.weight")
    system = "cascade_mask_rcnn" if "roi_head.bbox_head.0.fc_cls.bias" in state else "mask_rcnn"
    head = next((name for name, leaf in (("horfpn_gf", "complex_weight"), ("horfpn_7x7", "weight"))
                 if f"neck.fpn_convs.0.dwconv.{leaf}" in state), "plain")
    filters = "backbone.stages.2.0.gnconv.dwconv.complex_weight" in state
    if stem is None or "backbone.stages.2.17.gamma1" not in state:
        return None
    for each in DETECTORS.values():
        config = VARIANTS[each.model].config
        if (config.width, config.filters[2] != "conv", each.head, each.system) == (
                len(stem), filters, head, system):
            return each
    return None


def evaluate_detectors(resolved: Resolved, process: Process, watchdog: Watchdog) -> ExitCode:
    """Evaluate each checkpoint of `--resume`, or the best of the run's folder; the exit code."""
    return evaluate_each(resolved, process, lambda path: _evaluate(path, resolved, process, watchdog))


def _evaluate(path: str, resolved: Resolved, process: Process, watchdog: Watchdog) -> dict:
    options = cast(DetectionOptions, resolved.options)
    trained = load_detector(path, options, resolved.origins, process.device)
    data = process.local_first(lambda: find_data(trained.options, trained.classes or None, train=False,
                                                 evaluate=True))
    if data.num_classes != trained.model.classes:
        raise UserError(f"{path} has {trained.model.classes} classes, the data {data.num_classes}; give the "
                        "data it was made for.", code="other_classes")
    loader = share(data, options, process, refuse_bad=not options.allow_bad_images)
    images = cast(CocoImages, data.val).rows
    try:
        found = results([trained.model], loader, images, process, heartbeat(watchdog),
                        keeper(options.output_dir, images, process))
        bad = sum(len(part) for part in process.all_gather_object(loader.take_unreadable()))
    finally:
        loader.close()
    assert found is not None
    if process.is_main and options.output_dir:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.output_dir) / "detections.json", found[0])
    return result_of(precision(found[0], images, process), trained, path, images, bad)


def result_of(found: dict[str, dict], trained: TrainedDetector, path: str, images: CocoSet, bad: int) -> dict:
    """What eval.json holds: figures in percent, settings, each class, and the comparison with the published
    box AP."""
    options, published = trained.options, trained.options.published
    result: dict = {f"{kind}_{name.lower()}": 100 * value for kind, figures in found.items()
                    for name, value in figures.items() if name != "per_category"}
    each = {name: {f"{kind}_ap": 100 * figures["per_category"][number] for kind, figures in found.items()
                   if number in figures["per_category"]}
            for number, name in zip(images.categories, images.class_names)}
    result |= {
        "checkpoint": path, "weights": trained.entry, "images": len(images.photos), "bad_images": bad,
        "model": options.model, "head": options.head, "system": options.system,
        "test_side": options.test_side, "longest_side": options.longest_side, "per_class": each}
    line = ", ".join(f"{kind} AP {result[f'{kind}_ap']:.1f} (AP50 {result[f'{kind}_ap50']:.1f})"
                     for kind in ("box", "mask"))
    comparable = published and (len(each), len(images.photos), bad) == (80, COCO_IMAGES, 0)
    there = published.box_ap if published and comparable else None
    return result | verdict(line, "box AP", result["box_ap"], there)
