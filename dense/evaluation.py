"""`--eval true` of segmentation: find the weights, one pass over the images, mIoU, the published figure."""
import os
import sys
from collections.abc import Callable, Mapping, Sequence
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
from dense.backbone import load_published
from dense.data import find_data
from dense.draw import save_sample
from dense.options import DenseOptions, SegmentationOptions
from dense.segmentation_task import FIGURES, Evaluation, build_segmentor, scores, share
from dense.zoo import SEGMENTORS, Published
from evaluation import find_sources
from launch.process import Process
from launch.watchdog import Watchdog
from models.weights import select_weights
from models.zoo import VARIANTS

ADE20K_IMAGES = 2000
PASS_LIMIT, CLOSE_LIMIT = 0.1, 0.3  # points of mIoU or box AP; published with one decimal

@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the files of segmentors, or of detectors, have in common.

    Attributes:
        own: what a checkpoint knows about its own network and images, taken unless a flag or recipe names it.
        last: the bias of the last layer by system, "" for segmentors; it has `background` more than classes.
        joined: the layer that HorFPN replaces.
        of_published: those options of a published row.
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


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, the options and classes it was trained with (numbers from 1 on unless it is
    `named`), and the file's entry."""
    model: Any
    options: Any
    classes: list[str]
    entry: str
    named: bool


SEGMENTOR = Kind(
    noun="segmentor", options=SegmentationOptions, last={"": "decode_head.conv_seg.bias"}, background=0,
    own=("model", "head", "head_width", "crop_size", "image_scale", "layer_scale_init_value", "zero_ignored"),
    joined="decode_head.fpn_bottleneck", published=SEGMENTORS, build=build_segmentor,
    of_published=lambda row: {"model": row.model, "head": row.head, "crop_size": row.crop, "head_width": 512,
                              "image_scale": (4 * row.crop, row.crop)})


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


load_segmentor = partial(load_trained, SEGMENTOR)


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
