"""Figures from the answer for every image, against loops and closed forms, and the paired test of two
evaluations."""
import numpy as np
import pytest
from scipy.stats import binomtest

from report.metrics import Predictions, calibration_error, compare, confusion_pairs, metrics

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def predictions(n=200, seed=0, correct=0.7, paths=None):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    top5 = np.argsort(rng.random((n, len(CLASSES))), axis=1)[:, :5].astype(np.int64)
    for i in np.flatnonzero(rng.random(n) < correct):
        top5[i] = [labels[i], *[c for c in top5[i] if c != labels[i]][:4]]
    probabilities = np.sort(rng.dirichlet(np.ones(6), n).astype(np.float32), axis=1)[:, ::-1][:, :5]
    paths = np.array(paths or [f"/data/val/{CLASSES[c]}/{i}.png" for i, c in enumerate(labels)])
    return Predictions(paths, labels, top5, probabilities, rng.random(n).astype(np.float32), CLASSES)


def test_unlabelled_unreadable_and_undefined_answers_are_never_hits():
    top5 = np.array([[-1] * 5, [0, 1, 2, 3, 4], [-1] * 5, [0, 1, 2, 3, 4]])
    shares = np.array([[0.5] * 5] * 3 + [[np.nan] * 5])
    p = Predictions(np.array(list("abcd")), np.array([-1, -1, 2, 0]), top5, shares, np.zeros(4), CLASSES)
    assert not p.hit1.any() and not p.hit5.any()
    assert not p.judged.any()
    found = metrics(p, 6)
    assert found["mean_class_acc1"] == 0.0 and found["nll"] is None  # incorrect, and the confidence is unknown


def test_mean_class_accuracy_leaves_out_classes_without_images():
    top5 = np.array([[0], [0], [1], [1]])
    p = Predictions(np.array(list("abcd")), np.array([0, 0, 0, 2]), top5, np.full((4, 1), 0.5), np.ones(4), CLASSES)
    found = metrics(p, 6)
    assert found["mean_class_acc1"] == pytest.approx((200 / 3 + 0) / 2) and found["classes_seen"] == 2
    assert metrics(predictions(correct=1.1), 6)["mean_class_acc1"] == 100.0


def test_calibration_error_of_known_cases():
    hits = np.array([True, False, True, False])
    assert calibration_error(np.full(4, 0.5), hits) == pytest.approx(0.0)
    assert calibration_error(np.full(4, 1.0), hits) == pytest.approx(0.5)
    # Two bins, each with half the images: |0.9 - 1| and |0.3 - 0|, averaged.
    assert calibration_error(np.array([0.9, 0.9, 0.3, 0.3]), np.array([1, 1, 0, 0])) == pytest.approx(0.2)


def test_confusion_pairs_are_counted_and_sorted():
    labels, answers = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 2, 2])
    assert confusion_pairs(labels, answers) == [(0, 1, 2), (1, 0, 1), (1, 2, 1)]
    assert confusion_pairs(labels, labels) == []


def test_paired_comparison_matches_images_by_class_folder_and_name():
    first, second = predictions(2000, correct=0.6), predictions(2000, seed=1, correct=0.75)
    moved = Predictions(np.array([p.replace("/data/val", "/elsewhere") for p in second.paths])[::-1].copy(),
                        second.labels[::-1], second.top5[::-1], second.probabilities[::-1], second.nll[::-1], CLASSES)
    same = compare(first, second)
    assert same == compare(first, moved)
    difference = 100.0 * (second.hit1.astype(float) - first.hit1)
    assert same.difference == pytest.approx(difference.mean())
    assert same.margin == pytest.approx(1.96 * difference.std() / 2000 ** 0.5)
    worse, better = (difference < 0).sum(), (difference > 0).sum()
    assert compare(first, second, 3).p_value == 3 * binomtest(worse, worse + better).pvalue < 1e-6
    assert compare(first, first, 9).p_value == 1
    assert compare(predictions(4), predictions(4, paths=["x/1", "x/2", "x/3", "x/4"])) is None  # other data
