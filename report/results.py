"""What an evaluation found: its settings, the comparison with the published figure, the files of both."""
import csv
import io
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from common.errors import UserError
from common.files import atomic_write, write_json, write_text
from engine import EvalResult
from models.zoo import Variant
from report.metrics import Predictions, confusion_pairs, metrics, sampling_interval

IMAGENET_VAL_IMAGES = 50_000
PASS_LIMIT_FLOAT32, PASS_LIMIT_REDUCED, CLOSE_LIMIT = 0.05, 0.15, 0.30  # points of top-1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED_CROP_PCT, WARP_FROM_SIZE = 224 / 256, 384  # from 384 on the published protocol does not crop


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


class Verdict(NamedTuple):
    """PASS, CLOSE or FAIL, the line that gives the reason, and the difference in points."""
    word: str
    line: str
    difference: float


def explain_difference(protocol: Protocol, counts: EvalResult, published_input_size: int | None = None
                       ) -> list[str]:
    """One sentence for each setting that departs from the published protocol, with its typical effect."""
    size = published_input_size or protocol.input_size
    crop = None if size >= WARP_FROM_SIZE else PUBLISHED_CROP_PCT
    pillow = protocol.pillow.split(".")[0]
    interval, lost = sampling_interval(83.0, counts.images), 100 / max(counts.images, 1)
    cases = (
        (protocol.dataset != "imagenet-val",
         f"the images are {protocol.dataset}, not ImageNet-1k's validation set: the accuracies are not "
         "comparable."),
        (protocol.dataset == "imagenet-val" and counts.images != IMAGENET_VAL_IMAGES,
         f"{counts.images} images instead of {IMAGENET_VAL_IMAGES}: chance alone moves top-1 by about "
         f"±{interval:.2f} points."),
        (protocol.input_size != size,
         f"input size {protocol.input_size} instead of {size}: one to several points."),
        ((protocol.crop_pct is None) != (crop is None) or abs((protocol.crop_pct or 0) - (crop or 0)) > 1e-6,
         f"crop: {_crop_text(protocol.crop_pct)} instead of {_crop_text(crop)}: typically 0.1 to 0.5 points, "
         "either way."),
        (protocol.interpolation != "bicubic",
         f"interpolation {protocol.interpolation} instead of bicubic: typically 0.1 to 0.5 points lower."),
        (not np.allclose(protocol.mean, IMAGENET_MEAN, atol=1e-6),
         f"mean {tuple(protocol.mean)} instead of {IMAGENET_MEAN}: typically 0.2 to 1 point lower."),
        (not np.allclose(protocol.std, IMAGENET_STD, atol=1e-6),
         f"std {tuple(protocol.std)} instead of {IMAGENET_STD}: typically 0.2 to 1 point lower."),
        (counts.bad, f"{counts.bad} images could not be read and count as incorrect: at most "
         f"{lost * counts.bad:.3f} points lower."),
        (counts.nonfinite, f"{counts.nonfinite} images gave logits that are not numbers and count as "
         f"incorrect: at most {lost * counts.nonfinite:.3f} points lower."),
        (pillow.isdigit() and int(pillow) >= 13, f"Pillow {protocol.pillow} resizes tall images with other "
         "pixels than versions before 13: typically under 0.05 points."))
    return _precision_departures(protocol) + [sentence for departs, sentence in cases if departs]


def _precision_departures(protocol: Protocol) -> list[str]:
    cases = ((protocol.dtype != "float32",
              f"computed in {protocol.dtype} instead of float32: typically under 0.1 points, either way."),
             (protocol.tf32,
              "TF32 products instead of true float32: typically under 0.03 points, either way."))
    return [sentence for departs, sentence in cases if departs]


def _crop_text(crop_pct: float | None) -> str:
    return "warp without a crop" if crop_pct is None else f"crop_pct {crop_pct:g}"


def verdict(counts: EvalResult, protocol: Protocol, published: Variant | None) -> Verdict | None:
    """Compare with the published top-1; None unless model, classes, input size and data are the same.

    PASS: the published protocol on all 50,000 images and a difference of at most 0.05 points in float32, 0.15
    in reduced precision. CLOSE: at most 0.30. Otherwise FAIL. The sampling interval decides nothing.
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


def results_from(counts: EvalResult, protocol: Protocol, published: Variant | None = None,
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
    """The last line of an evaluation: the verdict, or its figures where nothing is published."""
    return result.get("verdict_line") or (
        f"top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f}, loss {result['loss']:.4f} "
        f"({result['hits1']} of {result['images']} images correct; "
        f"sampling interval ±{result['interval']:.2f})")


# ----------------------------------------------------------------------------------------------------- files

def write_eval_json(path: str | Path, results: list[dict]) -> None:
    """Write results atomically: the first at the top level, all of them under `results` when several."""
    write_json(path, results[0] if len(results) == 1 else {**results[0], "results": results})


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """predictions.npz: path, label, top5, probabilities, nll, classes; plain arrays, read without pickle."""
    p = predictions
    arrays = {"path": np.asarray(p.paths, dtype=np.str_), "label": p.labels, "top5": p.top5,
              "probabilities": p.probabilities.astype(np.float32), "nll": p.nll.astype(np.float32),
              "classes": np.asarray(p.classes, dtype=np.str_)}
    packed = io.BytesIO()  # the zip writer seeks, an atomic hashing write does not
    np.savez_compressed(packed, **arrays)


    def write(file: BinaryIO) -> None:
        file.write(packed.getbuffer())
    atomic_write(path, write)


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote. Raises UserError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Predictions(file["path"], file["label"], file["top5"], file["probabilities"], file["nll"],
                               file["classes"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a predictions.npz of this project ({error}): make one with "
                        "--eval true --report DIR", code="unreadable_predictions") from error


def per_class(predictions: Predictions, titles: list[str]) -> list[dict]:
    """One row for each class, in the order of the logits, with the columns of per_class.csv; accuracies in
    percent are "" without images. `titles`: names for people."""
    names, labels = [*predictions.classes, ""], predictions.labels
    pairs = confusion_pairs(labels, predictions.top5[:, 0])
    usual = {true: (names[answer], n) for true, answer, n in reversed(pairs)}  # the most frequent one last
    images, hits1, hits5 = (np.bincount(labels[chosen], minlength=len(titles)).tolist()
                            for chosen in (labels >= 0, predictions.hit1, predictions.hit5))
    rows = []
    for i, title in enumerate(titles):
        acc1, acc5 = (f"{100 * hits[i] / images[i]:.2f}" if images[i] else "" for hits in (hits1, hits5))
        mistaken, times = usual.get(i, ("", 0))
        rows.append({"index": i, "class": names[i], "name": title, "images": images[i], "hits1": hits1[i],
                     "hits5": hits5[i], "acc1": acc1, "acc5": acc5, "most_mistaken_for": mistaken,
                     "times": times})
    return rows


def write_report_files(folder: str | Path, predictions: Predictions, titles: list[str]) -> None:
    """What `--report DIR` leaves: predictions.npz, per_class.csv and confusion.csv."""
    folder, names = Path(folder), [*predictions.classes, "unreadable"]  # whose answer is -1
    write_predictions(folder / "predictions.npz", predictions)
    confusions = [{"true": names[true], "predicted": names[answer], "images": n}
                  for true, answer, n in confusion_pairs(predictions.labels, predictions.top5[:, 0])]
    for name, columns, rows in (("per_class", None, per_class(predictions, titles)),
                                ("confusion", ("true", "predicted", "images"), confusions)):
        text = io.StringIO()
        table = csv.DictWriter(text, columns or rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(folder / f"{name}.csv", text.getvalue())
