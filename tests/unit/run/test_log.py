"""What a person sees: console lines, a bar, one log.txt line per epoch whatever happens, incidents, one
hint."""
import json
import math
import os
import re
import sqlite3
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import main
from common.log import logger, setup_logging
from common.outcome import Outcome
from config.options import Options
from engine import Progress
from report.page import write_report
from run.log import Tracker
from tests.kits.errors import refused
from tests.kits.runs import arguments


def at(epoch=0, done=10, updates=10, **more):
    figures = dict(loss=2.5, grad_norm=1.0, lr=4e-3, min_lr=1e-3, weight_decay=0.05, images_per_second=123.4,
                   data_wait=0.02, class_acc=math.nan) | more
    return Progress(next_update=epoch * updates + done, recent_loss=2.0, seconds=float(done), nonfinite=0, sums=[],
                    outcome=Outcome.DONE, epoch=epoch, first_update=epoch * updates, figures=figures)


def tracker(folder, *, peak_rate=None, **options):
    return Tracker(folder, Options(epochs=4, **options), updates_per_epoch=10, n_parameters=99, peak_rate=peak_rate)


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_the_console_line_says_where_the_run_is_and_no_folder_means_no_file(tmp_path, logged, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t = tracker(None)
    t.resume(0)
    t.start_epoch(1)
    t.progress(at(1, done=5))
    assert logged.messages == ["epoch 2/4  update 5/10  loss 2.0000  lr 0.004  123.4 img/s  data wait 2 %  ETA 0:00:25"]
    t.write_setup("", {})
    t.incident("kind", "sentence")
    t.close()
    assert list(tmp_path.iterdir()) == []


def test_log_txt_has_one_line_per_epoch_with_the_published_keys_whatever_happens(tmp_path, logged):
    folder = tmp_path / "run"
    folder.mkdir()
    t = tracker(folder)
    t.end_epoch(at(0, class_acc=50.0), {"test_loss": 1.0, "test_acc1": 81.25, "test_acc5": 95.0}, seconds=61.0)
    assert logged.messages[-1] == "epoch 1/4 done in 0:01:01  train loss 2.5000  top-1 81.25  top-5 95.00"
    line, = log(folder)
    assert set(line) == {"train_loss", "train_lr", "train_min_lr", "train_weight_decay", "train_grad_norm",
                         "train_class_acc", "train_images_per_second", "train_data_wait", "test_loss", "test_acc1",
                         "test_acc5", "epoch", "n_parameters", "update", "seconds", "nonfinite_updates"}
    assert None not in line.values() and (line["epoch"], line["update"]) == (0, 10)
    assert list((folder / "tensorboard").iterdir())
    t.end_epoch(at(1, loss=math.nan, grad_norm=math.inf), {}, 1.0)  # JSON has no such numbers
    assert log(folder)[1]["train_loss"] is None and log(folder)[1]["train_grad_norm"] is None

    folder.rename(tmp_path / "away")  # a disk that is gone for a while
    t.end_epoch(at(2), {}, 1.0)
    t.incident("nonfinite", "The loss of update 3 is not finite.")
    assert sum("log.txt" in line or "events.jsonl" in line for line in logged.messages) == 2
    (tmp_path / "away").rename(folder)
    t.end_epoch(at(3), {}, 1.0)
    assert [line["epoch"] for line in log(folder)] == [0, 1, 2, 3]

    with open(folder / "log.txt", "a") as file:  # a crash, and a resume before what was written last
        file.write('{"epoch": 4, "trai')
    again = tracker(folder)
    again.resume(2)
    assert [line["epoch"] for line in log(folder)] == [0, 1]
    for accuracy in (12.0, 13.0):  # twice, kept once
        again.end_epoch(at(2), {"test_acc1": accuracy}, 1.0)
    assert [(line["epoch"], line.get("test_acc1")) for line in log(folder)] == [(0, 81.25), (1, None), (2, 13.0)]

    for name in ("events.jsonl", "log.txt"):  # folders in place of the records
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    again.incident("kind", "sentence")
    assert "events.jsonl" in logged.messages[-1] and "Is a directory" in logged.messages[-1]
    with refused("unreadable_file", folder / "log.txt"):
        again.resume(0)


def test_shares_of_the_time_and_of_the_peak_are_kept_and_charted_where_they_are_known(tmp_path, logged):
    t = tracker(tmp_path, peak_rate=246.8)
    for epoch in range(2):
        t.end_epoch(at(epoch, forward_share=0.25, backward_share=0.5, step_share=0.125), {}, seconds=61.0)
    t.progress(at(2, done=5))
    t.close()
    assert [(line["train_mfu"], line["train_forward_share"]) for line in log(tmp_path)] == 2 * [(0.5, 0.25)]
    assert "123.4 img/s  MFU 50 %  data wait" in logged.messages[-1]
    shown = dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)",
                            write_report(tmp_path).read_text("utf-8"), re.DOTALL))
    for title, lines in (("Share of the devices&#39; peak (MFU)", {"training"}),
                         ("Where the time goes", {"waiting for data", "forward", "backward", "update"})):
        texts = re.findall(r"<text [^>]*>([^<]*)</text>", shown[title])
        assert lines <= {*texts} and texts[:texts.index("epoch")] == ["1", "2"], title


def test_log_lines_go_above_the_bar_and_a_forked_loader_that_logs_does_not_draw_it(capfd, monkeypatch):
    setup_logging()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    t = tracker(None)
    t.start_epoch(1, first_update=4)
    t.tick()
    if (child := os.fork()) == 0:
        logger.warning("from a loader process")
        os._exit(0)
    os.waitpid(child, 0)
    t.tick()
    logger.warning("from the run")
    for _ in range(4):
        t.tick()
    t.progress(at(1))
    t.end_epoch(at(1), {"test_acc1": 5.0}, 1.0)
    t.close()
    t.close()
    before, after = capfd.readouterr().err.split("from a loader process\n")
    assert "epoch 2/4" in before and "5/10" not in after  # the bar as it was when the loader began
    assert all(words in after for words in ("\rfrom the run\n", "6/10", "10/10", "img/s"))


def test_wandb_gets_figures_and_at_the_end_the_best_and_the_last_checkpoint(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := MagicMock())  # the real package wants an account
    run = wandb.init.return_value
    run.finish.side_effect = RuntimeError("the network is gone")  # which ends no training
    argv = arguments(images, tmp_path / "run", epochs=1, wandb_ckpt="true", exp_name="first", enable_wandb="true")
    assert main.main(argv) == 0
    found = wandb.init.call_args.kwargs
    assert (found["project"], found["name"], found["dir"]) == ("hornet", "first", tmp_path / "run")
    assert any("epoch/test_acc1" in call.args[0] for call in run.log.call_args_list) and run.finish.called
    assert [Path(call.args[0]).name for call in run.log_artifact.call_args_list] == [
        "checkpoint-best.pth", "checkpoint-best-ema.pth", "checkpoint-0.pth"]


def test_trackio_keeps_the_figures_offline_and_standard_output_stays_for_results(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    t = tracker(None, track="trackio", exp_name="first", wandb_ckpt=True)
    t.end_epoch(at(0), {"test_acc1": 81.25}, 1.0)
    (tmp_path / "checkpoint-0.pth").write_bytes(b"weights")
    t.log_checkpoint(tmp_path / "checkpoint-0.pth")
    t.close()
    assert capfd.readouterr().out == ""
    with sqlite3.connect(tmp_path / "hornet.db") as database:
        ((run, step, figures),) = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert (run, step, json.loads(figures)["epoch/test_acc1"]) == ("first", 10, 81.25)
    assert any(path.read_bytes() == b"weights" for path in (tmp_path / "artifacts").rglob("*") if path.is_file())


def test_a_missing_package_is_one_line(logged, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    t = tracker(None, track="trackio")
    t.end_epoch(at(0), {}, 1.0)
    assert len([line for line in logged.messages if "pip install trackio" in line]) == 1
