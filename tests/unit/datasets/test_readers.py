"""Class folders are listed completely; their index is kept between starts, never believed when something
changed."""
import os
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest

from datasets import folders
from datasets.index import Index, IndexCache, Source
from tests.kits.errors import Hostile, refused
from tests.kits.forms import read


def make(root, *names):
    """Empty files (nothing is decoded here), written an hour ago."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 3600,) * 2)


@pytest.fixture
def root(tmp_path):
    make(tmp_path / "data", "b/2.JPEG", "b/10.jpg", "b/sub/x.png", "a/1.webp", ".git/z.jpg", "a/.hidden/y.jpg", "a/words.txt")
    return tmp_path / "data"


def names(reader):
    return [os.path.relpath(reader.name(i), reader.root) for i in range(len(reader))]


@pytest.fixture
def scans(monkeypatch):
    calls, scan = [], folders.scan
    monkeypatch.setattr(folders, "scan", lambda source: calls.append(source) or scan(source))
    return calls


def test_a_second_start_reads_the_cache_and_a_change_is_seen(root, scans):
    cache = IndexCache(str(root.parent / "cache"))
    first, second = read(root, cache), read(root, cache)
    assert names(first) == names(second) == ["a/1.webp", "b/10.jpg", "b/2.JPEG", "b/sub/x.png"]
    assert first.classes == ["a", "b"] and first.labels.tolist() == second.labels.tolist() == [0, 1, 1, 1]
    assert len(scans) == 1 and first.left_out == second.left_out == {".txt": 1}
    read(root, replace(cache, reindex=True))
    assert len(scans) == 2
    (root / "b" / "sub" / "new.jpg").touch()
    assert len(read(root, cache)) == len(read(root, cache)) == 5 and len(scans) == 4  # what has just changed is not kept
    make(root, "c/1.jpg")
    assert read(root, cache).classes == ["a", "b", "c"]


def test_damaged_and_hostile_caches_are_scanned_over_and_no_pickle_is_read(root, scans):
    cache = IndexCache(str(root.parent / "cache"))
    expected, reading = names(read(root, cache)), replace(cache, write=False)
    file = cache.path("folders", Source.of(str(root)))
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for trial in range(30):
        damaged = bytearray(whole)
        if trial % 3:
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        else:
            damaged = damaged[:rng.integers(len(damaged))]
        file.write_bytes(bytes(damaged))
        assert names(read(root, reading)) == expected
    assert len(scans) > 15
    file.write_bytes(whole)
    index, four = Index.read(file), np.zeros(4, np.int64)
    ends, labels, places = index.arrays["ends"], index.arrays["labels"], {"containers": four, "offsets": four, "lengths": four}
    odd = [{"stamps": index.arrays["stamps"][:2]}, {"labels": labels + 1}, {"labels": labels - 1}, {"labels": labels[:0]},
           {"labels": labels[:3]}, {"ends": ends[::-1]}, {"blob": index.arrays["blob"][:5]},
           *(places | wrong for wrong in ({"containers": four[:3]}, {"containers": four + 99}, {"offsets": four - 1},
                                          {"offsets": four + 1}, {"lengths": four + 1}, {"lengths": four - 1}))]
    for change in ({"root": "/elsewhere"}, {"seen": index.seen[:1]}, {"classes": ["a"]}, *({"arrays": index.arrays | part} for part in odd)):
        replace(index, **change).write(file)
        scans.clear()
        assert names(read(root, reading)) == expected and scans
    file.write_bytes(pickle.dumps(Hostile(root / "executed")))
    assert names(read(root, cache)) == expected and not (root / "executed").exists()


def test_the_cache_is_never_inside_the_data_and_an_unwritable_place_is_no_error(root):
    for cache in (root / "cache", root / "a" / "1.webp" / "cache"):
        assert len(read(root, IndexCache(str(cache)))) == 4 and not cache.exists()
    assert len(read(root, IndexCache("/proc/none"))) == 4


@pytest.mark.parametrize("beside, word", [
    ("", ""), ("x.tar", "x.tar"), ("x.tar.gz", "x.tar.gz"), ("x/a.tar.gz", "a.tar.gz"), ("x/a/b.txt", "")])
def test_a_path_without_images_is_explained_with_what_lies_there(tmp_path, beside, word):
    make(tmp_path, *[beside] * bool(beside))
    with refused("missing_data", tmp_path / "x", word):
        read(tmp_path / "x")


def test_the_order_is_by_class_stem_and_extension_and_earlier_checkpoints_keep_theirs(root):
    make(root, "c/a.png", "c/a.jpg", "c/a-1.jpg", "c/a/0.jpg")
    now, before = read(root), read(root, order="")
    assert names(now)[4:] == ["c/a.jpg", "c/a.png", "c/a-1.jpg", "c/a/0.jpg"]
    assert names(before)[4:] == ["c/a/0.jpg", "c/a-1.jpg", "c/a.jpg", "c/a.png"] and now.order != before.order
    for wanted, found in ((now.order, now), (before.order, before), ("another", now), (None, now)):
        again = read(root, order=wanted)
        assert names(again) == names(found) and again.order == found.order


def test_hidden_files_are_no_images_and_every_other_file_is_an_image_or_counted(tmp_path):
    make(tmp_path, "a/._1.jpg", "a/1.gif", "a/2.jfif", "a/3.TIF", "a/4.avif", "a/5.jp2", "a/notes.txt", "a/b/Makefile",
         "a/6.svg", "a/7.svg", "loose.jpg")
    reader = read(tmp_path)
    assert names(reader) == ["a/1.gif", "a/2.jfif", "a/3.TIF", "a/4.avif", "a/5.jp2"]
    assert reader.left_out == {".jpg beside the class folders": 1, ".txt": 1, ".svg": 2, "without an ending": 1}


def test_loops_of_links_end_and_links_to_folders_are_followed(root):
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "here").symlink_to(".")
    (root / "loop").symlink_to("loop")
    (root / "linked").symlink_to(root / "a")
    reader = read(root)
    assert reader.classes == ["a", "b", "linked"] and "linked/1.webp" in names(reader) and len(reader) < 40


def test_a_class_folder_that_one_may_not_read_is_one_sentence(root, monkeypatch):
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    with refused("unreadable_data", f"{root}/a"):
        read(root)
