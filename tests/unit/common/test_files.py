"""Files are whole or not there, and what is no JSON is refused in one sentence."""
import hashlib
import os

import pytest

from common.files import append_json_line, atomic_write, read_json, read_json_lines, write_json, write_text
from tests.kits.errors import refused


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path, seen = tmp_path / "a", []
    write_text(path, "old")

    def broken(file):
        file.write(b"new")
        raise RuntimeError("torch gave up")
    with pytest.raises(RuntimeError):
        atomic_write(path, broken)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    digest, size = atomic_write(path, lambda f: f.write(b"abc") and f.write(memoryview(b"def")), reserve=9999,
                                before_rename=lambda *given: seen.append((path.read_text(), *given)))
    assert path.read_bytes() == b"abcdef" and (digest, size) == (hashlib.sha256(b"abcdef").hexdigest(), 6)
    assert seen == [("old", digest, size)]
    path.with_name("b").touch()
    assert path.stat().st_mode == path.with_name("b").stat().st_mode


def test_long_and_odd_names(tmp_path):
    for name in ("n" * 250, "ü \n.txt", os.fsdecode(b"\xff\xfe")):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_json_is_refused_when_large_or_broken(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, "é"]}
    for text in ("{", "[" * 100_000, ""):
        (tmp_path / "b.json").write_text(text)
        with refused("unreadable_file", "b.json"):
            read_json(tmp_path / "b.json")
    with refused("unreadable_file", "4 bytes"):
        read_json(tmp_path / "a.json", max_bytes=4)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with refused("unreadable_file", tmp_path):
        read_json(tmp_path)


def test_a_line_cut_short_by_a_crash_costs_only_itself(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"n": 1})
    with open(path, "a") as file:
        file.write('{"n": 2, "te')
    append_json_line(path, {"n": 3, "text": "one line for JSON: \u2028 \x85 \r"})
    assert [record["n"] for record in read_json_lines(path)] == [1, 3]
