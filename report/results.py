"""What an evaluation found: its settings, the comparison with the published figure, the files of both."""
import csv
import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL

from common.errors import UserError
from common.files import atomic_write, write_json, write_text
from common.text import table
from config.options import ImageSettings
from engine import EvalResult
from models.zoo import Variant
from report.metrics import Predictions, confusion_pairs, metrics, sampling_interval

IMAGENET_VAL_IMAGES = 50_000
PASS_LIMIT_FLOAT32, PASS_LIMIT_REDUCED, CLOSE_LIMIT = 0.05, 0.15, 0.30  # points of top-1


@dataclass(frozen=True)
class Protocol:
    """The settings of one evaluation that its number depends on, as written into eval.json.

    `dtype` is torch's name without the prefix. `dataset` is `imagenet-val` for ILSVRC2012's validation
    images, otherwise any name.
    """
    model: str
    num_classes: int
    images: ImageSettings
    weights: str = "model"
    checkpoint: str = ""
    dtype: str = "float32"
    tf32: bool = False
    dataset: str = "imagenet-val"


def explain_difference(protocol: Protocol, counts: EvalResult, published_input_size: int | None = None
                       ) -> list[str]:
    """One sentence for each setting that departs from the published protocol: here, and there."""
    here = protocol.images
    there = ImageSettings(input_size=published_input_size or here.input_size)
    at_hand = IMAGENET_VAL_IMAGES if protocol.dataset == "imagenet-val" else counts.images
    settings = {
        "data": (protocol.dataset, "imagenet-val"), "images": (counts.images, at_hand),
        "unreadable images, which count as incorrect": (counts.bad, 0),
        "images with outputs that are not numbers, which count as incorrect": (counts.nonfinite, 0),
        "input size": (here.input_size, there.input_size),
        "crop_pct (none: the whole image)": (here.eval_crop_pct or "none", there.eval_crop_pct or "none"),
        "mean": (here.mean, there.mean), "standard deviation": (here.std, there.std),
        "number format": (protocol.dtype, "float32"), "TF32": (protocol.tf32, False)}
    return [f"{name}: {ours} instead of {theirs}." for name, (ours, theirs) in settings.items()
            if ours != theirs]


def verdict(counts: EvalResult, protocol: Protocol, published: Variant | None) -> dict:
    """The comparison with the published top-1, as in eval.json; empty unless model, classes, input size and
    data are the same.

    PASS: the published protocol on all 50,000 images and a difference of at most 0.05 points in float32, 0.15
    in reduced precision. CLOSE: at most 0.30. Otherwise FAIL. The sampling interval decides nothing.
    """
    here = (protocol.num_classes, protocol.images.input_size, protocol.dataset)
    if (published is None or published.top1 is None
            or here != (published.classes, published.input_size, "imagenet-val")):
        return {}
    difference = counts.acc1 - published.top1
    precise = replace(protocol, dtype="float32", tf32=False)
    limit = PASS_LIMIT_FLOAT32 if precise == protocol else PASS_LIMIT_REDUCED
    size = abs(difference) - 1e-9  # 84.37 - 84.32 is 0.050000000000011 in binary
    as_published = not explain_difference(precise, counts)
    word = "PASS" if as_published and size <= limit else "CLOSE" if size <= CLOSE_LIMIT else "FAIL"
    signed = f"{round(difference, 2) + 0.0:+.2f}"  # adding zero turns -0.00 into +0.00
    line = (f"top-1 {counts.acc1:.2f} (published {published.top1:.2f}, difference {signed}; "
            f"{counts.images}/{max(counts.images, IMAGENET_VAL_IMAGES)} images; sampling interval "
            f"±{sampling_interval(counts.acc1, counts.images):.2f}) {word}")
    figures = {"top1": published.top1, "top5": published.top5, "source": "OpenMMLab",
               "authors_top1": published.authors_top1}
    return {"published": figures, "verdict": word, "verdict_line": line, "difference": difference}


def results_from(counts: EvalResult, protocol: Protocol, published: Variant | None = None,
                 predictions: Predictions | None = None) -> dict:
    """The dictionary written as eval.json; `published`: the model's entry of `models.zoo.PUBLISHED`."""
    images, same = protocol.images, ("acc1", "acc5", "loss", "hits1", "hits5", "images")
    own = ("model", "num_classes", "weights", "checkpoint", "dtype", "tf32", "dataset")
    return {
        **{name: getattr(counts, name) for name in same}, **{name: getattr(protocol, name) for name in own},
        "bad_images": counts.bad, "nonfinite_images": counts.nonfinite, "input_size": images.input_size,
        "crop_pct": images.eval_crop_pct, "interpolation": "bicubic", "mean": images.mean, "std": images.std,
        "crop": crop_in_words(images), "interval": sampling_interval(counts.acc1, counts.images),
        "departures": explain_difference(protocol, counts, published.input_size if published else None),
        "pillow": PIL.__version__, **(metrics(predictions, protocol.num_classes) if predictions else {}),
        **verdict(counts, protocol, published)}


def crop_in_words(images: ImageSettings) -> str:
    """How evaluation makes an image as large as the network's input."""
    size, crop_pct = images.input_size, images.eval_crop_pct
    return (f"resize short side to {int(size / crop_pct)}, bicubic, centre crop {size}" if crop_pct
            else f"warp to {size}, bicubic, no crop")


def summary_line(result: dict) -> str:
    """The last line of an evaluation: the verdict, or its figures where nothing is published."""
    return result.get("verdict_line") or (
        f"top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f}, loss {result['loss']:.4f} "
        f"({result['hits1']} of {result['images']} images correct; "
        f"sampling interval ±{result['interval']:.2f})")


def suite_table(results: list[dict]) -> str:
    """The results on several sets as one table; ReaL's labels are a row of their own."""
    real = ({**result, **result["real"], "dataset": "imagenet-real"} if "real" in result else None
            for result in results)
    rows = (row for both in zip(results, real) for row in both if row)
    return table([{"set": row["dataset"], "file": Path(row["checkpoint"]).name, "weights": row["weights"],
                   "images": row["images"], "top-1": f"{row['acc1']:.2f}", "top-5": f"{row['acc5']:.2f}",
                   "±": f"{sampling_interval(row['acc1'], row['images']):.2f}"} for row in rows])


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
    atomic_write(path, lambda file: file.write(packed.getbuffer()))


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote. Raises UserError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Predictions(file["path"], file["label"], file["top5"], file["probabilities"], file["nll"],
                               file["classes"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a predictions.npz of this project ({error}): make one with "
                        "--eval true --report DIR.", code="unreadable_predictions") from error


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
    classes, names = per_class(predictions, titles), [*predictions.classes, "unreadable"]  # it is answer -1
    write_predictions(Path(folder, "predictions.npz"), predictions)
    confusions = [(names[true], names[answer], n)
                  for true, answer, n in confusion_pairs(predictions.labels, predictions.top5[:, 0])]
    for name, rows in (("per_class", [classes[0], *(row.values() for row in classes)]),
                       ("confusion", [("true", "predicted", "images"), *confusions])):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(Path(folder, f"{name}.csv"), text.getvalue())
