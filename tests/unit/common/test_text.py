"""Words for people."""
from common.text import did_you_mean, plain, plural, printable


def test_odd_texts_stay_on_one_line():
    assert plain("runs/a") == "runs/a" and plain("x" * 300) == repr("x" * 77 + "...") and plain("\x07") == r"'\x07'"
    assert printable("bad\udcff\n\x07 é") == r"bad\xff\n\x07 é" and len(printable("/" + "x" * 300)) == 301


def test_near_names_and_plurals():
    assert did_you_mean("batch", ["batch_size"], "--{}") == "; did you mean --batch_size?"
    assert did_you_mean("zzz", ["epochs"]) == "" and did_you_mean("", ["a"]) == ""
    assert (plural(1, "class"), plural(2, "process"), plural(3, "retry")) == ("1 class", "2 processes", "3 retries")
