"""The report page: from a whole run folder, from log.txt alone, and of two runs; seen by a real browser."""
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from report.metrics import Predictions
from report.results import Protocol, results_from, write_eval_json, write_predictions
from report.svg import number, ticks
from tools.report import main, write_report

CLASSES = ["n01440764", "naïve <b>&", "猫"]


def log_row(epoch, **changes):
    return {"train_loss": 6.9 - 0.01 * epoch, "train_lr": 1e-3, "train_min_lr": 1e-3, "train_grad_norm": 1.0,
            "train_images_per_second": 950.0, "train_data_wait": 0.02, "test_loss": 3.0, "test_acc1": 0.2 * epoch,
            "test_acc5": 0.3 * epoch, "test_acc1_ema": 0.21 * epoch, "epoch": epoch, "update": 10 * epoch,
            "n_parameters": 22409512, "seconds": 60.0, **changes}


def write_log(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def whole_run(folder, seed=0, lr="0.004"):
    write_log(folder, [log_row(e) for e in range(300)])
    (folder / "config.yaml").write_text(f"model: 'hornet_tiny_7x7'  # flag\nlr: {lr}  # flag\nepochs: 300  # default\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.15.0", "world_size": 8}))
    (folder / "status.json").write_text(json.dumps({"state": "DONE"}))
    (folder / "events.jsonl").write_text(json.dumps({"time": "2026-01-01 00:00:00", "kind": "save_failed"}) + "\n")
    attempts = [{"attempt": 1, "started": "10:00", "from_update": 0},
                {"attempt": 1, "state": "PREEMPTED", "update": 99},
                {"attempt": 2, "started": "11:00", "from_update": 99}, {"attempt": 2, "state": "DONE", "update": 300}]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    rng = np.random.default_rng(seed)
    labels = np.arange(90) % 3
    top5 = np.stack([rng.permutation(3) for _ in labels])
    paths = [str(folder / f"p{i}.png") for i in range(90)]
    for i in np.flatnonzero(top5[:, 0] != labels):
        Image.new("RGB", (200, 100), (int(i), 50, 50)).save(paths[i])
    predictions = Predictions(np.array(paths), labels, top5, np.tile([0.6, 0.3, 0.1], (90, 1)), np.ones(90), CLASSES)
    write_predictions(folder / "predictions.npz", predictions)
    protocol = Protocol("hornet_tiny_7x7", 3, 224, dataset="mine")
    write_eval_json(folder / "eval.json", results_from(predictions.counts(), protocol, predictions=predictions))
    return folder, predictions


class Checker(HTMLParser):
    """Every opened element is closed in order, and nothing points outside the page."""
    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attributes):
        self.outside += [v for k, v in attributes if k in ("src", "href", "action") and not v.startswith("data:")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]


def check(path):
    html = path.read_text("utf-8")
    checker = Checker()
    checker.feed(html)
    assert not checker.open and not checker.outside
    assert "<script" not in html and "@import" not in html and "url(" not in html
    assert len(html) < 3e6
    return html


def test_a_whole_run_gives_one_page_with_every_section(tmp_path):
    folder, predictions = whole_run(tmp_path / "run <1>")
    html = check(write_report([folder]))
    for text in ("run &lt;1&gt;", "DONE", "59.80 %", "epoch 299", "1 × save failed", "2 attempts", "PREEMPTED", "2.15.0",
                 "tench", "naïve &lt;b&gt;&amp;", "猫", "Most confident mistakes",
                 f"{predictions.counts().hits1}</td>"):
        assert text in html, text
    assert html.count("data:image/jpeg;base64,") == 24  # thumbnails
    assert "not in the folder" not in html.lower()


def test_confusion_counts_are_those_of_the_predictions(tmp_path):
    folder, p = whole_run(tmp_path / "run")
    found = re.findall(r"taken for [^<]*?: (\d+) of (\d+)", check(write_report([folder])))
    assert sum(int(n) for n, _ in found) == 90
    assert sum(int(n) for n, _ in found[::4]) == p.counts().hits1  # the diagonal of three rows


def test_the_difference_from_the_published_recipe_is_shown(tmp_path):
    folder, _ = whole_run(tmp_path / "run", lr="0.001")
    html = check(write_report([folder]))
    row = re.search(r"<tr class=changed><td>lr</td><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td>", html)
    assert row and float(row[1]) == 0.001 and row[2] == "flag" and float(row[3]) == 0.004


def test_log_alone_is_enough_for_curves_and_the_rest_is_named(tmp_path):
    write_log(tmp_path / "run", [log_row(e) for e in range(300)])
    for given in (tmp_path / "run", tmp_path / "run" / "log.txt"):
        html = check(write_report([given], tmp_path / "page.html"))
        assert html.count('<path d="M') >= 6
        for text in ("No eval.json", "No record of incidents", "No predictions.npz", "No config.yaml",
                     "No environment.json"):
            assert text in html


def test_a_log_with_broken_lines_repeats_and_missing_numbers(tmp_path):
    rows = [log_row(0), log_row(1, test_acc1=99.0), log_row(1, test_acc1=12.5), log_row(2, train_loss=math.nan)]
    folder = write_log(tmp_path / "run", rows)
    with open(folder / "log.txt", "a") as file:
        file.write('{"train_loss": 1.0, "epo\n\n[1, 2]\n' + json.dumps({"epoch": 3, "train_loss": None}) + "\n")
    html = check(write_report([folder]))
    assert "2 lines of log.txt could not be read" in html
    assert "12.50 %" in html and "99.00 %" not in html  # the repeated epoch counts once, as it ended


def test_two_runs_side_by_side(tmp_path):
    whole_run(tmp_path / "a", seed=0)
    whole_run(tmp_path / "b", seed=1, lr="0.002")
    for folder in ("a", "b"):  # the same pictures, in two folders of one name
        p = np.load(tmp_path / folder / "predictions.npz")
        arrays = {k: p[k] for k in p.files} | {"path": np.array([f"val/x/p{i}.png" for i in range(90)])}
        np.savez(tmp_path / folder / "predictions.npz", **arrays)
    html = check(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "two.html"))
    assert "Side by side" in html and "McNemar p" in html and "a: EMA" in html and "b: EMA" in html
    assert re.search(r"<td>lr</td><td>0.004</td><td>0.002</td>", html)


def test_the_differences_of_the_figures_are_those_of_the_values(tmp_path):
    """Not of what was rounded for the page: 51.388 - 79.444 is -28.06, and 51.39 - 79.44 would be -28.05."""
    for name, accuracy, seconds in (("a", 100 * 286 / 360, 7000.0), ("b", 100 * 185 / 360, 7300.0)):
        write_log(tmp_path / name, [log_row(0, test_acc1=accuracy, seconds=seconds)])
    html = check(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "two.html"))
    assert "<td class=n>-28.06 points</td>" in html
    assert "<td class=n>117 min</td><td class=n>2.0 h</td><td class=n></td>" in html  # other units: no difference


def test_two_runs_without_predictions_say_so(tmp_path):
    for name in "ab":
        write_log(tmp_path / name, [log_row(0)])
    assert "No paired test" in check(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "two.html"))


@pytest.mark.parametrize("argument", ["missing", "empty"])
def test_a_folder_without_a_run_is_one_sentence(tmp_path, argument, caplog):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / argument)]) == 2
    with pytest.raises(UserError, match="run"):
        write_report([tmp_path / argument])


def test_names_that_are_not_text_do_not_stop_the_page(tmp_path):
    folder, p = whole_run(tmp_path / "run")
    paths = np.array([f"\udcff{i}.png" for i in range(90)])
    wrong = Predictions(paths, p.labels, p.top5, p.probabilities, p.nll, CLASSES)
    write_predictions(folder / "predictions.npz", wrong)
    assert "no picture" in check(write_report([folder]))


@pytest.mark.parametrize("low, high", [(0, 1), (0.1, 82.9), (-3, 7), (5, 5), (0, 0), (1e-6, 4e-3), (0, 1281167),
                                       (1e30, 2e30)])
def test_axis_ticks_enclose_the_values(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 9 and found[0] <= low + 1e-9 * abs(low) and found[-1] >= high - 1e-9 * abs(high)
    assert len({number(v) for v in found}) == len(found)


def test_a_browser_shows_the_page_without_an_error(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    page = write_report([whole_run(tmp_path / "run")[0]])
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000", f"--screenshot={tmp_path / 'page.png'}",
         page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    with Image.open(tmp_path / "page.png") as shot:
        pixels = np.asarray(shot.convert("RGB"))
    assert pixels.shape == (3000, 1200, 3)
    assert (pixels == (36, 87, 197)).all(-1).sum() > 200  # the blue of the lines: the curves are there
