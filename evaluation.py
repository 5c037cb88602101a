"""What `--eval true` does: find the weights, evaluate all in one pass, compare with what is published, write it down."""
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
from tqdm import tqdm

import engine
import models  # noqa: F401  registers the architectures with timm
from common.errors import UserError
from common.log import logger
from common.safe_load import safe_torch_load
from common.synsets import imagenet_synsets
from datasets.build import Data, build_data, eval_loader
from datasets.device import EvalPrepare
from datasets.subsets import Subset, real_labels, recognise_folder
from datasets.transforms import DEFAULT_CROP_PCT, WARP_FROM, mean_std
from launch import ExitCode
from models import MODEL_NAMES
from models.download import cache_folder, fetch_published, local_file
from models.inspect import class_titles
from native.paths import accelerate, code_paths, packed
from models.weights import load_for_model
from models.zoo import PUBLISHED
from run.checkpoint import Checkpoints
from report.metrics import Predictions, multi_label_accuracy
from config.parse import Resolved
from config.options import OPTIONS
from common.text import quote
from report.results import Protocol, results_from, summary_line, write_eval_json, write_report_files
from scoring import SAMPLED, strange_weights

# What a checkpoint of ours knows about its own network and pictures, taken unless a flag or recipe says otherwise.
_FROM_CHECKPOINT = ("model", "input_size", "crop_pct", "imagenet_default_mean_and_std", "layer_scale_init_value")


@dataclass
class Candidate:
    """One set of weights to evaluate: the checkpoint's path and its entry, `model` or `model_ema`."""
    path: str
    weights: str
    network: torch.nn.Module


@dataclass
class Prepared:
    """An evaluation up to its pictures: `source` is the first checkpoint's path, `options` have its own settings in
    them, `subset` is that of ImageNet's companions, if it is one."""
    source: str
    options: Any
    data: Data
    subset: Subset | None
    candidates: list[Candidate]
    evaluation: engine.Evaluation


def evaluate_checkpoints(resolved: Resolved, process: Any, watchdog: Any) -> int:
    """Evaluate every checkpoint of `--resume` (else `--pretrained`, else the run folder's best); the exit code."""
    prepared = prepare_evaluation(resolved, process, _Phases(watchdog))
    options, data, candidates, evaluation = prepared.options, prepared.data, prepared.candidates, prepared.evaluation
    for note in data.notes:
        logger.info(note)
    if not evaluation.columns and len(data.val) >= 2 * SAMPLED:
        for candidate in candidates:
            strange = strange_weights(candidate.network, candidate.weights, data, options, evaluation)
            if strange and process.is_main:
                logger.warning("%s: %s", candidate.path, strange)
    loader = eval_loader(data, options, process.rank, process.world_size)
    # None leaves the bar out where nobody watches a terminal.
    watched = tqdm(loader, "evaluation", unit="batch", leave=False, disable=None if process.is_main else True)
    try:
        with packed(*(c.network for c in candidates), dtype=evaluation.autocast_dtype):
            found = engine.evaluate([(c.weights, c.network) for c in candidates], watched, evaluation)
    finally:
        loader.close()
    results = [_result(c, r, options, data, prepared.subset) for c, r in zip(candidates, found)]
    written = True
    if process.is_main:
        written = _write(results, found, options, data, prepared.source)
        _say(results, options)
    passed = results[0].get("verdict") == "PASS" or not options.check
    return ExitCode.DONE if passed and written else ExitCode.FAILED


def prepare_evaluation(resolved: Resolved, process: Any, observer: engine.Observer) -> Prepared:
    """Find checkpoints and pictures, and load the networks."""
    sources = process.on_rank_zero(lambda: find_sources(resolved))
    first = safe_torch_load(sources[0])
    first = first if isinstance(first, dict) else {}
    options = with_checkpoint_settings(resolved, first)
    if not options.dry_run:
        process.on_rank_zero(lambda: _make_folders(options))
    classes = known_classes(first, options)
    subset = companion(options, classes)
    data = process.local_first(lambda: build_data(
        options, train=False, evaluate=True, rank_zero=process.local_rank == 0,
        class_names=list(subset.folders) if subset else classes))
    names = list(imagenet_synsets()) if subset else data.class_names
    candidates = [c for path in sources for c in load_candidates(path, options, names, process.device)]
    evaluation = engine.Evaluation(
        EvalPrepare(options, process.device), process.device, amp_dtype(options), tf32=options.fast_math,
        columns=subset.columns if subset else None, outputs=bool(options.report or subset),
        expected=len(data.val), observer=observer, process=process)
    return Prepared(sources[0], options, data, subset, candidates, evaluation)


def find_sources(resolved: Resolved) -> list[str]:
    """Local paths of the checkpoints to evaluate; downloads what is given as an address. Never random weights.

    The weights that a recipe begins with, as a run's own config.yaml has them, are taken only where nothing else is.
    """
    options = resolved.options
    folder = Checkpoints(options.output_dir) if options.output_dir else None
    found = []
    for name in options.resume:
        if name in ("best", "latest"):
            if folder is None:
                raise UserError(f"--resume {name} looks in the run folder: give --output_dir.")
            found.append(str(folder.resolve(name).path))
        else:
            found.append(local_file(name))
    named = "flag" in (resolved.origins[name] for name in ("pretrained", "finetune") if getattr(options, name))
    best = folder.best() if folder and not found and not named else None
    if best is not None:
        found.append(str(best))
    if options.pretrained and (named or not found):
        found.append(str(fetch_published(options.model)))
    if options.finetune and (named or not found):
        found.append(local_file(options.finetune))
    if not found:
        raise UserError("--eval true has nothing to evaluate: give --resume CHECKPOINT, --pretrained true, or the "
                        "--output_dir of a run with a best checkpoint.")
    return found


def with_checkpoint_settings(resolved: Resolved, checkpoint: dict) -> Any:
    """The options with the checkpoint's own network and picture settings where neither flag nor recipe names them."""
    args = checkpoint.get("args") or {}
    own = {}
    if checkpoint.get("format"):
        for name in _FROM_CHECKPOINT:
            if resolved.origins.get(name) == "default" and name in args and args[name] != getattr(resolved.options, name):
                own[name] = OPTIONS[name].convert([str(args[name])], f"the checkpoint's {name}")
    if own.get("model", MODEL_NAMES[0]) not in MODEL_NAMES:
        raise UserError(f"the checkpoint's model {quote(own['model'])} is not known here; if its weights are those of "
                        f"another model, name it with --model: {', '.join(MODEL_NAMES)}.")
    if own:
        logger.info("From the checkpoint: %s", ", ".join(f"{name} {value}" for name, value in own.items()))
    return replace(resolved.options, **own)


def companion(options: Any, classes: list[str] | None) -> Subset | None:
    """ImageNet's validation set, V2, -A, -R or -Sketch, when the model has ImageNet's 1000 classes; else None."""
    if options.data_set != "IMNET" or options.val_labels or options.nb_classes not in (None, 1000):
        return None
    if classes and tuple(classes) != imagenet_synsets():
        return None
    subset = recognise_folder(options.eval_data_path or str(Path(options.data_path or "") / "val"))
    if subset and subset.columns:
        logger.info("%s: judged among its %d classes alone", subset.name, len(subset.columns))
    return subset


def known_classes(checkpoint: dict, options: Any) -> list[str] | None:
    """The checkpoint's class list, which the pictures' folders then must fit; None without one, or when
    `--nb_classes` asks for another number, as a part of its classes."""
    classes = checkpoint.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    return classes if options.nb_classes in (None, len(classes)) else None


def load_candidates(path: str, options: Any, class_names: list[str], device: torch.device) -> list[Candidate]:
    """The networks to evaluate of one checkpoint: one, or two for `--weights both`."""
    found = []
    for weights in ("model", "ema") if options.weights == "both" else (options.weights,):
        network = timm.create_model(options.model, num_classes=len(class_names),
                                    layer_scale_init_value=options.layer_scale_init_value)
        report = load_for_model(network, path, model_key=options.model_key, prefix=options.model_prefix, weights=weights,
                                allow_partial=options.allow_partial, class_names=class_names)
        entry = "model_ema" if report.source_key == "model_ema" else "model"
        network = network.to(device).eval()
        accelerate(network, code_paths(device))
        found.append(Candidate(path, entry, network))
    return found


class _Phases(engine.Observer):
    """The engine's observer of an evaluation: heartbeats for the watchdog."""

    def __init__(self, watchdog: Any):
        self.watchdog = watchdog

    def on_phase(self, phase: str, update: int) -> None:
        self.watchdog.phase(phase, update)


def amp_dtype(options: Any) -> torch.dtype | None:
    """The dtype of mixed precision, None for float32."""
    return None if not options.use_amp else torch.float16 if options.amp_dtype == "fp16" else torch.bfloat16


def _result(candidate: Candidate, found: engine.EvalResult, options: Any, data: Data, subset: Subset | None) -> dict:
    imagenet = tuple(data.class_names) == imagenet_synsets()
    mean, std = mean_std(options.imagenet_default_mean_and_std)
    crop = None if options.input_size >= WARP_FROM else options.crop_pct or DEFAULT_CROP_PCT
    dtype = amp_dtype(options) or torch.float32
    protocol = Protocol(
        model=options.model, num_classes=data.num_classes, input_size=options.input_size, weights=candidate.weights,
        checkpoint=candidate.path, crop_pct=crop, mean=tuple(mean), std=tuple(std),
        dtype=str(dtype).removeprefix("torch."), tf32=options.fast_math,
        dataset=subset.name if subset else "imagenet-val" if imagenet else options.data_set, pillow=PIL.__version__)
    predictions = _predictions(found, data) if found.outputs is not None else None
    result = results_from(found, protocol, PUBLISHED.get(options.model), predictions) | {"seconds": found.seconds}
    answers = real_labels(predictions.paths) if subset and subset.name == "imagenet-val" else None
    return result if answers is None else result | {"real": multi_label_accuracy(predictions.top5, answers)}


def _predictions(found: engine.EvalResult, data: Data) -> Predictions:
    out = found.outputs
    unreadable = out.targets == -100
    labels = np.where(unreadable, data.val.targets[out.indices], out.targets)
    return Predictions(np.array([data.val.path(int(i)) for i in out.indices]), labels,
                       np.where(unreadable[:, None], -1, out.top), out.probabilities, out.nll.astype(np.float64),
                       list(data.class_names))


def _make_folders(options: Any) -> None:
    """The folders asked for, before hours are spent on what could not be written there."""
    for name in ("output_dir", "report"):
        folder = getattr(options, name)
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--{name} {folder} cannot be used: {error.strerror}; choose another.") from error


def _write(results: list[dict], found: list, options: Any, data: Data, source: str) -> bool:
    """eval.json and the report's files; False when a folder that was asked for could not take them."""
    target = Path(options.output_dir) if options.output_dir else Path(source).parent
    written = True
    try:
        if options.output_dir or target != cache_folder():  # there is no place of the user's beside downloaded files
            write_eval_json(target / "eval.json", results)
    except OSError as error:
        logger.warning("eval.json was not written in %s: %s", target, error.strerror)
        written = not options.output_dir
    try:
        if options.report:
            write_report_files(options.report, _predictions(found[0], data), class_titles(data.class_names))
            write_eval_json(Path(options.report) / "eval.json", results)
    except OSError as error:
        logger.warning("The report's files were not written in %s: %s", options.report, error.strerror)
        written = False
    return written


def _say(results: list[dict], options: Any) -> None:
    for result in results:
        if len(results) > 1:
            logger.info("%s, %s:", result["checkpoint"], result["weights"])
        if options.explain_difference:
            for sentence in result.get("departures", []) or ["no setting departs from the published protocol"]:
                logger.info("- %s", sentence)
        if result["nonfinite_images"]:
            logger.warning("%d of %d pictures gave outputs that are not numbers; they count as wrong",
                           result["nonfinite_images"], result["images"])
        sys.stdout.write(summary_line(result) + "\n")
    sys.stdout.flush()
    if options.check and "verdict" not in results[0]:
        logger.warning("--check true: nothing to compare with; a verdict takes a published model with all its classes "
                       "at its own input size on ImageNet's validation set")
