"""`--eval true` of segmentation: find the weights, one pass over the images, mIoU, the published figure."""
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import native
from common.errors import UserError
from common.files import write_json
from common.log import logger
from common.outcome import ExitCode
from common.safe_load import safe_torch_load
from config.options import Options, Value, table
from config.parse import Resolved
from dense.backbone import load_published
from dense.data import find_data
from dense.draw import save_sample
from dense.options import SegmentationOptions
from dense.segmentation_task import FIGURES, Evaluation, build_segmentor, scores, share
from dense.segmentor import Segmentor
from dense.zoo import SEGMENTORS, PublishedSegmentor
from evaluation import find_sources
from launch.process import Process
from launch.watchdog import Watchdog
from models.weights import select_weights
from models.zoo import VARIANTS

ADE20K_IMAGES = 2000
PASS_LIMIT, CLOSE_LIMIT = 0.1, 0.3  # points of mIoU or box AP; published with one decimal
# What a checkpoint knows about its own network and images, taken unless a flag or recipe names it.
_OWN = ("model", "head", "head_width", "crop_size", "image_scale", "layer_scale_init_value", "zero_ignored")


@dataclass(frozen=True)
class Trained:
    """A segmentor in evaluation mode, the options and classes it was trained with, and the file's entry."""
    model: Segmentor
    options: SegmentationOptions
    classes: list[str]
    entry: str


def load_segmentor(path: str | os.PathLike, options: SegmentationOptions | None = None,
                   origins: dict[str, str] | None = None, classes: list[str] | None = None,
                   device: torch.device | str = "cpu") -> Trained:
    """Load a checkpoint of this project or a published file.

    Options whose origin is not "default" win over the file's own. Raises UserError (`other_model`, …).
    """
    checkpoint, origins = safe_torch_load(path), origins or {}
    options = options or SegmentationOptions()
    state = select_weights(checkpoint, str(path), weights=options.weights)[0]
    own, args = own_options(checkpoint, SegmentationOptions, _OWN), checkpoint.get("args")
    if own is None and (published := identify(state)):
        side = published.crop
        own = {"model": published.model, "head": published.head, "crop_size": side, "head_width": 512,
               "image_scale": (4 * side, side)}
    options = replace(options, **{name: value for name, value in (own or {}).items()
                                  if origins.get(name, "default") == "default"})
    count = state.get("decode_head.conv_seg.bias")
    if count is None:
        raise UserError(f"{path} holds no segmentor; name a checkpoint of dense.segmentation or a published "
                        "file.", code="other_model")
    names = checkpoint.get("classes") if args else classes
    names = names or [str(number) for number in range(1, len(count) + 1)]
    model = build_segmentor(options, len(names))
    entry = load_published(model, path, checkpoint, options.weights)
    model = model.to(device).eval()
    native.attach(model)
    return Trained(model, options, list(names), entry)


def own_options(checkpoint: Any, kind: type[Options], names: Sequence[str]) -> dict[str, Value] | None:
    """The options of these names that a checkpoint of this project was made with; None for another file."""
    args = checkpoint.get("args") if isinstance(checkpoint, dict) and checkpoint.get("format") else None
    if not isinstance(args, dict):
        return None
    several = lambda value: value if isinstance(value, (list, tuple)) else [value]
    return {name: table(kind)[name].convert([*map(str, several(args[name]))], f"the checkpoint's {name}")
            for name in names if name in args}


def identify(state: dict[str, torch.Tensor]) -> PublishedSegmentor | None:
    """The published segmentor that a state has the shape of, by its width, filters and joining layer."""
    state = {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    stem = state.get("backbone.downsample_layers.0.0.weight")
    filters = "backbone.stages.2.0.gnconv.dwconv.complex_weight" in state
    joined = "decode_head.fpn_bottleneck.dwconv."
    head = ("horfpn_gf" if joined + "complex_weight" in state
            else "horfpn_7x7" if joined + "weight" in state else "plain")
    for each in SEGMENTORS.values():
        config = VARIANTS[each.model].config
        if (stem is not None and (config.width, config.filters[2] != "conv", each.head)
                == (len(stem), filters, head) and "backbone.stages.2.17.gamma1" in state):
            return each
    return None


def evaluate_segmentors(resolved: Resolved, process: Process, watchdog: Watchdog) -> ExitCode:
    """Evaluate each checkpoint of `--resume`, or the best of the run's folder; the exit code."""
    return evaluate_each(resolved, process, lambda path: _evaluate(path, resolved, process, watchdog))


def evaluate_each(resolved: Resolved, process: Process, evaluate: Callable[[str], dict]) -> ExitCode:
    """Write eval.json and print the line of each checkpoint that is asked for; `evaluate(path)` gives what
    eval.json holds."""
    results = [*map(evaluate, process.on_rank_zero(lambda: find_sources(resolved)))]
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


def verdict(line: str, name: str, value: float, published: float | None) -> dict:
    """The entries of eval.json that compare a figure with the published one (None where it cannot be), and
    the line to print."""
    if published is None:
        return {"verdict": "", "verdict_line": line}
    size = round(abs(value - published), 6)
    word = "PASS" if size <= PASS_LIMIT else "CLOSE" if size <= CLOSE_LIMIT else "FAIL"
    return {"verdict": word, "published": published, "difference": value - published, "verdict_line": (
        f"{line} (published {name} {published:.1f}, difference {value - published:+.2f}) {word}")}


def heartbeat(watchdog: Watchdog) -> Callable[[], bool]:
    """What an evaluation asks before each image: a heartbeat, and never to leave."""
    def leaves() -> bool:
        watchdog.phase("evaluation", 0)
        return False
    return leaves


def _evaluate(path: str, resolved: Resolved, process: Process, watchdog: Watchdog) -> dict:
    options = cast(SegmentationOptions, resolved.options)
    trained = load_segmentor(path, options, resolved.origins, device=process.device)
    data = process.local_first(lambda: find_data(trained.options, trained.classes, train=False,
                                                 evaluate=True))
    loader = share(data, options, process, refuse_bad=not options.allow_bad_images)
    folder = options.output_dir if process.is_main else ""
    keep = lambda batch, labels: save_sample(folder, batch, labels, data)
    try:
        evaluation = Evaluation(trained.options, process, len(trained.classes))
        found = evaluation.confusions([trained.model], loader, heartbeat(watchdog), keep if folder else None)
        bad = sum(len(part) for part in process.all_gather_object(loader.take_unreadable()))
    finally:
        loader.close()
    assert found is not None and data.val is not None
    return result_of(scores(found[0]), trained, path, len(data.val), bad)


def result_of(found: dict, trained: Trained, path: str, images: int, bad: int) -> dict:
    """What eval.json holds: figures, settings, each class, and the comparison with the published mIoU."""
    options, published = trained.options, trained.options.published
    result = {name: found[name] for name in FIGURES} | {
        "checkpoint": path, "weights": trained.entry, "images": images, "bad_images": bad,
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
