"""What a person sees: console lines, one log.txt line per epoch whatever happens, incidents, one hint."""
import json
import logging
import math
from types import SimpleNamespace

import pytest

from common.log import logger
from run.log import Plan, Tracker, WandbRun, duration


def at(epoch=0, done=10, updates=10, **more):
    values = dict(epoch=epoch, first_update=epoch * updates, next_update=epoch * updates + done, loss=2.5,
                  recent_loss=2.0, grad_norm=1.0, lr=4e-3, min_lr=1e-3, weight_decay=0.05, class_acc=None,
                  images_per_second=123.4, data_wait=0.02, seconds=float(done), loss_scale=1.0, nonfinite=0, request="")
    return SimpleNamespace(**values | more)


@pytest.fixture
def said():
    """The sentences logged during a test."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def tracker(folder, updates=10, **more):
    return Tracker(folder, Plan(epochs=4, updates_per_epoch=updates, n_parameters=99, **more), terminal=False)


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_the_console_line_says_where_the_run_is(tmp_path, said):
    t = tracker(None)
    t.start_epoch(1)
    t.progress(at(1, done=5))
    assert said == ["epoch 2/4  update 5/10  loss 2.0000  lr 0.004  123.4 img/s  data wait 2 %  ETA 25 s"]
    t.close()
    assert list(tmp_path.iterdir()) == []


def test_an_epoch_has_the_published_keys(tmp_path, said):
    t = tracker(tmp_path)
    t.start_epoch(0)
    t.end_epoch(at(0, class_acc=50.0), {"test_loss": 1.0, "test_acc1": 81.25, "test_acc5": 95.0}, seconds=61.0)
    t.close()
    (line,) = log(tmp_path)
    for key in ("train_loss", "train_lr", "train_min_lr", "train_weight_decay", "train_grad_norm", "train_class_acc",
                "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters", "update", "seconds"):
        assert line[key] is not None
    assert said[-1] == "epoch 1/4 done in 1:01 min  train loss 2.5000  top-1 81.25  top-5 95.00"
    assert list((tmp_path / "tensorboard").iterdir())


def test_each_epoch_stands_once_after_a_crash_and_a_resume(tmp_path):
    t = tracker(tmp_path)
    t.go_on(0)
    for epoch in range(3):
        t.end_epoch(at(epoch), {"test_acc1": float(epoch)})
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 3, "trai')
    again = tracker(tmp_path)
    again.go_on(2)
    assert [line["epoch"] for line in log(tmp_path)] == [0, 1]
    for epoch in (2, 3):
        again.end_epoch(at(epoch), {"test_acc1": 10.0 + epoch})
    again.end_epoch(at(3), {"test_acc1": 14.0})  # said twice, kept once
    assert [(line["epoch"], line["test_acc1"]) for line in log(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 12.0), (3, 14.0)]
    assert again.lines == log(tmp_path)
    t.close(), again.close()


def test_undefined_values_are_null_and_said(tmp_path, said):
    t = tracker(tmp_path)
    t.end_epoch(at(0, loss=math.nan, grad_norm=math.inf), {})
    assert log(tmp_path)[0]["train_loss"] is None and log(tmp_path)[0]["train_grad_norm"] is None
    assert "train loss nan" in said[-1]
    t.close()


def test_a_disk_without_room_costs_no_line(tmp_path, said):
    folder = tmp_path / "run"
    folder.mkdir()
    t = tracker(folder)
    folder.rename(tmp_path / "away")
    t.end_epoch(at(0), {})
    t.incident("nonfinite", "The loss of update 3 is not finite.")
    assert any("log.txt was not written" in line for line in said)
    (tmp_path / "away").rename(folder)
    t.end_epoch(at(1), {})
    assert [line["epoch"] for line in log(folder)] == [0, 1]
    t.close()


@pytest.mark.parametrize("workers, cpus, words", [(2, 8, "--num_workers 8"), (8, 8, "all CPUs load pictures")])
def test_waiting_for_data_gives_one_hint_naming_the_change(tmp_path, said, workers, cpus, words):
    t = tracker(tmp_path, updates=1000, num_workers=workers, cpus=cpus)
    for done in range(10, 400, 10):
        t.progress(at(0, done=done, updates=1000, data_wait=0.3))
    hints = [line for line in said if "waiting for data" in line]
    assert len(hints) == 1 and words in hints[0] and "30 % of the last" in hints[0]
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["kind"] == "data_wait" and event["update"] == 110
    t.close()


def test_a_slow_start_alone_gives_no_hint(said):
    t = tracker(None, updates=1000)
    for done in range(10, 400, 10):  # 5 s for the first batch, none after it
        t.progress(at(0, done=done, updates=1000, seconds=5.0 + done, data_wait=5.0 / (5.0 + done)))
    assert not any("waiting for data" in line for line in said)


def test_a_terminal_gets_a_bar(capsys):
    t = Tracker(None, Plan(epochs=4, updates_per_epoch=10), terminal=True)
    t.start_epoch(1, first_update=4)
    for _ in range(6):
        t.tick()
    t.progress(at(1))
    t.end_epoch(at(1), {"test_acc1": 5.0})
    t.close()
    t.close()
    shown = capsys.readouterr().err
    assert "epoch 2/4" in shown and "4/10" in shown and "img/s" in shown


def test_the_setup_is_written(tmp_path):
    t = tracker(tmp_path)
    t.write_setup("lr: 0.004  # default\n", code_paths={"filter": "fft"})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["code_paths"] == {"filter": "fft"}
    assert (tmp_path / "config.yaml").read_text().startswith("lr:")
    t.close()


def test_missing_wandb_is_one_line(said):
    try:
        import wandb  # noqa: F401
        pytest.skip("wandb is installed here")
    except ImportError:
        pass
    t = Tracker(None, Plan(1, 1), wandb=WandbRun("hornet", "default", {}), terminal=False)
    t.end_epoch(at(0), {})
    assert len([line for line in said if "pip install wandb" in line]) == 1
    t.close()


def test_durations():
    assert [duration(s) for s in (0.4, 59, 61, 3600 * 3 + 120, 86400 * 2 + 3600 * 3 + 240, math.inf)] == [
        "0 s", "59 s", "1:01 min", "3:02 h", "2 d 03:04 h", "unknown"]
