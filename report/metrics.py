"""Figures of an evaluation: accuracies, calibration, confusion, and the paired test of two evaluations.

Pure functions over plain values and NumPy arrays; nothing here knows a model, a data set or a process group.
"""
import math
from dataclasses import dataclass, field

import numpy as np

from common.errors import UserError
from common.random import numpy_generator


@dataclass(frozen=True)
class Counts:
    """Sums over pictures, as the engine's `EvalResult` has them: `images` counts every picture, the `bad` (unreadable)
    and `nonfinite` ones (logits that are no numbers) too; both kinds are never hits, and `bad` ones have no loss."""
    hits1: int
    hits5: int
    images: int
    loss_sum: float
    bad: int = 0
    nonfinite: int = 0

    @property
    def acc1(self) -> float:
        return 100.0 * self.hits1 / max(self.images, 1)

    @property
    def acc5(self) -> float:
        return 100.0 * self.hits5 / max(self.images, 1)

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.images - self.bad, 1)


@dataclass(frozen=True)
class Predictions:
    """What the model said about each of N pictures, in the data set's order.

    paths: N strings · labels int64 (N), negative where unknown · top5 int64 (N, k), best first, k <= 5, -1 for a
    picture that could not be read (its label may be negative instead) · probabilities float32 (N, k) · nll float32
    (N), the loss of each picture in nats, 0 for an unreadable one · classes: names in the order of labels and top5.
    """
    paths: np.ndarray
    labels: np.ndarray
    top5: np.ndarray
    probabilities: np.ndarray
    nll: np.ndarray
    classes: list[str] = field(default_factory=list)

    def __post_init__(self):
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
    def readable(self) -> np.ndarray:
        return (self.labels >= 0) & (self.top5[:, 0] >= 0)

    @property
    def judged(self) -> np.ndarray:
        """Readable, and with numbers for an answer (not-a-number has no order, so its top five mean nothing)."""
        return self.readable & np.isfinite(self.probabilities[:, 0])

    def counts(self) -> Counts:
        return Counts(int(self.hit1.sum()), int(self.hit5.sum()), len(self.labels),
                      float(self.nll.sum(dtype=np.float64)), int((~self.readable).sum()),
                      int((self.readable & ~self.judged).sum()))


def sampling_interval(accuracy: float, images: int) -> float:
    """Half the width, in points, of the 95 % normal interval of an accuracy in percent on `images` pictures."""
    p = accuracy / 100.0
    return 100.0 * 1.96 * math.sqrt(max(p * (1 - p), 0.0) / max(images, 1))


def per_class_accuracy(labels: np.ndarray, hits: np.ndarray, num_classes: int) -> np.ndarray:
    """Percent of hits for each class, float64 (num_classes); not-a-number for a class without pictures."""
    images = np.bincount(labels, minlength=num_classes).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100.0 * np.bincount(labels, weights=hits, minlength=num_classes) / images


def calibration_error(confidence: np.ndarray, hits: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in [0, 1] with equal-width bins (Guo et al., 2017): mean |confidence - accuracy|."""
    place = np.minimum((np.asarray(confidence, np.float64) * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=np.asarray(hits, np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / max(len(place), 1))


def metrics(predictions: Predictions, num_classes: int) -> dict:
    """The figures that need every picture's answer: mean per-class accuracy, calibration error, NLL."""
    known, judged = predictions.labels >= 0, predictions.judged  # an unreadable picture is wrong, but has no confidence
    per_class = per_class_accuracy(predictions.labels[known], predictions.hit1[known], num_classes)
    seen = np.isfinite(per_class)
    return {"mean_class_acc1": float(per_class[seen].mean()) if seen.any() else None,
            "calibration_error": calibration_error(predictions.probabilities[judged, 0], predictions.hit1[judged]),
            "nll": float(predictions.nll[judged].mean(dtype=np.float64)) if judged.any() else None,
            "classes_seen": int(seen.sum())}


def multi_label_accuracy(top5: np.ndarray, answers: list) -> dict:
    """Accuracy when a picture has several right answers (ImageNet-ReaL): pictures without any are left out.

    `answers` is, for each picture, a collection of class indices.
    """
    judged = [(row, set(right)) for row, right in zip(top5.tolist(), answers, strict=True) if len(right)]
    hits1 = sum(row[0] in right for row, right in judged)
    hits5 = sum(not right.isdisjoint(row) for row, right in judged)
    images = len(judged)
    return {"acc1": 100.0 * hits1 / max(images, 1), "acc5": 100.0 * hits5 / max(images, 1),
            "hits1": hits1, "hits5": hits5, "images": images}


def confusion_pairs(labels: np.ndarray, predicted: np.ndarray, limit: int | None = None) -> list[tuple[int, int, int]]:
    """(true class, predicted class, pictures) of the wrong answers, most frequent first, then by class."""
    wrong = (labels != predicted) & (labels >= 0)
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]], 1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))[:limit]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p value that both are equally good, from the pictures that only one of them got right."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    # Logarithms, because 2^n leaves the range of a double for the thousands of pictures of an ImageNet pair.
    log_all = math.lgamma(n + 1) - n * math.log(2)
    tail = sum(math.exp(log_all - math.lgamma(i + 1) - math.lgamma(n - i + 1)) for i in range(k + 1))
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Comparison:
    """Second minus first, in points of top-1, on the same pictures."""
    images: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float
    sentence: str


def compare(first: Predictions, second: Predictions, samples: int = 10_000) -> Comparison:
    """The paired test of two evaluations: McNemar's exact test and a 95 % bootstrap interval of the difference.

    Pictures are matched by the last two parts of their paths (class folder and file name), so that the same
    data may lie elsewhere. Raises UserError when the two have no picture in common.
    """
    place = {_picture_key(path): i for i, path in enumerate(second.paths)}
    pairs = [(i, place[k]) for i, k in enumerate(map(_picture_key, first.paths)) if k in place]
    if not pairs:
        raise UserError("the two evaluations have no picture in common: compare evaluations of the same data set")
    a, b = np.array(pairs).T
    hit_a, hit_b = first.hit1[a], second.hit1[b]
    n, only_a, only_b = len(pairs), int((hit_a & ~hit_b).sum()), int((hit_b & ~hit_a).sum())
    # A resample of pictures only changes how many of each kind are drawn: one multinomial draw per resample.
    share = np.array([only_a, only_b, n - only_a - only_b], np.float64) / n
    draws = numpy_generator(0, "bootstrap", n, only_a, only_b).multinomial(n, share, size=samples)
    low, high = np.percentile(100.0 * (draws[:, 1] - draws[:, 0]) / n, [2.5, 97.5])
    difference, p = 100.0 * (only_b - only_a) / n, mcnemar(only_a, only_b)
    sentence = _comparison_sentence(n, difference, (float(low), float(high)), p)
    return Comparison(n, difference, float(low), float(high), only_a, only_b, p, sentence)


def _picture_key(path: str) -> str:
    return "/".join(str(path).replace("\\", "/").split("/")[-2:])


def _comparison_sentence(n: int, difference: float, interval: tuple[float, float], p: float) -> str:
    if difference == 0 and p == 1.0:
        return f"Both get the same number of the {n} pictures right."
    better = "second" if difference > 0 else "first"
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    figures = (f"second minus first {difference:+.2f} points on {n} pictures, "
               f"95 % interval {interval[0]:+.2f} to {interval[1]:+.2f}, McNemar {p_text}")
    if p < 0.05:
        return f"The {better} is better, by more than chance explains ({figures})."
    return f"The two cannot be told apart on these pictures ({figures})."
