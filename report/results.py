"""What an evaluation found: its settings, the comparison with the published figure, and the files that keep both."""
import csv
import io
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_write, write_json, write_text
from models.zoo import Variant
from report.metrics import Counts, Predictions, confusion_pairs, metrics, sampling_interval

IMAGENET_VAL_IMAGES = 50_000
PASS_LIMIT_FLOAT32, PASS_LIMIT_REDUCED, CLOSE_LIMIT = 0.05, 0.15, 0.30  # points of top-1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED_CROP_PCT, WARP_FROM_SIZE = 224 / 256, 384  # from 384 on the published protocol warps and does not crop


@dataclass(frozen=True)
class Protocol:
    """The settings of one evaluation that its number depends on, as written into eval.json.

    `crop_pct` None means: warp to input_size x input_size without a crop. `dtype` is torch's name without the
    prefix. `dataset` is `imagenet-val` for ILSVRC2012's validation images, otherwise any name.
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
    """PASS, CLOSE or FAIL, the line that says why, and the difference in points."""
    word: str
    line: str
    difference: float


def explain_difference(protocol: Protocol, counts: Counts, published_input_size: int | None = None) -> list[str]:
    """One sentence for each setting that departs from the published protocol, with its typical effect."""
    size = published_input_size or protocol.input_size
    crop = None if size >= WARP_FROM_SIZE else PUBLISHED_CROP_PCT
    found = _precision_departures(protocol)
    if protocol.dataset != "imagenet-val":
        found.append(f"the images are {protocol.dataset}, not ImageNet-1k's validation set: the accuracies are not "
                     "comparable.")
    elif counts.images != IMAGENET_VAL_IMAGES:
        found.append(f"{counts.images} images instead of {IMAGENET_VAL_IMAGES}: chance alone moves top-1 by about "
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
            found.append(f"{number} images {what} and count as incorrect: at most "
                         f"{100 * number / max(counts.images, 1):.3f} points lower.")
    if protocol.pillow.split(".")[0].isdigit() and int(protocol.pillow.split(".")[0]) >= 13:
        found.append(f"Pillow {protocol.pillow} resizes tall images with other pixels than versions before 13: "
                     "typically under 0.05 points.")
    return found


def _precision_departures(protocol: Protocol) -> list[str]:
    found = []
    if protocol.dtype != "float32":
        found.append(f"computed in {protocol.dtype} instead of float32: typically under 0.1 points, either way.")
    if protocol.tf32:
        found.append("TF32 products instead of true float32: typically under 0.03 points, either way.")
    return found


def verdict(counts: Counts, protocol: Protocol, published: Variant | None) -> Verdict | None:
    """Compare with the published top-1; None unless model, number of classes, input size and data are the published.

    PASS: the published protocol on all 50,000 images and a difference of at most 0.05 points in float32, 0.15 in
    reduced precision. CLOSE: at most 0.30. Otherwise FAIL. The sampling interval is information and decides nothing.
    """
    if published is None or published.top1 is None or protocol.num_classes != published.classes:
        return None
    if protocol.input_size != published.input_size or protocol.dataset != "imagenet-val":
        return None
    departures = explain_difference(protocol, counts, published.input_size)
    difference = counts.acc1 - published.top1
    reduced = _precision_departures(protocol)
    limit = PASS_LIMIT_REDUCED if reduced else PASS_LIMIT_FLOAT32
    size = abs(difference) - 1e-9  # 84.37 - 84.32 is 0.050000000000011 in binary
    as_published = len(departures) == len(reduced)
    word = "PASS" if as_published and size <= limit else "CLOSE" if size <= CLOSE_LIMIT else "FAIL"
    signed = f"{round(difference, 2) + 0.0:+.2f}"  # adding zero turns -0.00 into +0.00
    line = (f"top-1 {counts.acc1:.2f} (published {published.top1:.2f}, difference {signed}; "
            f"{counts.images}/{max(counts.images, IMAGENET_VAL_IMAGES)} images; sampling interval "
            f"±{sampling_interval(counts.acc1, counts.images):.2f}) {word}")
    return Verdict(word, line, difference)


def _same(a: float | None, b: float | None) -> bool:
    return a is None and b is None or (a is not None and b is not None and abs(a - b) < 1e-6)


def _crop_text(crop_pct: float | None) -> str:
    return "warp without a crop" if crop_pct is None else f"crop_pct {crop_pct:g}"


def results_from(counts: Counts, protocol: Protocol, published: Variant | None = None,
                 predictions: Predictions | None = None) -> dict:
    """The dictionary written as eval.json; `published`: the model's entry of `models.zoo.PUBLISHED`."""
    result = {"acc1": counts.acc1, "acc5": counts.acc5, "loss": counts.loss, "hits1": counts.hits1,
              "hits5": counts.hits5, "images": counts.images, "bad_images": counts.bad,
              "nonfinite_images": counts.nonfinite, **asdict(protocol),
              "crop": protocol.crop, "interval": sampling_interval(counts.acc1, counts.images),
              "departures": explain_difference(protocol, counts, published.input_size if published else None)}
    if predictions is not None:
        result |= metrics(predictions, protocol.num_classes)
    found = verdict(counts, protocol, published)
    if published is not None and found is not None:
        figures = {"top1": published.top1, "top5": published.top5, "source": "OpenMMLab",
                   "authors_top1": published.authors_top1}
        result |= {"published": figures, "verdict": found.word, "verdict_line": found.line,
                   "difference": found.difference}
    return result


def summary_line(result: dict) -> str:
    """The last line of an evaluation: the verdict, or top-1, top-5, loss and the count where nothing is published."""
    return result.get("verdict_line") or (
        f"top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f}, loss {result['loss']:.4f} "
        f"({result['hits1']} of {result['images']} images correct; sampling interval ±{result['interval']:.2f})")


# ------------------------------------------------------------------------------------------------------------- files

def write_eval_json(path: str | Path, results: list[dict]) -> None:
    """Write one or several results atomically: the first at the top level, all of them under `results` when several."""
    write_json(path, results[0] if len(results) == 1 else {**results[0], "results": results})


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
                        "--eval true --report DIR", code="unreadable_predictions") from error


@dataclass(frozen=True)
class ClassRow:
    """One class of an evaluation. Accuracies in percent, None without images; `mistaken_for` is the index of the class
    it is most often taken for, -1 where that is none, and `times` how often."""
    index: int
    images: int
    hits1: int
    hits5: int
    acc1: float | None
    acc5: float | None
    mistaken_for: int
    times: int


def per_class(predictions: Predictions) -> list[ClassRow]:
    """One row for each class, in the order of the logits."""
    count, labels = len(predictions.classes), predictions.labels
    usual = {true: (other, n) for true, other, n in reversed(confusion_pairs(labels, predictions.top5[:, 0]))}
    images = np.bincount(labels[labels >= 0], minlength=count).tolist()
    hits1 = np.bincount(labels[predictions.hit1], minlength=count).tolist()
    hits5 = np.bincount(labels[predictions.hit5], minlength=count).tolist()
    rows = []
    for i in range(count):
        acc1, acc5 = (100 * hits[i] / images[i] if images[i] else None for hits in (hits1, hits5))
        rows.append(ClassRow(i, images[i], hits1[i], hits5[i], acc1, acc5, *usual.get(i, (-1, 0))))
    return rows


def write_report_files(folder: str | Path, predictions: Predictions, titles: list[str]) -> None:
    """What `--report DIR` leaves: predictions.npz, per_class.csv (`titles`: names for people) and confusion.csv."""
    folder, names = Path(folder), [*predictions.classes, ""]
    write_predictions(folder / "predictions.npz", predictions)
    acc1, acc5 = (lambda r: "" if r.acc1 is None else f"{r.acc1:.2f}"), (lambda r: "" if r.acc5 is None else f"{r.acc5:.2f}")
    write_text(folder / "per_class.csv", _table(
        ("index", "class", "name", "images", "hits1", "hits5", "acc1", "acc5", "most_mistaken_for", "times"),
        ((r.index, names[r.index], titles[r.index], r.images, r.hits1, r.hits5, acc1(r), acc5(r),
          names[r.mistaken_for], r.times) for r in per_class(predictions))))
    names[-1] = "unreadable"  # the answer to an image that could not be read is -1
    write_text(folder / "confusion.csv", _table(
        ("true", "predicted", "images"),
        ((names[true], names[predicted], n)
         for true, predicted, n in confusion_pairs(predictions.labels, predictions.top5[:, 0]))))


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()
