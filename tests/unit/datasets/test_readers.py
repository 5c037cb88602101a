"""The index of a data folder: kept between starts, never believed when something changed; forms are
recognised."""
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datasets import folders
from datasets.index import Index, IndexCache, Rows, Source
from datasets.readers import open_reader
from tests.kits.errors import Hostile, refused


@pytest.fixture
def root(tmp_path):
    """Empty files named like images (nothing is decoded here), written an hour ago."""
    root = tmp_path / "data"
    for name in ("b/2.JPEG", "b/10.jpg", "b/sub/x.png", "a/1.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    age(root)
    return root


def age(root, seconds=3600):
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - seconds,) * 2)


def names(reader):
    return [os.path.relpath(reader.name(i), reader.root) for i in range(len(reader))]


@pytest.fixture
def scans(monkeypatch):
    calls, scan = [], folders.scan
    monkeypatch.setattr(folders, "scan", lambda source: calls.append(source) or scan(source))
    return calls


def test_a_second_start_reads_the_cache_and_a_change_is_seen(root, scans):
    cache = IndexCache(str(root.parent / "cache"))
    (root / "a" / "words.txt").touch()
    age(root)
    first, second = open_reader(Source.of(str(root)), cache), open_reader(Source.of(str(root)), cache)
    assert len(scans) == 1 and names(first) == names(second) and np.array_equal(first.labels, second.labels)
    assert first.left_out == second.left_out == {".txt": 1}
    open_reader(Source.of(str(root)), IndexCache(cache.folder, reindex=True))
    assert len(scans) == 2
    (root / "b" / "sub" / "new.jpg").touch()
    assert len(open_reader(Source.of(str(root)), cache)) == 5 and len(scans) == 3
    (root / "c").mkdir()
    (root / "c" / "1.jpg").touch()
    assert open_reader(Source.of(str(root)), cache).classes == ["a", "b", "c"]


def test_a_folder_that_has_just_changed_is_not_cached(root):
    (root / "b" / "new.jpg").touch()
    open_reader(Source.of(str(root)), IndexCache(str(root.parent / "cache")))
    assert not (root.parent / "cache").exists()


def test_damaged_and_hostile_caches_are_scanned_over_and_no_pickle_is_opened(root, scans):
    cache = IndexCache(str(root.parent / "cache"))
    expected = names(open_reader(Source.of(str(root)), cache))
    file = cache.path("folders", Source.of(str(root)))
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for trial in range(30):
        damaged = bytearray(whole)
        if trial % 3:
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        else:
            damaged = damaged[:rng.integers(len(damaged))]
        file.write_bytes(bytes(damaged))
        assert names(open_reader(Source.of(str(root)), IndexCache(cache.folder, write=False))) == expected
    assert len(scans) > 15
    file.write_bytes(whole)
    index, four = Index.read(file), np.zeros(4, np.int64)
    ends, labels = index.arrays["ends"], index.arrays["labels"]
    places = {"containers": four, "offsets": four, "lengths": four}
    for change in ({"root": "/elsewhere"}, {"seen": index.seen[:1]}, {"classes": ["a"]},
                   *({"arrays": index.arrays | odd} for odd in (
                       {"stamps": index.arrays["stamps"][:2]}, {"labels": labels + 1}, {"labels": labels - 1},
                       {"labels": labels[:0]}, {"labels": labels[:3]}, {"ends": ends[::-1]}, {"blob": index.arrays["blob"][:5]},
                       *(places | odd for odd in ({"containers": four[:3]}, {"containers": four + 99}, {"offsets": four - 1},
                                                  {"offsets": four + 1}, {"lengths": four + 1}, {"lengths": four - 1}))))):
        replace(index, **change).write(file)
        scans.clear()
        assert names(open_reader(Source.of(str(root)), IndexCache(cache.folder, write=False))) == expected and scans
    file.write_bytes(pickle.dumps(Hostile(root / "executed")))
    assert names(open_reader(Source.of(str(root)), cache)) == expected and not (root / "executed").exists()


def test_the_cache_is_never_inside_the_data_and_an_unwritable_place_is_no_error(root):
    open_reader(Source.of(str(root)), IndexCache(str(root / "cache")))
    assert not (root / "cache").exists()
    (root.parent / "file").touch()
    assert len(open_reader(Source.of(str(root)), IndexCache(str(root.parent / "file" / "cache")))) == 4


@pytest.mark.parametrize("beside, word", [
    ("", ""), ("x.tar", "x.tar"), ("x.tar.gz", "x.tar.gz"), ("x/a.tar.gz", "a.tar.gz"), ("x/a/b.txt", "")])
def test_a_path_without_images_is_explained_with_what_lies_there(tmp_path, beside, word):
    if beside:
        (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / beside).touch()
    with refused("missing_data", tmp_path / "x", word):
        open_reader(Source.of(str(tmp_path / "x")), IndexCache(str(tmp_path / "cache")))


def private(work) -> int:
    """KiB that a forked process shares with nobody after `work()`."""
    here, there = os.pipe()
    if not os.fork():
        try:
            work()
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            os.write(there, b"%d" % sum(int(line.split()[1]) for line in lines if line.startswith("Private_")))
        finally:
            os._exit(0)
    os.wait()
    return int(os.read(here, 20))


def test_an_index_of_a_million_images_loads_fast_and_small_and_is_shared(tmp_path):
    count, root = 1_280_000, tmp_path / "data"
    (root / "a").mkdir(parents=True)
    age(root)
    cache, rows, source = IndexCache(str(tmp_path / "cache")), Rows(), Source.of(str(root))
    for number in range(count):
        rows.add("a", f"n01440764_{number}.JPEG")
    (tmp_path / "cache").mkdir()
    rows.index(source, "class folders", ["", "a"]).write(cache.path("folders", source))
    started = time.perf_counter()
    loaded = open_reader(source, cache)
    assert time.perf_counter() - started < 2 and len(loaded) == count
    assert sum(values.nbytes for values in loaded.index.arrays.values()) < 48e6
    assert loaded.name(count - 1).endswith("/a/n01440764_999999.JPEG")
    assert private(lambda: [None for i in range(0, count, 50) if not loaded.name(i)]) < private(lambda: None) + 2000


def test_the_order_is_by_class_stem_and_extension_and_earlier_checkpoints_keep_theirs(root):
    for name in ("c/a.png", "c/a.jpg", "c/a-1.jpg", "c/a/0.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    cache, source = IndexCache("/dev/null/none"), Source.of(str(root))
    now, before = open_reader(source, cache), open_reader(source, cache, "")
    assert names(now)[4:] == ["c/a.jpg", "c/a.png", "c/a-1.jpg", "c/a/0.jpg"]
    assert names(before)[4:] == ["c/a/0.jpg", "c/a-1.jpg", "c/a.jpg", "c/a.png"]
    assert now.order != before.order
    for wanted, found in ((now.order, now), (before.order, before), ("another", now), (None, now)):
        again = open_reader(source, cache, wanted)
        assert names(again) == names(found) and again.order == found.order
