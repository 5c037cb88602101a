"""Words for people."""
import pytest

from common.text import did_you_mean, duration, file_size, listed, plain, plural, printable, quote


@pytest.mark.parametrize("given, words", [
    (file_size(0), "0.0 MB"), (file_size(1.24e6), "1.2 MB"), (file_size(3.414e9), "3.41 GB"),
    (duration(59.6), "0:01:00"), (duration(2 * 86400 + 240), "2 days, 0:04:00"), (duration(float("nan")), "unknown"),
    (plural(1, "class"), "1 class"), (plural(2, "class"), "2 classes"), (plural(0, "image"), "0 images"),
    (plural(3, "retry"), "3 retries"), (listed(["a"]), "a"), (listed(["a", "b"]), "a or b"),
    (listed(["a", "b", "c"], "and"), "a, b and c")])
def test_words(given, words):
    assert given == words


def test_odd_texts_stay_on_one_line():
    assert quote("a\nb" + "x" * 300) == repr("a\nb" + "x" * 74 + "...") and "\n" not in quote("\n")
    assert plain("runs/a") == "runs/a" and plain("x" * 300) == quote("x" * 300) and plain("\x07") == r"'\x07'"
    assert printable("bad\udcff\n\x07 é") == r"bad\xff\n\x07 é"
    assert printable("/" + "x" * 300) == "/" + "x" * 300


def test_near_names():
    assert did_you_mean("epoch", ["epochs", "lr"], "--{}") == "; did you mean --epochs?"
    assert did_you_mean("batch", ["batch_size"]) == "; did you mean batch_size?"
    assert did_you_mean("zzz", ["epochs"]) == "" and did_you_mean("", ["a"]) == ""
