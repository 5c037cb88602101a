"""`--eval true`: find the weights, evaluate them in one pass over the images, compare with the published."""
import os
import re
import sys
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import timm
import torch
from tqdm import tqdm

import engine
import native
from common.errors import UserError
from common.log import logger
from common.outcome import ExitCode
from common.safe_load import safe_torch_load
from common.synsets import imagenet_synsets
from config.options import ImageSettings, Options, from_checkpoint
from config.parse import Resolved, check_model
from datasets.build import Data, build_data, eval_loader
from datasets.device import Prepare
from datasets.labels import real_labels
from launch.process import Process
from launch.watchdog import Watchdog
from models import MODEL_NAMES
from models.download import cache_folder, fetch_published
from models.hornet import HorNet
from models.inspect import class_titles
from models.trained import best_checkpoint, locate
from models.weights import load_for_model
from models.zoo import PUBLISHED
from report import results as reported
from report.metrics import Predictions, multi_label_accuracy
from report.page import write_report
from run.checkpoint import Checkpoints
from run.start import check_writable

# What a checkpoint of ours knows about its own network and data, taken unless a flag or recipe names it; the
# data only together, and only from a run's own folder.
_NETWORK = ("model", *(field.name for field in fields(ImageSettings)))
_DATA = ("data_set", "data_path", "eval_data_path", "val_fraction", "val_labels", "nb_classes",
         "allow_class_mismatch")


@dataclass(frozen=True)
class Candidate:
    """One set of weights to evaluate: the checkpoint's path and its entry, `model` or `model_ema`."""
    path: str
    weights: str
    network: torch.nn.Module


@dataclass(frozen=True)
class Prepared:
    """The evaluation of one set of images, up to reading them; `options` include the checkpoint's own
    settings."""
    options: Options
    data: Data
    candidates: list[Candidate]
    evaluation: engine.Evaluation


class Heartbeats(engine.Observer):
    """The engine's observer of an evaluation: heartbeats for the watchdog."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog

    def on_phase(self, phase: str, update: int) -> None:
        self.watchdog.phase(phase, update)


def evaluate_checkpoints(resolved: Resolved, process: Process, watchdog: Watchdog) -> ExitCode:
    """Evaluate each checkpoint of `--resume` (else `--pretrained`, else the run's best); the exit code."""
    results, complete = [], True
    for prepared in prepare_evaluation(resolved, process, Heartbeats(watchdog)):
        for note in prepared.data.notes:
            logger.info(note)
        found = _evaluate(prepared, process)
        own = [_result(prepared, *each) for each in zip(prepared.candidates, found)]
        results += own
        if process.is_main:
            complete = _write(prepared, results, own, found[0]) and complete
            for result in own:
                _log(result, prepared.options)
    if process.is_main and resolved.options.suite:
        sys.stdout.write(reported.suite_table(results))
    sys.stdout.flush()
    passed = results[0].get("verdict") == "PASS" or not resolved.options.check
    return ExitCode.DONE if passed and complete else ExitCode.FAILED


def _evaluate(prepared: Prepared, process: Process) -> list[engine.EvalResult]:
    options, evaluation = prepared.options, prepared.evaluation
    networks = [(candidate.weights, candidate.network) for candidate in prepared.candidates]
    quiet = None if process.is_main else True  # None leaves the bar out where nobody watches a terminal
    with closing(eval_loader(prepared.data, options, process.rank, process.world_size,
                             refuse_bad=not options.allow_bad_images)) as loader, \
            native.packed(*(network for _, network in networks), dtype=evaluation.autocast_dtype):
        watched = tqdm(loader, "evaluation", unit="batch", leave=False, disable=quiet)
        return engine.evaluate(networks, watched, evaluation)


def prepare_evaluation(resolved: Resolved, process: Process, observer: engine.Observer) -> list[Prepared]:
    """Find checkpoints and images, and load the networks: one entry, or one for each set of `--suite`."""
    sources = process.on_rank_zero(lambda: find_sources(resolved))
    first = safe_torch_load(sources[0])
    first = first if isinstance(first, dict) else {}
    all_options = with_checkpoint_settings(resolved, first, sources[0])
    for name in ("output_dir", "report"):  # before hours are spent on what could not be written
        if folder := getattr(all_options, name):
            process.on_rank_zero(lambda: check_writable(f"--{name}", folder))
    classes = first.get("classes")  # which the images' folders then must fit
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)
            and all_options.nb_classes in (None, len(classes))):
        classes = None
    sets, candidates = [], []
    for options, wanted in process.on_rank_zero(lambda: find_sets(all_options)):
        data = process.local_first(lambda: build_data(
            options, train=False, evaluate=True, rank_zero=process.local_rank == 0, class_names=classes,
            companions=True))
        imagenet = imagenet_set(data)
        if wanted and imagenet != wanted:
            raise UserError(f"--suite: {options.eval_data_path or options.data_path} is not {wanted}, or the "
                            "model lacks ImageNet's 1000 classes; name the folder with NAME=FOLDER.",
                            code="unexpected_classes")
        names = list(imagenet_synsets()) if imagenet else data.class_names
        candidates = candidates or [
            c for path in sources for c in load_candidates(path, options, names, process.device)]
        assert data.val is not None
        sets.append(Prepared(options, data, candidates, engine.Evaluation(
            Prepare(options, process.device), process.device, amp_dtype(options), tf32=options.fast_math,
            columns=data.subset and data.subset.columns, outputs=bool(options.report or imagenet),
            expected=len(data.val), observer=observer, process=process)))
    return sets


def imagenet_set(data: Data) -> str:
    """Which of ImageNet's validation sets the images are, "" for others."""
    known = "imagenet-val" if tuple(data.class_names) == imagenet_synsets() else ""
    return data.subset.name if data.subset else known


def find_sources(resolved: Resolved) -> list[str]:
    """Local paths of the checkpoints to evaluate; downloads what is an address. Never random weights.

    The weights that a recipe begins with, as a run's config.yaml has them, count only where nothing else is.
    """
    options, folder = resolved.options, resolved.options.output_dir
    found: list[Path | str] = []
    for name in options.resume:
        loaded = Checkpoints(folder).resolve(name) if folder and name in ("best", "latest") else None
        found.append(loaded.path if loaded else locate(name))
    start = options.model if options.pretrained else options.finetune
    asked = "flag" in (resolved.origins["pretrained"], resolved.origins["finetune"])
    folder = folder or ("" if start else options.report)  # of a run whose page is to be refreshed
    if folder and not found and not asked:
        found += filter(None, [best_checkpoint(Path(folder))])
    if start and not found:
        found.append(fetch_published(start) if options.pretrained else locate(start))
    if not found:
        raise UserError("--eval true has nothing to evaluate: give --resume CHECKPOINT, --pretrained true, "
                        "or the --output_dir of a run.", code="missing_checkpoint")
    return [*map(str, found)]


def with_checkpoint_settings(resolved: Resolved, checkpoint: dict, path: str) -> Options:
    """The options with the checkpoint's own network and image settings where neither flag nor recipe names
    them; in a run's folder with its data too, where none of that is named."""
    origins, args = resolved.origins, checkpoint.get("args") if checkpoint.get("format") else None
    names = [name for name in _NETWORK if origins[name] == "default"]
    if Path(path).with_name("config.yaml").is_file() and {origins[name] for name in _DATA} == {"default"}:
        names += _DATA
    own = from_checkpoint(args if isinstance(args, dict) else {}, names)
    own = {name: value for name, value in own.items() if value != getattr(resolved.options, name)}
    if own:
        logger.info("From the checkpoint: %s", ", ".join(f"{name} {value}" for name, value in own.items()))
    check_model(str(own.get("model", resolved.options.model)), MODEL_NAMES)
    options = replace(resolved.options, **own)
    if not options.data_path and not options.eval_data_path:
        raise UserError(f"--data_path is missing, and {path} is not in the folder of a run that names its "
                        "data; give the folder that holds val/.", code="missing_data")
    return options


def find_sets(options: Options) -> list[tuple[Options, str]]:
    """The options of each set of images to evaluate, and for those of `--suite` what they have to be.

    A set of `--suite` lies where `name=FOLDER` says, `imagenet` where the options say, any other in or beside
    `--data_path` in a folder such as imagenet-a, imagenetv2-matched-frequency-format-val or sketch.
    """
    found = [] if options.suite else [(options, "")]
    home = Path(options.data_path or options.eval_data_path or ".").absolute()
    for name, _, folder in (entry.partition("=") for entry in options.suite.split(",") if entry):
        wanted = "imagenet-val" if name == "imagenet" else f"imagenet-{name}"
        own = replace(options, report=options.report and str(Path(options.report, wanted)))
        if folder or name != "imagenet":
            likely = re.compile(rf"(imagenet)?{name}(matched.*)?")
            near = (str(place) for place in (*home.glob("*/"), *home.parent.glob("*/"))
                    if likely.fullmatch(re.sub(r"[^a-z0-9]", "", place.name.lower())))
            if not os.path.isdir(folder := folder or next(near, str(home / wanted))):
                raise UserError(f"--suite {name}: {folder} is no folder; name the one that has it "
                                f"with {name}=FOLDER.", code="missing_data")
            own = replace(own, eval_data_path=folder, val_labels=None)
        found.append((own, wanted))
    return found


def load_candidates(path: str, options: Options, class_names: list[str], device: torch.device
                    ) -> list[Candidate]:
    """The networks to evaluate of one checkpoint: one, or two for `--weights both`."""
    found = []
    for weights in ("model", "ema") if options.weights == "both" else (options.weights,):
        network = timm.create_model(options.model, num_classes=len(class_names),
                                    layer_scale_init_value=options.layer_scale_init_value)
        assert isinstance(network, HorNet)
        report = load_for_model(network, path, model_key=options.model_key, prefix=options.model_prefix,
                                weights=weights, allow_partial=options.allow_partial, class_names=class_names)
        network = network.to(device).eval()
        native.attach(network)
        found.append(Candidate(path, "model_ema" if report.source_key == "model_ema" else "model", network))
    return found


def amp_dtype(options: Options) -> torch.dtype | None:
    """The dtype of mixed precision, None for float32."""
    return None if not options.use_amp else torch.float16 if options.amp_dtype == "fp16" else torch.bfloat16


# ------------------------------------------------------------------------------------- results

def _result(prepared: Prepared, candidate: Candidate, found: engine.EvalResult) -> dict:
    options, data = prepared.options, prepared.data
    protocol = reported.Protocol(
        model=options.model, num_classes=data.num_classes, images=ImageSettings.of(options),
        weights=candidate.weights, checkpoint=candidate.path, tf32=options.fast_math,
        dtype=str(amp_dtype(options) or torch.float32).removeprefix("torch."),
        dataset=imagenet_set(data) or options.data_set)
    predictions = predictions_of(found, data) if found.outputs is not None else None
    result = reported.results_from(found, protocol, PUBLISHED.get(options.model), predictions)
    result["seconds"] = found.seconds
    if predictions is not None and protocol.dataset == "imagenet-val":
        answers = real_labels(predictions.paths.tolist())
        result |= {} if answers is None else {"real": multi_label_accuracy(predictions.top5, answers)}
    return result


def predictions_of(found: engine.EvalResult, data: Data) -> Predictions:
    """The engine's per-image outputs with paths and class names; an unreadable image has the answer -1."""
    out, val = found.outputs, data.val
    assert out is not None and val is not None
    unreadable = out.targets == -100
    return Predictions(
        paths=np.array([val.path(int(i)) for i in out.indices]), probabilities=out.probabilities,
        labels=np.where(unreadable, val.targets[out.indices], out.targets), nll=out.nll.astype(np.float64),
        top5=np.where(unreadable[:, None], -1, out.top), classes=list(data.class_names))


def _write(prepared: Prepared, results: list[dict], own: list[dict], first: engine.EvalResult) -> bool:
    """eval.json (all `results` so far; `own`, of this set, in the report), the report's files and page; False
    when a folder that was asked for could not take them."""
    options, beside = prepared.options, Path(prepared.candidates[0].path).parent
    found = ((options.output_dir, results), (options.report, own))
    asked = {folder: part for folder, part in found if folder}
    try:
        # Beside a downloaded file there is no folder of the user's.
        for folder, part in (asked or ({} if beside == cache_folder() else {beside: results})).items():
            Path(folder).mkdir(parents=True, exist_ok=True)
            reported.write_eval_json(Path(folder, "eval.json"), part)
        if options.report:
            predictions = predictions_of(first, prepared.data)
            reported.write_report_files(options.report, predictions, class_titles(predictions.classes))
            logger.info("Report: %s", write_report(options.report))
    except OSError as error:
        logger.warning("The results were not written: %s", error)
        return not asked
    return True


def _log(result: dict, options: Options) -> None:
    """The result's last line on standard output, and before it what a person should know about it."""
    logger.info("%s, %s:", result["checkpoint"], result["weights"])
    if options.explain_difference:
        for sentence in result["departures"] or ["no setting departs from the published protocol"]:
            logger.info("- %s", sentence)
    if result["nonfinite_images"]:
        logger.warning("%d of %d images gave outputs that are not numbers; they count as incorrect",
                       result["nonfinite_images"], result["images"])
    # Even a poor network scores more, except on ImageNet-A, which was chosen to be answered incorrectly.
    enough = min(result["num_classes"], result["images"]) >= 100 and result["dataset"] != "imagenet-a"
    if enough and result["acc1"] < 2:
        logger.warning("Only %d of %d images are correct; likely causes: another order of the classes than "
                       "the folders have, another normalisation (--imagenet_default_mean_and_std), or the "
                       "other entry of the file (--weights).", result["hits1"], result["images"])
    if options.check and "verdict" not in result:
        logger.warning("--check true has nothing to compare with: a verdict needs a published model with all "
                       "its classes at its own input size on ImageNet's validation set")
    sys.stdout.write(reported.summary_line(result) + "\n")
