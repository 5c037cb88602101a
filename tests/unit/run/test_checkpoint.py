"""Checkpoints survive what happens to them: damage, full disks, and going on from the right one."""
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from run.checkpoint import Checkpoints, Loaded, load, manifest, manifest_path, position, snapshot
from run.state import BEST, BEST_EMA, Best


def state(n=0.0, size=1000, **more):
    weights = OrderedDict(w=torch.full((size,), float(n)), b=torch.ones(3) * n)
    return {"format": 2, "model": weights, "model_ema": {k: v / 2 for k, v in weights.items()},
            "optimizer": {"state": {0: {"step": torch.tensor(float(n))}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "epoch": int(n), "update": 10 * int(n), "seed": 0, "best": {}, "args": {"lr": 4e-3, "model": "hornet_x"},
            "classes": ["a", "b"], **more}


def saved(folder, epochs=4, **options):
    checkpoints = Checkpoints(folder, **options)
    for epoch in range(epochs):
        checkpoints.save(state(epoch), epoch=epoch)
    assert checkpoints.close() == []
    return checkpoints


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir() if not p.name.endswith(".json"))


def test_a_save_round_trips_and_shares_no_memory(tmp_path):
    s = state(3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(s, epoch=3)
    s["model"]["w"].fill_(-1)
    checkpoints.close()
    loaded = checkpoints.newest_valid()
    assert loaded.path.name == "checkpoint-3.pth"
    assert (loaded.state["model"]["w"] == 3).all() and loaded.state["args"]["lr"] == 4e-3
    entry = json.loads((tmp_path / "checkpoint-3.pth.json").read_text())
    assert entry["size"] == loaded.path.stat().st_size and entry["epoch"] == 3 and "previous" not in entry


def test_a_state_holds_plain_values_and_views_at_their_own_size():
    flat = torch.zeros(1000)
    copy = snapshot({"v": flat[:3], "f": np.float64(2), "p": Path("a"), "t": (1, [torch.ones(1)]), "d": torch.float16})
    assert copy["v"].untyped_storage().nbytes() == 12 and type(copy["f"]) is float
    assert copy["p"] == "a" and copy["d"] == "torch.float16" and type(copy["t"]) is tuple


def test_names_are_ordered_by_numbers_not_letters(tmp_path):
    order = ["checkpoint-9.pth", "checkpoint-e10u7.pth", "checkpoint-e10u65.pth", "checkpoint-10.pth",
             "checkpoint-e11u100.pth", "checkpoint-100.pth"]
    for name in reversed(order):
        (tmp_path / name).touch()
    for other in ("checkpoint-best.pth", "checkpoint-.pth", "checkpoint-1.pth.json", "checkpoint-e1.pth", "x-1.pth"):
        (tmp_path / other).touch()
        assert position(other) is None
    assert [p.name for p in Checkpoints(tmp_path).numbered()] == order
    assert position("checkpoint-7.pth") == (7, math.inf)


def test_retention_keeps_the_last_ones_every_fiftieth_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3, every=5)
    for epoch in range(12):
        checkpoints.save(state(epoch), epoch=epoch, update=10 * epoch + 5)
        checkpoints.save(state(epoch), epoch=epoch, best={BEST: 50 + epoch} if epoch == 2 else None)
    checkpoints.close()
    assert names(tmp_path) == sorted([f"checkpoint-{n}.pth" for n in (4, 9, 10, 11)]
                                     + ["checkpoint-best.pth"])
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_two_whole_ones_stay_whatever_is_asked(tmp_path):
    checkpoints = saved(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["checkpoint-3.pth", "checkpoint-4.pth"]
    for n in (3, 4):
        (tmp_path / f"checkpoint-{n}.pth").write_bytes(b"cut short")
    checkpoints.save(state(5), epoch=5)
    checkpoints.save(state(6), epoch=6)
    checkpoints.close()
    assert {"checkpoint-5.pth", "checkpoint-6.pth"} <= set(names(tmp_path))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "text", "no manifest", "manifest flip", "folder"])
def test_a_damaged_newest_is_passed_over_with_the_reason(tmp_path, damage):
    checkpoints = saved(tmp_path)
    path = tmp_path / "checkpoint-3.pth"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage in ("truncate", "empty", "text"):
        path.write_bytes({"truncate": data[:-1], "empty": b"", "text": b"hello"}[damage])
    elif damage == "no manifest":
        manifest_path(path).unlink()
    elif damage == "manifest flip":
        manifest_path(path).write_bytes(manifest_path(path).read_bytes().replace(b'"size"', b'"sixe"'))
    else:
        path.unlink()
        path.mkdir()
    loaded = checkpoints.newest_valid()
    assert loaded.path.name == "checkpoint-2.pth" and (loaded.state["model"]["w"] == 2).all()
    if damage != "no manifest":
        with pytest.raises(UserError):
            load(path)


def test_infinite_weights_are_neither_saved_nor_taken(tmp_path):
    checkpoints = saved(tmp_path, 2)
    bad = state(2)
    bad["model"]["w"][7] = math.inf
    checkpoints.save(bad, epoch=2)
    (failure,) = checkpoints.close()
    assert "tensor w of model" in failure and checkpoints.newest_valid().path.name == "checkpoint-1.pth"
    torch.save(bad, tmp_path / "checkpoint-5.pth")
    shutil.copy(tmp_path / "checkpoint-1.pth.json", tmp_path / "checkpoint-5.pth.json")
    assert checkpoints.newest_valid().path.name == "checkpoint-1.pth"


def test_when_all_fail_it_is_an_error_never_a_fresh_start(tmp_path):
    checkpoints = saved(tmp_path)
    for path in checkpoints.numbered():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="None of the 3 checkpoints"):
        checkpoints.newest_valid()
    assert Checkpoints(tmp_path / "new").newest_valid() is None


def test_a_file_without_manifest_needs_to_be_named(tmp_path):
    torch.save(state(7), tmp_path / "checkpoint-7.pth")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="--resume .*checkpoint-7.pth"):
        checkpoints.resolve("")
    assert checkpoints.resolve(str(tmp_path / "checkpoint-7.pth")).state["epoch"] == 7
    data = bytearray((tmp_path / "checkpoint-7.pth").read_bytes())
    data[data.index(b"\0\0\xe0\x40\0\0\xe0\x40")] ^= 1
    (tmp_path / "checkpoint-7.pth").write_bytes(data)
    with pytest.raises(UserError, match="CRC"):
        checkpoints.resolve(str(tmp_path / "checkpoint-7.pth"))


def test_latest_best_and_a_path(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for word in ("latest", "best"):
        with pytest.raises(UserError, match=f"--resume {word}"):
            checkpoints.resolve(word)
    assert checkpoints.resolve("") is None
    checkpoints.save(state(1), epoch=1, best={BEST: 70.0, BEST_EMA: 71.5})
    checkpoints.save(state(2), epoch=2, best={BEST: 71.0})
    checkpoints.close()
    assert checkpoints.resolve("latest").state["epoch"] == 2
    best = checkpoints.resolve("best")
    assert best.path.name == BEST_EMA and best.state["scored"] == "model_ema" and best.state["epoch"] == 1
    assert load(tmp_path / BEST).state["scored"] == "model"


def test_the_best_files_decide_what_is_best(tmp_path):
    """A crash left them newer than the checkpoint, or a full disk older."""
    checkpoints = saved(tmp_path, 2)
    checkpoints._write(tmp_path / BEST, snapshot(state(2)), {"epoch": 2, "update": 20, "score": 80.0})  # then a crash
    for before in (70.0, 90.0):
        best = Best(before, 1, 60.0, 1)
        best.correct(checkpoints.scores())
        assert best == Best(80.0, 2, 60.0, 1)
    assert best.take(2, 79.9, 60.5) == {BEST_EMA: 60.5} and best.take(3, 80.1, 59.0) == {BEST: 80.1}


def test_a_best_that_could_not_be_saved_is_made_good_by_the_next_that_beats_the_one_on_the_disk(tmp_path, monkeypatch):
    checkpoints, best = Checkpoints(tmp_path), Best()
    checkpoints.save(state(0), epoch=0, best=best.take(0, 50.0))
    checkpoints.close()
    monkeypatch.setattr(os, "replace", _replace_manifests_only)
    checkpoints.save(state(1), epoch=1, best=best.take(1, 70.0))
    assert len(checkpoints.close()) == 2
    monkeypatch.undo()
    best.correct(checkpoints.failed_best())
    assert best.acc1 == 50.0 and checkpoints.failed_best() == {}
    checkpoints.save(state(2), epoch=2, best=best.take(2, 60.0))
    assert checkpoints.close() == [] and checkpoints.score(BEST) == 60.0


def test_a_crash_between_manifest_and_rename_keeps_the_older_file_good(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), epoch=1, best={BEST: 70.0})
    checkpoints.close()
    for score in (75.0, 76.0):
        monkeypatch.setattr(os, "replace", _replace_manifests_only)
        checkpoints.save(state(2), epoch=2, best={BEST: score})
        assert len(checkpoints.close()) == 2
        monkeypatch.undo()
        assert len(json.loads((tmp_path / "checkpoint-best.pth.json").read_text())["previous"]) >= 1
        assert checkpoints.score(BEST) == 70.0 and load(tmp_path / BEST).state["epoch"] == 1
    checkpoints.save(state(3), epoch=3, best={BEST: 77.0})
    checkpoints.close()
    assert checkpoints.score(BEST) == 77.0 and "previous" not in json.loads(manifest_path(tmp_path / BEST).read_text())


_replace = os.replace


def _replace_manifests_only(source, target):
    if not str(target).endswith(".json"):
        raise OSError(5, "Input/output error")
    _replace(source, target)


def test_going_on_from_an_older_one_sets_the_newer_aside(tmp_path):
    checkpoints = saved(tmp_path)
    loaded = load(tmp_path / "checkpoint-2.pth")
    assert checkpoints.set_aside_newer(loaded) == ["checkpoint-3.pth"]
    assert (tmp_path / "superseded-checkpoint-3.pth").exists()
    assert checkpoints.newest_valid().path.name == "checkpoint-2.pth"
    assert checkpoints.set_aside_newer(Loaded(tmp_path / "elsewhere" / "checkpoint-9.pth", loaded.state)) == [
        "checkpoint-1.pth", "checkpoint-2.pth"]


def test_leftovers_are_swept(tmp_path):
    checkpoints = saved(tmp_path, 2)
    (tmp_path / ".checkpoint-5.pth.123-abc.tmp").write_bytes(b"x")
    (tmp_path / "checkpoint-5.pth.json").write_text("{}")
    (tmp_path / "notes.tmp").touch()
    before = checkpoints.numbered()
    assert checkpoints.sweep() == 2 and checkpoints.numbered() == before and (tmp_path / "notes.tmp").exists()
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_leftovers_of_the_records_are_swept_but_none_of_an_evaluation_beside(tmp_path):
    for name in (".log.txt.12-ab.tmp", ".status.json.12-ab.tmp", ".checkpoint-1.pth.json.12-ab.tmp", ".eval.json.12-ab.tmp"):
        (tmp_path / name).touch()
    assert Checkpoints(tmp_path).sweep() == 3 and [path.name for path in tmp_path.iterdir()] == [".eval.json.12-ab.tmp"]


def test_a_write_limit_leaves_the_old_file_whole_and_training_going_on(tmp_path):
    checkpoints = saved(tmp_path, 2)
    checkpoints.save(state(1), epoch=1, best={BEST: 50.0}, wait=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        checkpoints.save(state(2, size=100_000), epoch=2, best={BEST: 60.0}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    failures = checkpoints.failures()
    assert len(failures) == 2 and checkpoints.failures() == []
    assert "checkpoint-2.pth was not saved" in failures[1] and "File too large" in failures[1]
    assert "checkpoint-1.pth, checkpoint-best.pth" in failures[1]
    assert load(tmp_path / BEST).state["epoch"] == 1 and not list(tmp_path.glob(".*"))


def test_a_vanished_folder_is_said_and_raises_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoints = saved(folder, 1)
    shutil.rmtree(folder)
    checkpoints.save(state(1), epoch=1)
    (failure,) = checkpoints.close()
    assert "No such file or directory" in failure and "folder is gone" in failure and not folder.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 2 MB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here ({done.stderr.decode().strip()}); the write limit stands in")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_then_room_again(small_disk):
    checkpoints = saved(small_disk, 2)
    (small_disk / "other").write_bytes(bytes(1_800_000))
    checkpoints.save(state(2, size=50_000), epoch=2)
    (failure,) = checkpoints.close()
    assert "No space left on device" in failure and "0.00 GB free" in failure
    assert checkpoints.newest_valid().path.name == "checkpoint-1.pth" and not list(small_disk.glob(".*"))
    assert "not be enough" in checkpoints.disk_estimate(state(2, size=50_000), 300)
    (small_disk / "other").unlink()
    checkpoints.save(state(3), epoch=3)
    assert checkpoints.close() == [] and checkpoints.newest_valid().path.name == "checkpoint-3.pth"


def test_a_read_only_disk(small_disk):
    checkpoints = saved(small_disk, 2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    checkpoints.save(state(2), epoch=2)
    (failure,) = checkpoints.close()
    assert "Read-only file system" in failure
    assert checkpoints.newest_valid().path.name == "checkpoint-1.pth"


def test_the_start_says_what_checkpoints_will_take(tmp_path):
    text = Checkpoints(tmp_path).disk_estimate(state(1, size=1_000_000), 300)
    assert "MB each" in text and "MB in all" in text and "0.00" not in text and "enough" not in text


def test_the_start_counts_the_moments_that_the_first_update_makes(tmp_path):
    weights = {"weight": torch.zeros(1_000_000)}
    fresh = {"model": weights, "model_ema": None, "optimizer": {"state": {}, "param_groups": []}}
    assert "take 12 MB each" in Checkpoints(tmp_path).disk_estimate(fresh, 300)


def test_training_waits_little_for_a_background_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    big = {"format": 2, "model": {f"w{i}": torch.randn(1_000_000) for i in range(20)}, "epoch": 0}
    started = time.monotonic()
    checkpoints.save(big, epoch=0)
    returned = time.monotonic() - started
    checkpoints.close()
    whole = time.monotonic() - started
    print(f"80 MB: training waited {returned:.3f} s of {whole:.3f} s")
    assert returned < whole and 0 < checkpoints.waited <= whole
    assert checkpoints.due(1e-9) and not checkpoints.due(0) and not checkpoints.due(10)


def test_manifest_reads_are_limited(tmp_path):
    checkpoints = saved(tmp_path, 1)
    manifest_path(tmp_path / "checkpoint-0.pth").write_bytes(b"[" * (2 << 20))
    with pytest.raises(UserError):
        manifest(tmp_path / "checkpoint-0.pth")
    assert checkpoints.score(BEST) is None


@given(st.integers(0, 10 ** 9 - 1), st.integers(0, 10 ** 9 - 1), st.integers(0, 10 ** 15 - 1))
def test_names_order_as_training_goes(first, second, update):
    early, late = sorted((first, second))
    assert position(f"checkpoint-e{early}u{update}.pth") < position(f"checkpoint-{early}.pth")
    assert position(f"checkpoint-{early}.pth") <= position(f"checkpoint-{late}.pth")
    assert early == late or position(f"checkpoint-{early}.pth") < position(f"checkpoint-e{late}u0.pth")


@given(st.one_of(st.text(), st.from_regex(r"checkpoint-[e0-9u.-]*\.pth"), st.from_regex(r"checkpoint-\d+\.pth")))
def test_other_names_never_stop_anything(name):
    place = position(name)
    assert place is None or name.isascii()


def test_no_memory_for_the_copy_is_said(tmp_path):
    class Huge(dict):
        def items(self):
            raise MemoryError("out of memory")
    checkpoints = saved(tmp_path, 1)
    checkpoints.save(Huge(), epoch=1)
    (failure,) = checkpoints.close()
    assert "out of memory" in failure and "checkpoint-0.pth" in failure
