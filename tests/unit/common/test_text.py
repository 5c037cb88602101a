"""Words for people."""
import pytest

from common.text import did_you_mean, duration, file_size, listed, plain, plural, printable, quote


@pytest.mark.parametrize("size, words", [
    (0, "0.0 MB"), (1.24e6, "1.2 MB"), (12e6, "12 MB"), (3.414e9, "3.41 GB")])
def test_sizes(size, words):
    assert file_size(size) == words


@pytest.mark.parametrize("seconds, words", [
    (0.4, "0 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3600 * 4.5, "4:30 h"),
    (86400 * 2 + 3 * 3600 + 240, "2 d 03:04 h"), (float("nan"), "unknown"), (float("inf"), "unknown")])
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("count, word, words", [
    (1, "class", "1 class"), (2, "class", "2 classes"), (0, "image", "0 images"), (3, "retry", "3 retries")])
def test_plurals(count, word, words):
    assert plural(count, word) == words


def test_lists():
    assert (listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"], "and")) == ("a", "a or b", "a, b and "
                                                                                                  "c")


def test_odd_texts_stay_on_one_line():
    assert quote("a\nb" + "x" * 300) == repr("a\nb" + "x" * 74 + "...") and "\n" not in quote("\n")
    assert plain("runs/a") == "runs/a" and plain("x" * 300) == quote("x" * 300) and plain("\x07") == r"'\x07'"
    assert printable("bad\udcff\n\x07 é") == r"bad\xff\n\x07 é"
    assert printable("/" + "x" * 300) == "/" + "x" * 300


def test_near_names():
    assert did_you_mean("epoch", ["epochs", "lr"], "--{}") == "; did you mean --epochs?"
    assert did_you_mean("batch", ["batch_size"]) == "; did you mean batch_size?"
    assert did_you_mean("zzz", ["epochs"]) == "" and did_you_mean("", ["a"]) == ""
