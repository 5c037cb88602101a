"""Full, read-only and vanished disks: training continues and reports each time, older checkpoints stay
whole."""
import json
import shutil
import subprocess
from contextlib import suppress

import pytest
import torch

from common.ledger import Ledger
from run.state import FORMAT
from tests.kits.faults import Row, at_the_end_of_epoch, check
from tests.kits.processes import codes, wait_for
from tests.kits.runs import arguments, assert_equal_bits, now, result, start

FURTHER = "--model_ema true --model_ema_eval true --output_dir {run} --save_ckpt_num 1 --epochs"


@pytest.fixture
def small_disk(place):
    """run/ is a disk of its own with 9 MB and 60 inodes, a copy of the trained run (4.7 MB) on it."""
    place.run.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m,nr_inodes=60", "tmpfs", place.run],
                          capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    try:
        shutil.copytree(place.trained, place.run, dirs_exist_ok=True)
        yield place
    finally:
        subprocess.run(["umount", "-l", place.run], check=True)


def use_up(place, what: str) -> None:
    """Leave no room on the disk, or no inodes."""
    with suppress(OSError):
        if what == "inodes":
            for number in range(100):
                (place.run / f"ballast{number}").touch()
        with open(place.run / "ballast", "wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass


def assert_whole(place, *names: str) -> None:
    for name in names:
        assert torch.load(place.run / name, weights_only=True)["format"] in (2, FORMAT)
    assert not list(place.run.glob(".checkpoint*"))


@pytest.mark.parametrize("what, names", [("room", ("checkpoint-0.pth", "No space left on device")),
                                         ("inodes", ("all 60 inodes",))])
def test_a_full_disk_keeps_what_is_there_and_reports_each_time(small_disk, capfd, monkeypatch, what, names):
    place = small_disk
    at_the_end_of_epoch(monkeypatch, 1, lambda: use_up(place, what))
    text = check(Row("full", f"{FURTHER} 3", 1, ("checkpoint-1.pth", "checkpoint-2.pth", *names)), place, capfd)
    assert text.count("checkpoint-1.pth") == 1
    assert_whole(place, "checkpoint-0.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth")
    assert Ledger(place.run).read("status.json")["state"] == "FAILED"
    monkeypatch.undo()
    for path in place.run.glob("ballast*"):
        path.unlink()
    check(Row("freed", f"{FURTHER} 3", 0), place, capfd)
    assert_whole(place, "checkpoint-2.pth")
    assert Ledger(place.run).read("status.json")["state"] == "DONE"


def test_a_disk_too_small_is_reported_at_the_start(small_disk, capfd):
    text = check(Row("estimate", f"{FURTHER} 6 --save_ckpt_num 9", 1, ("MB", "No space left on device")),
                 small_disk, capfd)
    assert text.index("MB") < text.index("epoch 2/6")


def test_a_read_only_folder_is_refused_for_a_training_and_serves_an_evaluation(small_disk, capfd):
    subprocess.run(["mount", "-o", "remount,ro", small_disk.run], check=True)
    names = ("{run}", "Read-only file system")
    check(Row("training", f"{FURTHER} 2", "unusable_folder", ("--output_dir", *names)), small_disk, capfd)
    check(Row("beside", "--resume {run}/checkpoint-0.pth", 0, names, base="eval"), small_disk, capfd)
    check(Row("asked for", "--output_dir {run}", "unusable_folder", ("{run}",), base="eval"), small_disk, capfd)


@pytest.mark.parametrize("how", ["mv", pytest.param("rm", marks=pytest.mark.slow)])
def test_a_live_runs_folder_taken_away_harms_neither_that_run_nor_the_next_one_there(images, tmp_path, how):
    """The first goes on beside its former folder, where the second has begun from scratch: both to the same bits."""
    run, brake = tmp_path / "run", tmp_path / "brake"
    brake.touch()
    argv = arguments(images, run, save_every_minutes=1e-9)
    [first] = start(argv, tmp_path / "console1", now=str(tmp_path), brake=str(brake))
    wait_for(lambda: now(tmp_path)[1] > 2, 60)
    subprocess.run(["mv", run, tmp_path / "elsewhere"] if how == "mv" else ["rm", "-rf", run], check=True)
    brake.unlink()
    assert codes([first, *start(argv, tmp_path / "console2")]) == [0, 0], first.text()
    [beside] = tmp_path.glob("run-*")
    assert str(beside) in first.text() and "checkpoint-0.pth" in {path.name for path in run.iterdir()}
    assert_equal_bits(result(run), result(beside))
    for folder in (run, beside):
        assert json.loads((folder / "status.json").read_text())["state"] == "DONE"
        assert len({line["pid"] for line in Ledger(folder).attempts() if "pid" in line}) <= 1
