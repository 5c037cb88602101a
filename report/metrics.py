"""Figures of an evaluation from the answer for every image: accuracies, calibration, confusion, comparison.

Pure functions over plain values and NumPy arrays; nothing here knows a model, a data set or a process group.
"""
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Predictions:
    """A model's answers for N images, in the data set's order.

    paths: N strings · labels int64 (N), negative where unknown · top5 int64 (N, k), best first, k <= 5, -1
    for an unreadable image · probabilities float32 (N, k) · nll float32 (N), loss of each image in nats, 0
    for an unreadable one · classes: names in the order of labels and top5.
    """
    paths: np.ndarray
    labels: np.ndarray
    top5: np.ndarray
    probabilities: np.ndarray
    nll: np.ndarray
    classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lengths = {len(self.paths), len(self.labels), len(self.top5), len(self.probabilities), len(self.nll)}
        if len(lengths) != 1:
            raise ValueError(f"predictions have arrays of different lengths {sorted(lengths)}")

    @property
    def hit1(self) -> np.ndarray:
        return (self.top5[:, 0] == self.labels) & self.judged

    @property
    def hit5(self) -> np.ndarray:
        return (self.top5 == self.labels[:, None]).any(axis=1) & self.judged

    @property
    def judged(self) -> np.ndarray:
        """Readable, with numbers for an answer: not-a-number has no order, so its top five mean nothing."""
        return (self.labels >= 0) & (self.top5[:, 0] >= 0) & np.isfinite(self.probabilities[:, 0])


def sampling_interval(accuracy: float, images: int) -> float:
    """Half the width, in points, of the 95 % normal interval of an accuracy in percent on `images` images."""
    p = accuracy / 100.0
    return 100.0 * 1.96 * math.sqrt(max(p * (1 - p), 0.0) / max(images, 1))


def calibration_error(confidence: np.ndarray, hits: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in [0, 1] with equal-width bins (Guo et al., 2017)."""
    chosen = np.minimum((np.asarray(confidence, np.float64) * bins).astype(int), bins - 1)
    gap = np.bincount(chosen, weights=np.asarray(hits, np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / max(len(chosen), 1))


def metrics(predictions: Predictions, num_classes: int) -> dict:
    """The figures that need every image's answer: mean per-class accuracy (over classes with images),
    calibration error, NLL. An unreadable image is incorrect, but has no confidence."""
    known, judged = predictions.labels >= 0, predictions.judged
    labels, hits = predictions.labels[known], predictions.hit1[known]
    images = np.bincount(labels, minlength=num_classes)
    seen = images > 0
    per_class = 100.0 * np.bincount(labels, weights=hits, minlength=num_classes)[seen] / images[seen]
    confidence = predictions.probabilities[judged, 0]
    return {"mean_class_acc1": float(per_class.mean()) if seen.any() else None,
            "calibration_error": calibration_error(confidence, predictions.hit1[judged]),
            "nll": float(predictions.nll[judged].mean(dtype=np.float64)) if judged.any() else None,
            "classes_seen": int(seen.sum())}


def multi_label_accuracy(top5: np.ndarray, answers: Sequence[Collection[int]]) -> dict:
    """Accuracy when an image has several correct answers (ImageNet-ReaL): images without any are left out.

    `answers` is, for each image, a collection of class indices.
    """
    judged = [(row, set(known)) for row, known in zip(top5.tolist(), answers, strict=True) if len(known)]
    hits1 = sum(row[0] in known for row, known in judged)
    hits5 = sum(not known.isdisjoint(row) for row, known in judged)
    images = len(judged)
    return {"acc1": 100.0 * hits1 / max(images, 1), "acc5": 100.0 * hits5 / max(images, 1),
            "hits1": hits1, "hits5": hits5, "images": images}


def confusion_pairs(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the incorrect answers, most frequent first, then by class."""
    incorrect = (labels != predicted) & (labels >= 0)
    wanted = np.stack([labels[incorrect], predicted[incorrect]], 1)
    pairs, counts = np.unique(wanted, axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


@dataclass(frozen=True)
class Comparison:
    """Second minus first, in points of top-1, on the same images: the margin of its 95 % interval, and the p
    value of the hypothesis that both are equally good."""
    images: int
    difference: float
    margin: float
    p_value: float


def compare(first: Predictions, second: Predictions, tests: int = 1) -> Comparison | None:
    """McNemar's exact test of two evaluations, None when they have no image in common; the p value is
    multiplied by the number of `tests` that are made (Bonferroni).

    Images are matched by the last two parts of their paths (class folder and file name), so that the same
    data may lie elsewhere.
    """
    from scipy.stats import binomtest  # takes a second to import

    keys = [np.array([image_key(path) for path in each.paths]) for each in (first, second)]
    common, a, b = np.intersect1d(keys[0], keys[1], return_indices=True)
    n, hit_a, hit_b = len(common), first.hit1[a], second.hit1[b]
    if not n:
        return None
    only_a, only_b = int((hit_a & ~hit_b).sum()), int((hit_b & ~hit_a).sum())
    # Each image gives -1, 0 or 1: the standard error of the mean of these.
    difference = (only_b - only_a) / n
    margin = 1.96 * math.sqrt(((only_a + only_b) / n - difference ** 2) / n)
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return Comparison(n, 100 * difference, 100 * margin, min(1.0, tests * float(p_value)))


def image_key(path: str) -> str:
    """What an image is matched by wherever the data lies: its class folder and file name."""
    return "/".join(str(path).replace("\\", "/").split("/")[-2:])
