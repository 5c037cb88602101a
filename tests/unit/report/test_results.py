"""The comparison with the published figure, the reasons for a difference, and the files an evaluation
leaves."""
import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from config.options import ImageSettings
from engine import EvalResult
from models import zoo
from report import results
from report.metrics import confusion_pairs
from tests.kits.errors import refused
from tests.unit.report.test_metrics import CLASSES, predictions

PROTOCOL = results.Protocol("hornet_tiny_7x7", 1000, ImageSettings())
PUBLISHED = zoo.PUBLISHED["hornet_tiny_7x7"]


def counts(hits1=0, images=50000, bad=0, nonfinite=0):
    return EvalResult("", hits1, 48120, images, bad, nonfinite, 0.8)


def settings(**changes):
    return {"images": ImageSettings(**changes)}


def judge(hits1=41420, of=50000, published=PUBLISHED, bad=0, nonfinite=0, **changes):
    return results.verdict(counts(hits1, of, bad, nonfinite), replace(PROTOCOL, **changes), published)


@pytest.mark.parametrize("hits1, changes, word", [
    (41420, settings(crop_pct=0.95), "CLOSE"),                # the published number by another protocol
    (41420, settings(imagenet_default_mean_and_std=False), "CLOSE"),
    (41420, {"bad": 1}, "CLOSE"), (41420, {"nonfinite": 1}, "CLOSE"), (4142, {"of": 5000}, "CLOSE"),
    (41495, {"tf32": True}, "PASS"), (41496, {"tf32": True}, "CLOSE"), (4142, {}, "FAIL")])
def test_pass_close_and_fail(hits1, changes, word):
    assert judge(hits1, **changes)["verdict"] == word


def test_the_limits_are_exact_for_every_published_number():
    for top1 in (entry.top1 for entry in zoo.PUBLISHED.values() if entry.top1):
        for hits, dtype, word in ((25, "float32", "PASS"), (26, "float32", "CLOSE"), (75, "bfloat16", "PASS"),
                                  (76, "bfloat16", "CLOSE"), (150, "float32", "CLOSE"), (151, "float32", "FAIL")):
            for sign in (-1, 1):
                found = judge(round(top1 * 500) + sign * hits, published=replace(PUBLISHED, top1=top1), dtype=dtype)
                assert found["verdict"] == word, (top1, hits, dtype, sign)


def test_no_verdict_without_a_comparable_published_number():
    assert judge(published=None) == {}
    assert judge(published=zoo.PUBLISHED["hornet_base_gf_img384"], **settings(input_size=384)) == {}
    for other in ({"dataset": "imagenet-v2"}, {"num_classes": 10}, {"num_classes": 10459}, settings(input_size=384)):
        assert judge(**other) == {}, other


def test_each_departure_is_one_sentence_naming_both_values():
    other = replace(PROTOCOL, dtype="bfloat16", tf32=True,
                    **settings(crop_pct=0.9, imagenet_default_mean_and_std=False))
    found = results.explain_difference(other, counts(images=49000, bad=3))
    assert len(found) == 7 and all(sentence.endswith(".") for sentence in found)
    for value in ("bfloat16", "TF32", "49000", "50000", "0.9", "0.875", "(0.5, 0.5, 0.5)"):
        assert value in " ".join(found), value
    large = results.Protocol("hornet_large_gf_img384", 1000, ImageSettings(input_size=384))  # published without a crop
    assert results.explain_difference(large, counts()) == []
    assert results.results_from(counts(), large)["crop"] == "warp to 384, bicubic, no crop"


def test_eval_json_has_the_documented_fields_and_the_lines_their_form(tmp_path):
    result = results.results_from(counts(41419), PROTOCOL, PUBLISHED)
    assert {"acc1", "acc5", "loss", "hits1", "hits5", "images", "bad_images", "nonfinite_images", "model", "num_classes",
            "weights", "checkpoint", "input_size", "crop", "crop_pct", "interpolation", "mean", "std", "dtype", "tf32",
            "dataset", "pillow", "interval", "departures", "published", "verdict", "verdict_line", "difference"} == set(result)
    assert (result["acc1"], result["acc5"], result["loss"], result["departures"]) == (82.838, 96.24, 0.8, [])
    assert result["crop"] == "resize short side to 256, bicubic, centre crop 224"
    assert result["published"] == {"top1": 82.84, "top5": 96.24, "source": "OpenMMLab", "authors_top1": 82.8}
    assert results.summary_line(result) == (  # -0.002 is not printed as -0.00
        "top-1 82.84 (published 82.84, difference +0.00; 50000/50000 images; sampling interval ±0.33) PASS")
    plain = results.results_from(counts(41420), replace(PROTOCOL, num_classes=10), PUBLISHED)
    assert "verdict" not in plain and "published" not in plain
    assert results.summary_line(plain) == ("top-1 82.84, top-5 96.24, loss 0.8000 (41420 of 50000 images correct; "
                                           "sampling interval ±0.33)")
    for found in ([plain], [plain, plain | {"weights": "model_ema"}]):
        results.write_eval_json(tmp_path / "eval.json", found)
        read = json.loads((tmp_path / "eval.json").read_text())
        assert read["weights"] == "model" and len(read.get("results", [read])) == len(found)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04broken", "pickle"])
def test_other_files_are_refused_and_nothing_is_unpickled(tmp_path, content):
    path = tmp_path / "predictions.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, path=np.array([{"a": 1}], dtype=object))
    with refused("unreadable_predictions", path):
        results.read_predictions(path)


def test_report_files_give_the_predictions_and_their_sums_with_any_name(tmp_path):
    """A class has no image, and the only one of another cannot be read."""
    odd = ["/val/ant/naïve 猫.png", "/val/bee/line\nbreak.png", "/val/cat/\udcff.png"]
    p = replace(predictions(600, correct=0.3, paths=200 * odd), classes=[*CLASSES, "gone", "empty"])
    p.labels[0], p.top5[0] = 6, -1
    results.write_report_files(tmp_path, p, [name.upper() for name in p.classes])
    back = results.read_predictions(tmp_path / "predictions.npz")
    assert back.paths.tolist() == p.paths.tolist() and back.classes == p.classes
    for name in ("labels", "top5", "probabilities", "nll"):
        np.testing.assert_array_equal(getattr(back, name), getattr(p, name))
    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert [r["class"] for r in rows] == p.classes and rows[0]["name"] == "ANT"
    for column, total in (("hits1", p.hit1.sum()), ("hits5", p.hit5.sum()), ("images", 600)):
        assert sum(int(r[column]) for r in rows) == total
    assert [r["acc1"] for r in rows[5:]] == [f"{p.hit1[5::6].sum():.2f}", "0.00", ""]
    assert (rows[6]["most_mistaken_for"], rows[6]["times"]) == ("", "1")
    true, answer, n = confusion_pairs(p.labels, p.top5[:, 0])[0]
    assert rows[true]["most_mistaken_for"] == CLASSES[answer] and rows[true]["times"] == str(n)
    incorrect = list(csv.DictReader((tmp_path / "confusion.csv").read_text().splitlines()))
    assert sum(int(r["images"]) for r in incorrect) == 600 - p.hit1.sum()
    assert {"true": "gone", "predicted": "unreadable", "images": "1"} in incorrect
