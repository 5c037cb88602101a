"""The comparison with the published figure: its line, its word, and the reasons for a difference."""
from dataclasses import replace

import pytest

from models import zoo
from report.metrics import Counts
from report.results import Protocol, explain_difference, results_from, summary_line, verdict

PROTOCOL = Protocol(model="hornet_tiny_7x7", num_classes=1000, input_size=224)
PUBLISHED = zoo.PUBLISHED["hornet_tiny_7x7"]


def judge(hits1=41420, images=50000, published=82.84, input_size=224, bad=0, nonfinite=0, **settings):
    counts = Counts(hits1, 48120, images, 1.0, bad, nonfinite)
    return verdict(counts, replace(PROTOCOL, **settings), published, input_size)


def test_the_line_has_the_documented_form():
    assert judge().line == ("top-1 82.84 (published 82.84, difference +0.00; 50000/50000 pictures; "
                            "sampling interval ±0.33) PASS")
    assert "difference +0.00;" in judge(hits1=41419).line  # -0.002 is not printed as -0.00


@pytest.mark.parametrize("hits1, settings, word", [
    (41445, {}, "PASS"),                                 # +0.05 exactly
    (41446, {}, "CLOSE"), (41395, {}, "PASS"), (41394, {}, "CLOSE"),
    (41570, {}, "CLOSE"), (41571, {}, "FAIL"), (41270, {}, "CLOSE"), (41269, {}, "FAIL"),
    (41495, {"dtype": "bfloat16"}, "PASS"), (41496, {"dtype": "bfloat16"}, "CLOSE"),
    (41495, {"tf32": True}, "PASS"),
    (41420, {"crop_pct": 0.95}, "CLOSE"),                # right number, another protocol
    (41420, {"interpolation": "bilinear"}, "CLOSE"), (41420, {"bad": 1}, "CLOSE"), (41420, {"nonfinite": 1}, "CLOSE"),
    (41420, {"mean": (0.5, 0.5, 0.5)}, "CLOSE"),
    (41420, {"crop_pct": None}, "CLOSE"),
])
def test_pass_close_and_fail(hits1, settings, word):
    assert judge(hits1, **settings).word == word


@pytest.mark.parametrize("name", [name for name, entry in zoo.PUBLISHED.items() if entry.top1])
@pytest.mark.parametrize("hits, dtype, word", [(25, "float32", "PASS"), (26, "float32", "CLOSE"), (75, "bfloat16", "PASS"),
                                               (76, "bfloat16", "CLOSE"), (150, "float32", "CLOSE"),
                                               (151, "float32", "FAIL")])
def test_the_limits_are_exact_for_every_published_number(name, hits, dtype, word):
    published = zoo.PUBLISHED[name].top1
    for sign in (-1, 1):
        assert judge(round(published * 500) + sign * hits, published=published, dtype=dtype).word == word


def test_part_of_the_pictures_never_passes():
    said = judge(hits1=4142, images=5000)
    assert said.word == "CLOSE" and "5000/50000 pictures" in said.line and "±1.05" in said.line


def test_no_verdict_without_a_comparable_published_number():
    assert judge(published=None) is None
    assert judge(dataset="imagenet-v2") is None
    assert judge(num_classes=10) is None
    assert judge(num_classes=10459) is None
    assert verdict(Counts(1, 1, 2, 0.0), replace(PROTOCOL, input_size=384), 82.84, 224) is None


def test_at_384_the_published_protocol_warps():
    large = replace(PROTOCOL, model="hornet_large_gf_img384", input_size=384, crop_pct=None)
    whole = Counts(0, 0, 50000, 0.0)
    assert explain_difference(large, whole) == []
    assert "warp without a crop" in explain_difference(replace(large, crop_pct=1.0), whole)[0]
    assert large.crop == "warp to 384, bicubic, no crop"
    assert PROTOCOL.crop == "resize short side to 256, bicubic, centre crop 224"


def test_each_departure_is_one_sentence_naming_both_values():
    other = replace(PROTOCOL, crop_pct=0.9, interpolation="bilinear", std=(0.5, 0.5, 0.5), dtype="bfloat16", tf32=True,
                    pillow="13.0.0")
    found = explain_difference(other, Counts(0, 0, 49000, 0.0, bad=3))
    assert len(found) == 8 and all(sentence.endswith(".") for sentence in found)
    text = " ".join(found)
    for piece in ("bfloat16 instead of float32", "TF32", "49000 pictures instead of 50000", "crop_pct 0.9 instead of",
                  "bilinear instead of bicubic", "(0.5, 0.5, 0.5) instead of", "3 pictures could not be read",
                  "Pillow 13.0.0"):
        assert piece in text, piece
    assert explain_difference(PROTOCOL, Counts(0, 0, 50000, 0.0)) == []


def test_eval_json_has_the_documented_fields():
    counts = Counts(41420, 48120, 50000, 40000.0)
    result = results_from(counts, PROTOCOL, PUBLISHED)
    assert {"acc1", "acc5", "loss", "hits1", "hits5", "images", "model", "weights", "checkpoint", "input_size", "crop",
            "dtype", "tf32", "published", "verdict"} <= set(result)
    assert (result["acc1"], result["acc5"], result["loss"]) == (82.84, 96.24, 0.8)
    assert result["verdict"] == "PASS" and result["published"]["source"] == "OpenMMLab"
    assert summary_line(result).endswith("PASS")
    assert result["published"]["authors_top1"] == 82.8
    unpublished = zoo.PUBLISHED["hornet_base_gf_img384"]
    assert "verdict" not in results_from(counts, replace(PROTOCOL, input_size=384), unpublished)
    plain = results_from(counts, replace(PROTOCOL, num_classes=10), PUBLISHED)
    assert "verdict" not in plain and "published" not in plain
    assert summary_line(plain) == ("top-1 82.84, top-5 96.24, loss 0.8000 (41420 of 50000 pictures right; "
                                   "sampling interval ±0.33)")
