"""Checkpoints survive what happens to them: damage, full disks, and resuming from the right one. Kills, flipped bits and
cut files are in tests/system/test_checkpoint_kill.py."""
import errno
import json
import math
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import Failure
from common.ledger import Ledger
from datasets import images
from run import checkpoint
from run.checkpoint import Checkpoints, Loaded, load, manifest, manifest_path, snapshot
from run.state import BEST, BEST_EMA
from tests.kits.errors import refused


def state(n=0.0, size=1000):
    weights = {"w": torch.full((size,), float(n)), "b": torch.ones(3) * n}
    return {"format": 3, "model": weights, "model_ema": weights, "epoch": int(n), "update": 10 * int(n)}


def saved(folder, epochs=4, **options):
    checkpoints = Checkpoints(folder, **options)
    for epoch in range(epochs):
        checkpoints.save(state(epoch), wait=True)
    assert not checkpoints.unsaved
    return checkpoints


def newest(checkpoints) -> str:
    return checkpoints.newest_valid().path.name


def test_training_waits_only_for_the_copy_with_which_a_save_shares_no_memory(tmp_path, monkeypatch):
    content, checkpoints, write = state(3), Checkpoints(tmp_path), Checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", lambda *rest: [time.sleep(1), write(checkpoints, *rest)])
    started = time.monotonic()
    checkpoints.save(content)
    assert time.monotonic() - started < 0.5
    content["model"]["w"].fill_(-1)
    checkpoints.close()
    loaded = checkpoints.newest_valid()
    assert loaded.path.name == "checkpoint-3.pth" and (loaded.state["model"]["w"] == 3).all()
    entry = json.loads((tmp_path / "checkpoint-3.pth.json").read_text())
    assert entry["size"] == loaded.path.stat().st_size and entry["epoch"] == 3 and not entry["previous"]
    assert checkpoints.due(1e-9) and not checkpoints.due(0) and not checkpoints.due(10)
    # Plain values, and views at their own size.
    copy = snapshot({"v": torch.zeros(1000)[:3], "f": np.float64(2), "p": Path("a"), "t": (1, [torch.ones(1)])})
    assert copy["v"].untyped_storage().nbytes() == 12 and type(copy["f"]) is float
    assert copy["p"] == "a" and copy["t"] == (1, [torch.ones(1)])


def test_retention_keeps_the_last_ones_every_fiftieth_and_the_best_and_at_least_two(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3, every=5)
    for epoch in range(12):
        checkpoints.save(state(epoch - 1) | {"sums": [0.0], "update": 10 * epoch + 5})
        checkpoints.save(state(epoch), {BEST: 50 + epoch} if epoch == 2 else None, wait=True)
    names = [BEST, *(f"checkpoint-{n}.pth" for n in (4, 9, 10, 11))]
    assert {path.name for path in tmp_path.iterdir()} == {*names, *(f"{name}.json" for name in names)}
    checkpoints = saved(tmp_path, 1, keep=1, every=100)
    assert [path.name for path in checkpoints.numbered()] == ["checkpoint-10.pth", "checkpoint-11.pth"]
    for path in checkpoints.numbered():
        path.unlink()
    checkpoints.save(state(4) | {"sums": [0.0], "update": 50})
    checkpoints.save(state(5), wait=True)
    assert [path.name for path in checkpoints.numbered()] == ["checkpoint-e5u50.pth", "checkpoint-5.pth"]


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {"a folder": folder, "no manifest": lambda path: manifest_path(path).unlink(),
    "a manifest of other keys": lambda path: manifest_path(path).write_text('{"sixe": 1}'),
    "a manifest that is a list": lambda path: manifest_path(path).write_text("[1]"),
    "a huge manifest": lambda path: manifest_path(path).write_bytes(b"[" * (2 << 20)),
    "a manifest that is a folder": lambda path: folder(manifest_path(path)),
    "a dangling link": lambda path: [path.unlink(), path.symlink_to(path.with_name("gone"))]}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_skipped_and_saving_goes_on(tmp_path, damage):
    checkpoints = saved(tmp_path)
    DAMAGE[damage](tmp_path / "checkpoint-3.pth")
    loaded = checkpoints.newest_valid()
    assert loaded.path.name == "checkpoint-2.pth" and (loaded.state["model"]["w"] == 2).all()
    assert checkpoints.set_aside_newer(loaded) == ["checkpoint-3.pth"]
    checkpoints.save(state(3), wait=True)
    assert not checkpoints.unsaved and newest(checkpoints) == "checkpoint-3.pth"


@pytest.mark.parametrize("where", [(checkpoint, "sha256_file"), (Ledger, "own"), (os, "listdir")], ids=str)
@pytest.mark.parametrize("failing", [2, 99])
def test_a_disk_that_does_not_answer_is_waited_for_and_nothing_older_takes_the_place(tmp_path, monkeypatch, failing, where):
    checkpoints, errors, real = saved(tmp_path, 1), [OSError(errno.EIO, "Input/output error")] * failing, getattr(*where)
    checkpoints.save(state(1), {BEST: 50.0}, wait=True)
    monkeypatch.setattr(images, "PATIENCE", 2.0 if failing == 2 else 0.1)
    monkeypatch.setattr(images, "_patience", images.PATIENCE)

    def slowly(*given):
        if errors:
            raise errors.pop()
        return real(*given)
    monkeypatch.setattr(*where, slowly)
    if failing == 2:
        assert newest(checkpoints) == "checkpoint-1.pth"
    else:
        with pytest.raises(Failure, match=f"{tmp_path}.*Input/output error"):
            checkpoints.newest_valid()
        assert Checkpoints(tmp_path).better({BEST: 1.0}) == {}  # nor anything worse


def test_when_none_is_whole_it_is_an_error_never_a_start_from_scratch(tmp_path):
    path, checkpoints = tmp_path / "checkpoint-7.pth", saved(tmp_path)
    for damaged in checkpoints.numbered():
        damaged.write_bytes(damaged.read_bytes()[:100])
    torch.save(state(7), path)  # without a manifest: it needs to be named
    with refused("no_valid_checkpoint", f"--resume {path}", "None of the 4"):
        checkpoints.resolve("")
    assert checkpoints.resolve(str(path)).state["epoch"] == 7


def test_what_resume_names(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for word in ("latest", "best", str(tmp_path)):
        with refused("no_valid_checkpoint", f"--resume {word}"):
            checkpoints.resolve(word)
    assert checkpoints.resolve("") is None is Checkpoints(tmp_path / "new").resolve("")
    checkpoints.save(state(1), {BEST: 70.0, BEST_EMA: 71.5})
    checkpoints.save(state(2), {BEST: 71.0}, wait=True)
    assert checkpoints.resolve("latest").state["epoch"] == 2
    assert Checkpoints(".").resolve(str(tmp_path)).state["epoch"] == 2
    best = checkpoints.resolve("best")
    assert best.path.name == BEST_EMA and best.state["scored"] == "model_ema" and best.state["epoch"] == 1


_replace = os.replace


def _replace_manifests_only(source, target):
    if not str(target).endswith(".json"):
        raise OSError(5, "Input/output error")
    _replace(source, target)


def test_the_best_files_on_the_disk_decide_what_is_best(tmp_path, monkeypatch):
    """A save that stops between manifest and rename, as in a crash, leaves the older file valid, and is made good by the
    next that is better than that one."""
    best, checkpoints = tmp_path / BEST, Checkpoints(tmp_path)
    checkpoints.save(state(0), checkpoints.better({BEST: 50.0, BEST_EMA: 60.0}), wait=True)
    for score in (70.0, 75.0):
        monkeypatch.setattr(os, "replace", _replace_manifests_only)
        checkpoints.save(state(1), checkpoints.better({BEST: score}), wait=True)
        assert checkpoints.unsaved
        monkeypatch.undo()
        assert load(best).state["epoch"] == 0 and manifest(best)["score"] == 50.0
    assert checkpoints.better({BEST: 49.0}) == {}
    checkpoints.save(state(2), checkpoints.better({BEST: 65.0}), wait=True)
    assert not checkpoints.unsaved and manifest(best)["score"] == 65.0
    for known in (checkpoints, again := Checkpoints(tmp_path)):
        assert known.better({BEST: 65.0, BEST_EMA: 60.5}) == {BEST_EMA: 60.5}
        assert known.better({BEST: 65.1, BEST_EMA: None}) == {BEST: 65.1}
    best.write_bytes(b"")
    assert again.better({BEST: 1.0}) == {} and Checkpoints(tmp_path).better({BEST: 1.0}) == {BEST: 1.0}


def test_resuming_from_an_older_one_sets_the_newer_aside(tmp_path):
    checkpoints = saved(tmp_path)
    loaded = load(tmp_path / "checkpoint-2.pth")
    assert checkpoints.set_aside_newer(loaded) == ["checkpoint-3.pth"]
    assert (tmp_path / "superseded-checkpoint-3.pth").exists() and newest(checkpoints) == "checkpoint-2.pth"
    (tmp_path / "superseded-checkpoint-2.pth").mkdir()
    with refused("unwritable_folder", "checkpoint-2.pth"):
        checkpoints.set_aside_newer(Loaded(tmp_path / "elsewhere" / "checkpoint-9.pth", loaded.state))


def test_leftovers_are_swept_but_none_of_an_evaluation_beside(tmp_path):
    checkpoints = saved(tmp_path, 1)
    kept = {*tmp_path.iterdir(), tmp_path / ".eval.json.12-ab.tmp", tmp_path / "notes.tmp"}
    for path in (".eval.json.12-ab.tmp", "notes.tmp", ".log.txt.12-ab.tmp", ".checkpoint-5.pth.123-abc.tmp",
                 "checkpoint-5.pth.json"):
        (tmp_path / path).touch()
    checkpoints.sweep()
    assert {*tmp_path.iterdir()} == kept


class Huge(torch.Tensor):
    def detach(self):
        raise MemoryError("out of memory")


def test_a_save_that_fails_is_reported_and_leaves_the_old_files_whole(tmp_path):
    """A write limit, infinite weights, too little memory, a vanished folder."""
    run, failures, infinite = tmp_path / "run", [], state(2)
    run.mkdir()
    checkpoints = saved(run, 2, failed=failures.append)
    checkpoints.save(state(1), {BEST: 50.0}, wait=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        checkpoints.save(state(2, size=100_000), {BEST: 60.0}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    infinite["model"]["w"][7] = math.inf
    checkpoints.save(infinite, wait=True)
    assert checkpoints.unsaved and newest(checkpoints) == "checkpoint-1.pth"
    assert load(run / BEST).state["epoch"] == 1 and not list(run.glob(".*"))
    checkpoints.save(state(1) | {"model": torch.zeros(3).as_subclass(Huge)})
    shutil.rmtree(run)
    checkpoints.save(state(1), wait=True)
    _, numbered, unfit, memory, gone = failures
    for words in ("checkpoint-2.pth", "File too large", "checkpoint-1.pth, checkpoint-best.pth"):
        assert words in numbered
    assert "tensor w of model" in unfit and "out of memory" in memory and "No such file or directory" in gone and not run.exists()
