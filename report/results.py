"""What an evaluation says: its settings, the comparison with the published figure, and the files that keep both."""
import csv
import io
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import atomic_write, write_json, write_text
from report.metrics import Counts, Predictions, confusion_pairs, metrics, sampling_interval

IMAGENET_VAL_PICTURES = 50_000
PASS_LIMIT_FLOAT32, PASS_LIMIT_REDUCED, CLOSE_LIMIT = 0.05, 0.15, 0.30  # points of top-1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED_CROP_PCT, WARP_FROM_SIZE = 224 / 256, 384  # from 384 on the published protocol warps and does not crop


@dataclass(frozen=True)
class Protocol:
    """The settings of one evaluation that its number depends on, as written into eval.json.

    `crop_pct` None means: warp to input_size x input_size without a crop. `dtype` is torch's name without the
    prefix. `dataset` is `imagenet-val` for ILSVRC2012's validation pictures, otherwise any name.
    """
    model: str
    num_classes: int
    input_size: int
    weights: str = "model"
    checkpoint: str = ""
    crop_pct: float | None = PUBLISHED_CROP_PCT
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    dtype: str = "float32"
    tf32: bool = False
    dataset: str = "imagenet-val"
    pillow: str = ""

    @property
    def crop(self) -> str:
        if self.crop_pct is None:
            return f"warp to {self.input_size}, {self.interpolation}, no crop"
        return (f"resize short side to {int(self.input_size / self.crop_pct)}, {self.interpolation}, "
                f"centre crop {self.input_size}")


@dataclass(frozen=True)
class Verdict:
    word: str
    line: str
    difference: float


def explain_difference(protocol: Protocol, counts: Counts, published_input_size: int | None = None) -> list[str]:
    """One sentence for each setting that departs from the published protocol, with its typical effect."""
    size = published_input_size or protocol.input_size
    crop = None if size >= WARP_FROM_SIZE else PUBLISHED_CROP_PCT
    found = _precision_departures(protocol)
    if protocol.dataset != "imagenet-val":
        found.append(f"the pictures are {protocol.dataset}, not ImageNet-1k's validation set: the accuracies are not "
                     "comparable.")
    elif counts.images != IMAGENET_VAL_PICTURES:
        found.append(f"{counts.images} pictures instead of {IMAGENET_VAL_PICTURES}: chance alone moves top-1 by about "
                     f"±{sampling_interval(83.0, counts.images):.2f} points.")
    if protocol.input_size != size:
        found.append(f"input size {protocol.input_size} instead of {size}: one to several points.")
    if not _same(protocol.crop_pct, crop):
        found.append(f"crop: {_crop_text(protocol.crop_pct)} instead of {_crop_text(crop)}: typically 0.1 to 0.5 "
                     "points, either way.")
    if protocol.interpolation != "bicubic":
        found.append(f"interpolation {protocol.interpolation} instead of bicubic: typically 0.1 to 0.5 points lower.")
    for name, value, usual in (("mean", protocol.mean, IMAGENET_MEAN), ("std", protocol.std, IMAGENET_STD)):
        if not np.allclose(value, usual, atol=1e-6):
            found.append(f"{name} {tuple(value)} instead of {usual}: typically 0.2 to 1 point lower.")
    for number, what in ((counts.bad, "could not be read"), (counts.nonfinite, "gave logits that are not numbers")):
        if number:
            found.append(f"{number} pictures {what} and count as wrong: at most "
                         f"{100 * number / max(counts.images, 1):.3f} points lower.")
    if protocol.pillow.split(".")[0].isdigit() and int(protocol.pillow.split(".")[0]) >= 13:
        found.append(f"Pillow {protocol.pillow} resizes tall pictures with other pixels than versions before 13: "
                     "typically under 0.05 points.")
    return found


def _precision_departures(protocol: Protocol) -> list[str]:
    found = []
    if protocol.dtype != "float32":
        found.append(f"computed in {protocol.dtype} instead of float32: typically under 0.1 points, either way.")
    if protocol.tf32:
        found.append("TF32 products instead of true float32: typically under 0.03 points, either way.")
    return found


def verdict(counts: Counts, protocol: Protocol, published_top1: float | None, published_input_size: int | None,
            published_classes: int = 1000) -> Verdict | None:
    """Compare with the published top-1; None unless model, number of classes, input size and data are the published.

    PASS: the published protocol on all 50,000 pictures and a difference of at most 0.05 points in float32, 0.15 in
    reduced precision. CLOSE: at most 0.30. Otherwise FAIL. The sampling interval is information and decides nothing.
    """
    if published_top1 is None or protocol.num_classes != published_classes:
        return None
    if protocol.input_size != published_input_size or protocol.dataset != "imagenet-val":
        return None
    departures = explain_difference(protocol, counts, published_input_size)
    difference = counts.acc1 - published_top1
    reduced = _precision_departures(protocol)
    limit = PASS_LIMIT_REDUCED if reduced else PASS_LIMIT_FLOAT32
    size = abs(difference) - 1e-9  # 84.37 - 84.32 is 0.050000000000011 in binary
    as_published = len(departures) == len(reduced)
    word = "PASS" if as_published and size <= limit else "CLOSE" if size <= CLOSE_LIMIT else "FAIL"
    line = (f"top-1 {counts.acc1:.2f} (published {published_top1:.2f}, difference {_signed(difference)}; "
            f"{counts.images}/{max(counts.images, IMAGENET_VAL_PICTURES)} pictures; sampling interval "
            f"±{sampling_interval(counts.acc1, counts.images):.2f}) {word}")
    return Verdict(word, line, difference)


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # adding zero turns -0.00 into +0.00


def _same(a: float | None, b: float | None) -> bool:
    return a is None and b is None or (a is not None and b is not None and abs(a - b) < 1e-6)


def _crop_text(crop_pct: float | None) -> str:
    return "warp without a crop" if crop_pct is None else f"crop_pct {crop_pct:g}"


def results_from(counts: Any, protocol: Protocol, published: Any = None,
                 predictions: Predictions | None = None) -> dict:
    """The dictionary written as eval.json.

    `counts` is a `Counts` or the engine's `EvalResult`; `published` an entry of `models.zoo.PUBLISHED` or None.
    """
    result = {"acc1": counts.acc1, "acc5": counts.acc5, "loss": counts.loss, "hits1": counts.hits1,
              "hits5": counts.hits5, "images": counts.images, "bad_images": counts.bad,
              "nonfinite_images": counts.nonfinite, **asdict(protocol),
              "crop": protocol.crop, "interval": sampling_interval(counts.acc1, counts.images),
              "departures": explain_difference(protocol, counts, published.input_size if published else None)}
    if predictions is not None:
        result |= metrics(predictions, protocol.num_classes)
    if published is not None:
        said = verdict(counts, protocol, published.top1, published.input_size, published.classes)
        if said is not None:
            figures = {"top1": published.top1, "top5": published.top5, "source": "OpenMMLab",
                       "authors_top1": published.authors_top1}
            result |= {"published": figures, "verdict": said.word, "verdict_line": said.line,
                       "difference": said.difference}
    return result


def summary_line(result: dict) -> str:
    """The last line of an evaluation: the verdict, or top-1, top-5, loss and the count where nothing is published."""
    return result.get("verdict_line") or (
        f"top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f}, loss {result['loss']:.4f} "
        f"({result['hits1']} of {result['images']} pictures right; sampling interval ±{result['interval']:.2f})")


def write_eval_json(path: str | Path, results: list[dict] | dict) -> dict:
    """Write one or several results atomically: the first at the top level, all of them under `results` when several."""
    several = [results] if isinstance(results, dict) else list(results)
    document = dict(several[0]) if len(several) == 1 else {**several[0], "results": several}
    write_json(path, document)
    return document


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """predictions.npz: path, label, top5, probabilities, nll, classes. Plain arrays, readable without pickle."""
    arrays = {"path": np.asarray(predictions.paths, dtype=np.str_), "label": predictions.labels,
              "top5": predictions.top5, "probabilities": predictions.probabilities.astype(np.float32),
              "nll": predictions.nll.astype(np.float32), "classes": np.asarray(predictions.classes, dtype=np.str_)}
    packed = io.BytesIO()  # the zip writer seeks, an atomic hashing write does not
    np.savez_compressed(packed, **arrays)
    atomic_write(path, lambda file: file.write(packed.getbuffer()))


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote. Raises UserError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Predictions(file["path"], file["label"], file["top5"], file["probabilities"], file["nll"],
                               file["classes"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a predictions.npz of this project ({error}): make one with "
                        "--eval true --report DIR") from error


def per_class_csv(predictions: Predictions, names: list[str] | None = None) -> str:
    """A table with one row per class: index, class, name, pictures, hits, accuracies, most frequent mistake."""
    classes = predictions.classes
    pairs = confusion_pairs(predictions.labels, predictions.top5[:, 0])
    usual = {true: (wrong, n) for true, wrong, n in reversed(pairs)}
    images = np.bincount(predictions.labels[predictions.labels >= 0], minlength=len(classes))
    hits1 = np.bincount(predictions.labels[predictions.hit1], minlength=len(classes))
    hits5 = np.bincount(predictions.labels[predictions.hit5], minlength=len(classes))
    rows = []
    for i, label in enumerate(classes):
        wrong, times = usual.get(i, (-1, 0))
        accuracies = [f"{100 * h[i] / images[i]:.2f}" if images[i] else "" for h in (hits1, hits5)]
        rows.append([i, label, names[i] if names else label, images[i], hits1[i], hits5[i], *accuracies,
                     classes[wrong] if wrong >= 0 else "", times])
    return _table(["index", "class", "name", "images", "hits1", "hits5", "acc1", "acc5", "most_mistaken_for", "times"],
                  rows)


def confusion_csv(predictions: Predictions) -> str:
    """The confusion pairs as a table: true class, predicted class, pictures; most frequent first."""
    names = [*predictions.classes, "unreadable"]  # the answer to a picture that could not be read is -1
    return _table(["true", "predicted", "images"],
                  ([names[true], names[said], n]
                   for true, said, n in confusion_pairs(predictions.labels, predictions.top5[:, 0])))


def _table(head: list[str], rows: Iterable[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def write_report_files(folder: str | Path, predictions: Predictions, names: list[str] | None = None) -> None:
    """What `--report DIR` leaves: predictions.npz, per_class.csv and confusion.csv."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.npz", predictions)
    write_text(folder / "per_class.csv", per_class_csv(predictions, names))
    write_text(folder / "confusion.csv", confusion_csv(predictions))
