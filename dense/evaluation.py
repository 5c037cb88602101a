"""`--eval true`: find the weights, one pass over the images, mIoU or average precision, the published
figure."""
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import native
from common.errors import UserError
from common.files import write_json
from common.log import logger
from common.outcome import ExitCode
from common.safe_load import safe_torch_load
from config.options import Options, Value, table
from config.parse import Resolved
from datasets.build import Data
from datasets.dataset import Batch, ImageLoader
from dense.backbone import load_published
from dense.coco_images import CocoImages
from dense.data import find_data as find_labelled
from dense.detection_task import Detection, build_detector, precision, results
from dense.detection_task import find_data as find_objects
from dense.draw import save_objects, save_sample
from dense.options import DenseOptions, DetectionOptions, SegmentationOptions
from dense.segmentation_task import FIGURES, Evaluation, Segmentation, build_segmentor, scores
from dense.task import Leaves, MakeTask, find_scenes, own_folder, share
from dense.zoo import DETECTORS, SEGMENTORS, Published
from evaluation import find_sources
from launch.process import Process
from launch.watchdog import Watchdog
from main import Work
from models.weights import select_weights
from models.zoo import VARIANTS

ADE20K_IMAGES, COCO_IMAGES = 2000, 5000
PASS_LIMIT, CLOSE_LIMIT = 0.1, 0.3  # points of mIoU or box AP; published with one decimal

@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the files of segmentors, or of detectors, have in common.

    Attributes:
        own: what a checkpoint knows about its own network and images, taken unless a flag or recipe names it.
        last: the bias of the last layer by system, "" for segmentors; it has `background` more than classes.
        joined: the layer that HorFPN replaces.
        of_published: those options of a published row.
        classes_of: the classes that the data must have, where that is known.
        measure: of the model over all images, in a list.
        result_of: what eval.json holds, from that and the number of unreadable images.
    """
    noun: str
    options: type[DenseOptions]
    own: tuple[str, ...]
    last: dict[str, str]
    background: int
    joined: str
    published: Mapping[str, Published]
    of_published: Callable[[Any], dict[str, Value]]
    build: Callable[[Any, int], nn.Module]
    task: MakeTask
    find_data: Callable[..., Data]
    classes_of: Callable[["Trained"], list[str] | None]
    measure: Callable[["Subject", ImageLoader, Leaves], list | None]
    result_of: Callable[["Subject", Any, int], dict]


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, the options and classes it was trained with (numbers from 1 on unless it is
    `named`), and the file's entry."""
    model: Any
    options: Any
    classes: list[str]
    entry: str
    named: bool


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, the file it is from, its data; `folder` as of `own_folder`."""
    path: str
    trained: Trained
    data: Data
    process: Process
    folder: str


def load_trained(kind: Kind, path: str | os.PathLike, options: Any = None,
                 origins: dict[str, str] | None = None, classes: list[str] | None = None,
                 device: torch.device | str = "cpu") -> Trained:
    """Load a checkpoint of this project or a published file, whose `classes` may be given.

    Options whose origin is not "default" win over the file's own. Raises UserError (`other_model`, …).
    """
    checkpoint, origins, options = safe_torch_load(path), origins or {}, options or kind.options()
    state = {name.removeprefix("module."): value for name, value in
             select_weights(checkpoint, str(path), weights=options.weights)[0].items()}
    system = next((system for system, name in kind.last.items() if name in state), None)
    if system is None:
        raise UserError(f"{path} holds no {kind.noun}; name a checkpoint of this kind or a published file.",
                        code="other_model")
    own = own_options(checkpoint, kind.options, kind.own)
    if own is not None:
        classes = checkpoint.get("classes")
    elif published := identify(kind, state, system):
        own = kind.of_published(published)
    options = replace(options, **{name: value for name, value in (own or {}).items()
                                  if origins.get(name, "default") == "default"})
    count = len(classes) if classes else len(state[kind.last[system]]) - kind.background
    model = kind.build(options, count)
    entry = load_published(model, path, checkpoint, options.weights)
    model = model.to(device).eval()
    native.attach(model)
    names = [*classes] if classes else [str(number) for number in range(1, count + 1)]
    return Trained(model, options, names, entry, bool(classes))


def own_options(checkpoint: Any, kind: type[Options], names: Sequence[str]) -> dict[str, Value] | None:
    """The options of these names that a checkpoint of this project was made with; None for another file."""
    args = checkpoint.get("args") if isinstance(checkpoint, dict) and checkpoint.get("format") else None
    if not isinstance(args, dict):
        return None
    several = lambda value: value if isinstance(value, (list, tuple)) else [value]
    return {name: table(kind)[name].convert([*map(str, several(args[name]))], f"the checkpoint's {name}")
            for name in names if name in args}


def identify(kind: Kind, state: dict[str, torch.Tensor], system: str) -> Published | None:
    """The published model that a state has the shape of, by width, filters, joining layers and system."""
    stem = state.get("backbone.downsample_layers.0.0.weight")
    head = next((name for name, leaf in (("horfpn_gf", "complex_weight"), ("horfpn_7x7", "weight"))
                 if f"{kind.joined}.dwconv.{leaf}" in state), "plain")
    if stem is None or "backbone.stages.2.17.gamma1" not in state:
        return None
    found = len(stem), "backbone.stages.2.0.gnconv.dwconv.complex_weight" in state, head, system
    return next((row for row in kind.published.values() for config in [VARIANTS[row.model].config]
                 if (config.width, config.filters[2] != "conv", row.head, row.system) == found), None)


def work(kind: Kind, options: Options) -> Work:
    """What `options` ask for, as in `main.classification`."""
    from dryrun import check
    from training import train

    if options.eval and not options.dry_run:
        return partial(evaluate_each, kind)
    start = check if options.dry_run else train
    return partial(start, data=partial(find_scenes, kind.find_data), task=kind.task)


def evaluate_each(kind: Kind, resolved: Resolved, process: Process, watchdog: Watchdog) -> ExitCode:
    """Evaluate each checkpoint of `--resume`, or the best of the run's folder: eval.json and a line each; the
    exit code."""
    results = [_evaluate(kind, path, resolved, process, watchdog)
               for path in process.on_rank_zero(lambda: find_sources(resolved))]
    options = resolved.options
    if process.is_main:
        folder = Path(options.output_dir or Path(results[0]["checkpoint"]).parent)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "eval.json", {"results": results} if len(results) > 1 else results[0])
        for result in results:
            logger.info("%s, %s:", result["checkpoint"], result["weights"])
            sys.stdout.write(result["verdict_line"] + "\n")
        sys.stdout.flush()
    return ExitCode.DONE if not options.check or results[0]["verdict"] == "PASS" else ExitCode.FAILED


def _evaluate(kind: Kind, path: str, resolved: Resolved, process: Process, watchdog: Watchdog) -> dict:
    def leaves() -> bool:  # asked before each image
        watchdog.phase("evaluation", 0)
        return False

    options = resolved.options
    trained = load_trained(kind, path, options, resolved.origins, device=process.device)
    data = process.local_first(lambda: kind.find_data(
        trained.options, kind.classes_of(trained), train=False, evaluate=True))
    subject = Subject(path, trained, data, process, own_folder(options, process))
    loader = share(data, options, process, refuse_bad=not options.allow_bad_images)
    try:
        found = kind.measure(subject, loader, leaves)
        bad = sum(len(part) for part in process.all_gather_object(loader.take_unreadable()))
    finally:
        loader.close()
    assert found is not None
    return kind.result_of(subject, found[0], bad)


def verdict(line: str, name: str, value: float, published: float | None) -> dict:
    """The entries of eval.json that compare a figure with the published one (None where it cannot be), and
    the line to print."""
    if published is None:
        return {"verdict": "", "verdict_line": line}
    size = round(abs(value - published), 6)
    word = "PASS" if size <= PASS_LIMIT else "CLOSE" if size <= CLOSE_LIMIT else "FAIL"
    return {"verdict": word, "published": published, "difference": value - published, "verdict_line": (
        f"{line} (published {name} {published:.1f}, difference {value - published:+.2f}) {word}")}


def _confusions(subject: Subject, loader: Iterable[Batch], leaves: Leaves) -> list[torch.Tensor] | None:
    trained = subject.trained
    return Evaluation(trained.options, subject.process, len(trained.classes)).confusions(
        [trained.model], loader, leaves, partial(save_sample, subject.folder, subject.data))


def _segmentation_result(subject: Subject, confusion: torch.Tensor, bad: int) -> dict:
    """What eval.json holds: figures, settings, each class, and the comparison with the published mIoU."""
    trained, options, published = subject.trained, subject.trained.options, subject.trained.options.published
    images = len(subject.data.val or ())
    found: dict = scores(confusion)
    result = {name: found[name] for name in FIGURES} | {
        "checkpoint": subject.path, "weights": trained.entry, "images": images, "bad_images": bad,
        "model": options.model, "head": options.head, "crop_size": options.crop_size,
        "image_scale": list(options.image_scale), "ms_flip": options.ms_flip,
        "per_class": {name: {"iou": _finite(iou), "acc": _finite(acc)}
                      for name, iou, acc in zip(trained.classes, found["iou"], found["acc"])}}
    line = ", ".join(f"{word} {found[name]:.2f}" for name, word in zip(FIGURES, ("mIoU", "mAcc", "aAcc")))
    there = published and (published.miou_ms if options.ms_flip else published.miou)
    comparable = (len(trained.classes), images, bad) == (150, ADE20K_IMAGES, 0)
    return result | verdict(line, "mIoU", found["miou"], there if comparable and there else None)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _objects(subject: Subject, loader: Iterable[Batch], leaves: Leaves) -> list[list[dict]] | None:
    classes, images = subject.trained.model.classes, cast(CocoImages, subject.data.val).rows
    if subject.data.num_classes != classes:
        raise UserError(f"{subject.path} has {classes} classes, the data {subject.data.num_classes}; give "
                        "the data it was made for.", code="other_classes")
    return results([subject.trained.model], loader, images, subject.process, leaves,
                   partial(save_objects, subject.folder, images))


def _detection_result(subject: Subject, rows: list[dict], bad: int) -> dict:
    """What eval.json holds: figures in percent, settings, each class, and the comparison with the published
    box AP. All objects are in detections.json."""
    if subject.folder:
        Path(subject.folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(subject.folder) / "detections.json", rows)
    trained, options, published = subject.trained, subject.trained.options, subject.trained.options.published
    images = cast(CocoImages, subject.data.val).rows
    found = precision(rows, images, subject.process)
    result: dict = {f"{kind}_{name.lower()}": 100 * value for kind, figures in found.items()
                    for name, value in figures.items() if name != "per_category"}
    each = {name: {f"{kind}_ap": 100 * figures["per_category"][number] for kind, figures in found.items()
                   if number in figures["per_category"]}
            for number, name in zip(images.categories, images.class_names)}
    result |= {
        "checkpoint": subject.path, "weights": trained.entry, "images": len(images.photos), "bad_images": bad,
        "model": options.model, "head": options.head, "system": options.system,
        "test_side": options.test_side, "longest_side": options.longest_side, "per_class": each}
    line = ", ".join(f"{kind} AP {result[f'{kind}_ap']:.1f} (AP50 {result[f'{kind}_ap50']:.1f})"
                     for kind in ("box", "mask"))
    comparable = published and (len(each), len(images.photos), bad) == (80, COCO_IMAGES, 0)
    there = published.box_ap if published and comparable else None
    return result | verdict(line, "box AP", result["box_ap"], there)


SEGMENTOR = Kind(
    noun="segmentor", options=SegmentationOptions, last={"": "decode_head.conv_seg.bias"}, background=0,
    own=("model", "head", "head_width", "crop_size", "image_scale", "layer_scale_init_value", "zero_ignored"),
    joined="decode_head.fpn_bottleneck", published=SEGMENTORS, build=build_segmentor, task=Segmentation,
    find_data=find_labelled, classes_of=lambda trained: trained.classes, measure=_confusions,
    result_of=_segmentation_result,
    of_published=lambda row: {"model": row.model, "head": row.head, "crop_size": row.crop, "head_width": 512,
                              "image_scale": (4 * row.crop, row.crop)})
DETECTOR = Kind(
    noun="detector", options=DetectionOptions, background=1, joined="neck.fpn_convs.0", published=DETECTORS,
    last={"cascade_mask_rcnn": "roi_head.bbox_head.0.fc_cls.bias",
          "mask_rcnn": "roi_head.bbox_head.fc_cls.bias"},
    own=("model", "head", "system", "head_width", "layer_scale_init_value", "test_side", "longest_side"),
    of_published=lambda row: {"model": row.model, "head": row.head, "system": row.system, "head_width": 256},
    build=build_detector, task=Detection, find_data=find_objects, measure=_objects,
    classes_of=lambda trained: trained.classes if trained.named else None, result_of=_detection_result)
load_segmentor, load_detector = partial(load_trained, SEGMENTOR), partial(load_trained, DETECTOR)
