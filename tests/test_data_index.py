"""The index of a picture folder: complete, sorted, kept between starts, never believed when something changed."""
import os
import time

import numpy as np
import pytest

from common.errors import UserError
from datasets import readers
from datasets.readers import Strings, index_folder


@pytest.fixture
def root(tmp_path):
    """Empty picture files (nothing is decoded here), written an hour ago."""
    root = tmp_path / "data"
    for name in ("b/2.JPEG", "b/10.jpg", "b/sub/x.png", "a/1.webp", "a/notes.txt", "a/.hidden/y.jpg", ".git/z.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    _age(root)
    return root


def _age(root, seconds=3600):
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - seconds,) * 2)


def _paths(index):
    return [os.path.relpath(index.path(i), index.root) for i in range(len(index))]


def test_pictures_are_listed_by_class_in_text_order(root):
    index = index_folder(str(root), cache_folder=str(root.parent / "cache"))
    assert index.classes == ["a", "b"] and index.labels.tolist() == [0, 1, 1, 1]
    assert _paths(index) == ["a/1.webp", "b/10.jpg", "b/2.JPEG", "b/sub/x.png"]


def _scans(monkeypatch):
    calls = []
    scan = readers._scan
    monkeypatch.setattr(readers, "_scan", lambda folder: calls.append(folder) or scan(folder))
    return calls


def test_a_second_start_reads_the_cache_and_a_change_is_seen(root, monkeypatch):
    cache = str(root.parent / "cache")
    calls = _scans(monkeypatch)
    first = index_folder(str(root), cache_folder=cache)
    second = index_folder(str(root), cache_folder=cache)
    assert len(calls) == 1 and _paths(first) == _paths(second) and np.array_equal(first.labels, second.labels)
    index_folder(str(root), cache_folder=cache, reindex=True)
    assert len(calls) == 2
    (root / "b" / "sub" / "new.jpg").touch()
    assert len(index_folder(str(root), cache_folder=cache)) == 5 and len(calls) == 3
    (root / "c").mkdir()
    (root / "c" / "1.jpg").touch()
    assert index_folder(str(root), cache_folder=cache).classes == ["a", "b", "c"]


def test_a_folder_that_has_just_changed_is_not_cached(root):
    (root / "b" / "new.jpg").touch()
    index_folder(str(root), cache_folder=str(root.parent / "cache"))
    assert not (root.parent / "cache").exists()


def test_damaged_caches_are_scanned_over_and_no_pickle_is_opened(root, monkeypatch):
    cache = root.parent / "cache"
    index_folder(str(root), cache_folder=str(cache))
    file, = cache.iterdir()
    whole = file.read_bytes()
    calls = _scans(monkeypatch)
    rng = np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3:
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        else:
            damaged = damaged[:rng.integers(len(damaged))]
        file.write_bytes(bytes(damaged))
        index = index_folder(str(root), cache_folder=str(cache), write_cache=False)
        assert _paths(index) == ["a/1.webp", "b/10.jpg", "b/2.JPEG", "b/sub/x.png"]
    assert len(calls) > 30
    np.savez(file, names=np.array([{"a": 1}], dtype=object))
    assert len(index_folder(str(root), cache_folder=str(cache))) == 4


def test_the_cache_is_never_inside_the_data_and_an_unwritable_place_is_no_error(root):
    index_folder(str(root), cache_folder=str(root / "cache"))
    assert not (root / "cache").exists()
    (root.parent / "file").touch()
    assert len(index_folder(str(root), cache_folder=str(root.parent / "file" / "cache"))) == 4


def test_loops_of_links_end_and_links_to_folders_are_followed(root, tmp_path):
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "here").symlink_to(".")
    (root / "loop").symlink_to("loop")
    (root / "linked").symlink_to(root / "a")
    index = index_folder(str(root), cache_folder=str(tmp_path / "cache"))
    assert index.classes == ["a", "b", "linked"] and "linked/1.webp" in _paths(index)
    assert len(index) < 40


@pytest.mark.parametrize("make, sentence", [
    (lambda root: None, "There is no folder"), (lambda root: root.write_text("x"), "There is no folder"),
    (lambda root: root.mkdir(), "holds no images"),
    (lambda root: (root / "a").mkdir(parents=True), "holds no images")])
def test_wrong_paths_are_explained(tmp_path, make, sentence):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=sentence):
        index_folder(str(tmp_path / "x"), cache_folder=str(tmp_path / "cache"))


def test_strings_in_arrays_come_back_as_they_were():
    names = ["", "a", "ü" * 9, "caf\udce9", "x/y z.jpg", ""]
    strings = Strings.of(names)
    assert [strings[i] for i in range(len(strings))] == names
    assert len(Strings.of([])) == 0


def test_an_index_of_a_million_pictures_loads_fast_and_small(tmp_path):
    count = 1_280_000
    names = Strings.of([f"n01440764_{i}.JPEG" for i in range(count)])
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").mkdir()
    _age(root)
    mtimes = np.array([os.stat(root / name).st_mtime_ns for name in ("", "a")], dtype=np.int64)
    index = readers.FolderIndex(str(root), ["a"], names, np.zeros(count, dtype=np.int32), Strings.of(["", "a"]), mtimes)
    path = readers.cache_path(str(root), str(tmp_path / "cache"))
    readers._save_cache(path, index)
    started = time.perf_counter()
    loaded = index_folder(str(root), cache_folder=str(tmp_path / "cache"))
    assert time.perf_counter() - started < 2 and len(loaded) == count
    assert loaded.names.blob.nbytes + loaded.names.ends.nbytes + loaded.labels.nbytes < 48e6
    assert loaded.path(count - 1).endswith("/a/n01440764_1279999.JPEG")
