"""Figures of an evaluation from per-picture answers, the files they are kept in, and the paired test."""
import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import engine
from common.errors import UserError
from evaluation import _predictions
from report.metrics import (
    Predictions,
    calibration_error,
    compare,
    confusion_pairs,
    mcnemar,
    metrics,
    multi_label_accuracy,
    per_class_accuracy,
)
from report.results import (
    Protocol,
    per_class_csv,
    read_predictions,
    results_from,
    write_eval_json,
    write_predictions,
    write_report_files,
)

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def predictions(n=200, seed=0, right=0.7, paths=None):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    top5 = np.argsort(rng.random((n, len(CLASSES))), axis=1)[:, :5].astype(np.int64)
    for i in np.flatnonzero(rng.random(n) < right):
        top5[i] = [labels[i], *[c for c in top5[i] if c != labels[i]][:4]]
    probabilities = np.sort(rng.dirichlet(np.ones(6), n).astype(np.float32), axis=1)[:, ::-1][:, :5]
    paths = np.array(paths or [f"/data/val/{CLASSES[c]}/{i}.png" for i, c in enumerate(labels)])
    return Predictions(paths, labels, top5, probabilities, rng.random(n).astype(np.float32), CLASSES)


def test_counts_equal_a_loop_over_the_pictures():
    p = predictions()
    counts = p.counts()
    assert counts.hits1 == sum(int(row[0] == label) for row, label in zip(p.top5, p.labels))
    assert counts.hits5 == sum(int(label in row) for row, label in zip(p.top5, p.labels))
    assert counts.images == 200 and counts.loss_sum == pytest.approx(sum(p.nll.astype(np.float64)), rel=1e-12)


def test_unlabelled_and_unreadable_pictures_are_never_hits():
    top5 = np.array([[-1] * 5, [0, 1, 2, 3, 4], [-1] * 5])
    p = Predictions(np.array(["a", "b", "c"]), np.array([-1, -1, 2]), top5, np.zeros((3, 5)), np.zeros(3), CLASSES)
    assert (p.counts().hits1, p.counts().hits5, p.counts().images, p.counts().bad) == (0, 0, 3, 3)


def test_answers_that_are_not_numbers_are_never_hits():
    shares = np.full((2, 5), np.nan, np.float32)
    top5 = np.array([[0, 1, 2, 3, 4]] * 2)
    p = Predictions(np.array(["a", "b"]), np.array([0, 1]), top5, shares, np.zeros(2), CLASSES)
    assert (p.counts().hits1, p.counts().hits5, p.counts().nonfinite) == (0, 0, 2)
    found = metrics(p, 6)
    assert found["mean_class_acc1"] == 0.0 and found["nll"] is None  # wrong, and nothing is known of its confidence


def test_predictions_of_the_engine_agree_with_its_sums():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
    images, targets = torch.randn(40, 3, 2, 2), torch.arange(40) % 6
    targets[7] = -100
    images[3] = float("nan")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    loader = [SimpleNamespace(indices=part, images=images[part], targets=targets[part]) for part in order.split(9)]
    evaluation = engine.Evaluation(lambda b: (b.images, b.targets), torch.device("cpu"), outputs=True)
    result, = engine.evaluate([("model", model)], loader, evaluation)
    val = SimpleNamespace(targets=np.arange(40) % 6, path=lambda i: f"x/{i}.png")
    p = _predictions(result, SimpleNamespace(val=val, class_names=CLASSES))
    counts = p.counts()
    assert (counts.hits1, counts.hits5, counts.images, counts.bad, counts.nonfinite) == (
        result.hits1, result.hits5, 40, 1, 1)
    assert p.paths[7] == "x/7.png" and p.labels[7] == 1 and p.top5[7, 0] == -1 and result.bad == 1 and result.nonfinite == 1
    assert results_from(result, Protocol("m", 6, 64, dataset="x"), predictions=p)["hits1"] == counts.hits1


def test_mean_class_accuracy_leaves_out_classes_without_pictures():
    labels, hits = np.array([0, 0, 0, 2]), np.array([True, True, False, False])
    found = per_class_accuracy(labels, hits, 4)
    assert found[0] == pytest.approx(200 / 3) and found[2] == 0 and np.isnan(found[[1, 3]]).all()


def test_calibration_error_of_known_cases():
    hits = np.array([True, False, True, False])
    assert calibration_error(np.full(4, 0.5), hits) == pytest.approx(0.0)
    assert calibration_error(np.full(4, 1.0), hits) == pytest.approx(0.5)
    # Two bins, each with half the pictures: |0.9 - 1| and |0.3 - 0|, averaged.
    assert calibration_error(np.array([0.9, 0.9, 0.3, 0.3]), np.array([1, 1, 0, 0])) == pytest.approx(0.2)


def test_metrics_of_a_perfect_model():
    p = predictions(right=1.1)
    found = metrics(p, len(CLASSES))
    assert found["mean_class_acc1"] == 100.0 and found["classes_seen"] == 6
    assert found["nll"] == pytest.approx(p.nll.mean())


def test_several_right_answers_and_pictures_without_any():
    top5 = np.array([[3, 1, 2, 0, 4], [3, 1, 2, 0, 4], [3, 1, 2, 0, 4]])
    found = multi_label_accuracy(top5, [[3, 5], [], [0, 5]])
    assert (found["hits1"], found["hits5"], found["images"]) == (1, 2, 2) and found["acc1"] == 50.0


def test_confusion_pairs_are_counted_and_sorted():
    labels, said = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 2, 2])
    assert confusion_pairs(labels, said) == [(0, 1, 2), (1, 0, 1), (1, 2, 1)]
    assert confusion_pairs(labels, said, limit=1) == [(0, 1, 2)]
    assert confusion_pairs(labels, labels) == []


@pytest.mark.parametrize("a, b", [(0, 0), (1, 0), (3, 9), (12, 12), (400, 470)])
def test_mcnemar_equals_the_binomial_test(a, b):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_is_finite_for_many_pictures():
    assert mcnemar(25000, 25000) == pytest.approx(1.0, abs=0.01)
    assert 0 <= mcnemar(20000, 30000) < 1e-100


def test_paired_comparison_matches_pictures_by_class_folder_and_name():
    first, second = predictions(2000, right=0.6), predictions(2000, seed=1, right=0.75)
    moved = Predictions(np.array([p.replace("/data/val", "/elsewhere") for p in second.paths])[::-1].copy(),
                        second.labels[::-1], second.top5[::-1], second.probabilities[::-1], second.nll[::-1], CLASSES)
    same, other = compare(first, second), compare(first, moved)
    assert same == other
    expected = 100 * (second.hit1.mean() - first.hit1.mean())
    assert same.difference == pytest.approx(expected) and same.low < expected < same.high
    assert same.p_value < 1e-6 and same.sentence.startswith("The second is better")
    back = compare(second, first)
    assert back.difference == pytest.approx(-expected) and back.sentence.startswith("The first is better")
    assert compare(first, first).sentence == "Both get the same number of the 2000 pictures right."


def test_bootstrap_interval_has_the_width_theory_gives():
    first, second = predictions(5000, right=0.6), predictions(5000, seed=1, right=0.6)
    found = compare(first, second)
    differences = second.hit1.astype(float) - first.hit1
    assert (found.high - found.low) / 2 == pytest.approx(196 * differences.std() / math.sqrt(5000), rel=0.05)


def test_comparison_of_different_data_is_refused():
    with pytest.raises(UserError, match="no picture in common"):
        compare(predictions(4), predictions(4, paths=["x/1", "x/2", "x/3", "x/4"]))


def test_predictions_survive_the_file_with_any_name(tmp_path):
    p = predictions(3, paths=["/val/ant/naïve 猫.png", "/val/bee/line\nbreak.png", "/val/cat/\udcff.png"])
    write_predictions(tmp_path / "predictions.npz", p)
    back = read_predictions(tmp_path / "predictions.npz")
    assert back.paths.tolist() == p.paths.tolist() and back.classes == CLASSES
    for name in ("labels", "top5", "probabilities", "nll"):
        np.testing.assert_array_equal(getattr(back, name), getattr(p, name))
    assert back.counts() == p.counts()


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04broken"])
def test_other_files_are_refused_with_a_sentence(tmp_path, content):
    (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(UserError, match="not a predictions.npz"):
        read_predictions(tmp_path / "predictions.npz")


def test_pickled_arrays_are_not_read(tmp_path):
    np.savez(tmp_path / "p.npz", path=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="not a predictions.npz"):
        read_predictions(tmp_path / "p.npz")


def test_report_files_give_the_sums_of_eval_json(tmp_path):
    p = predictions()
    protocol = Protocol("hornet_pico_7x7", num_classes=6, input_size=64, dataset="sample")
    result = results_from(p.counts(), protocol, predictions=p)
    write_report_files(tmp_path, p)
    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert [r["class"] for r in rows] == CLASSES
    for column in ("hits1", "hits5", "images"):
        assert sum(int(r[column]) for r in rows) == result[column]
    wrong = sum(int(r["images"]) for r in csv.DictReader((tmp_path / "confusion.csv").read_text().splitlines()))
    assert wrong == result["images"] - result["hits1"]
    assert read_predictions(tmp_path / "predictions.npz").counts().hits1 == result["hits1"]


def test_per_class_table_names_the_most_frequent_mistake():
    p = predictions(600, right=0.3)
    table = list(csv.DictReader(per_class_csv(p, names=[c.upper() for c in CLASSES]).splitlines()))
    true, said, n = confusion_pairs(p.labels, p.top5[:, 0])[0]
    assert table[true]["most_mistaken_for"] == CLASSES[said] and table[true]["times"] == str(n)
    assert table[0]["name"] == "ANT"


def test_several_results_keep_the_first_at_the_top(tmp_path):
    p = predictions()
    a = results_from(p.counts(), Protocol("m", 6, 64, weights="model"))
    b = results_from(p.counts(), Protocol("m", 6, 64, weights="model_ema"))
    write_eval_json(tmp_path / "eval.json", [a, b])
    read = json.loads((tmp_path / "eval.json").read_text())
    assert read["weights"] == "model" and [r["weights"] for r in read["results"]] == ["model", "model_ema"]
    write_eval_json(tmp_path / "eval.json", [a])
    assert "results" not in json.loads((tmp_path / "eval.json").read_text())
