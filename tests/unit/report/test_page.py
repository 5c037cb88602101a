"""The report page: from a whole run folder, from log.txt alone, and of two runs; seen by a real browser."""
import json
import math
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from config.options import ImageSettings
from config.parse import parse
from engine import EvalResult
from report.metrics import Predictions
from report.page import write_comparison, write_report
from report.results import Protocol, results_from, write_eval_json, write_predictions
from tests.kits.errors import refused
from tools.report import main

CLASSES = ["n01440764", "naïve <b>&", "猫"]


def log_row(epoch, **changes):
    return {"train_loss": 6.9 - 0.01 * epoch, "train_lr": 1e-3, "train_min_lr": 1e-3, "train_grad_norm": 1.0,
            "train_images_per_second": 950.0, "train_data_wait": 0.02, "test_loss": 3.0, "test_acc1": 0.2 * epoch,
            "test_acc5": 0.3 * epoch, "test_acc1_ema": 0.21 * epoch, "epoch": epoch, "update": 10 * epoch,
            "n_parameters": 22409512, "seconds": 60.0, **changes}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def whole_run(folder, seed=0, lr="0.004"):
    write_lines(folder / "log.txt", [log_row(e) for e in range(300)])
    (folder / "config.yaml").write_text(parse(["--model", "hornet_tiny_7x7", "--data_path", "x", "--lr", lr]).to_yaml())
    (folder / "environment.json").write_text(json.dumps({"torch": "2.15.0", "world_size": 8, "global_batch": 512}))
    (folder / "status.json").write_text(json.dumps({"state": "DONE"}))
    (folder / "data.json").write_text(json.dumps({
        "classes": CLASSES, "train": {"images": 900, "per_class": [500, 300, 100]},
        "val": {"images": 90, "per_class": [30, 30, 30]}, "notes": ["train: 120 files were left out"]}))
    (folder / "checkpoint-best.pth").write_bytes(b"")
    (folder / "checkpoint-best.pth.json").write_text(json.dumps({"score": 59.8, "epoch": 299}))
    write_lines(folder / "events.jsonl", [
        {"time": "2026-01-01 00:00:00", "kind": "save_failed", "message": "the disk is full", "epoch": 4},
        {"kind": "unreadable_image", "epoch": 0, "images": ["/data/a.png", "/data/b.png"]},
        {"kind": "bad_pictures", "epoch": 1, "pictures": ["/data/a.png"]}])  # an earlier version's, met again
    write_lines(folder / "attempts.jsonl", [
        {"attempt": 1, "started": "10:00", "from_update": 0}, {"attempt": 1, "state": "PREEMPTED", "update": 99},
        {"attempt": 2, "started": "11:00", "from_update": 99}, {"attempt": 2, "state": "DONE", "update": 300}])
    rng = np.random.default_rng(seed)
    labels = np.arange(90) % 3
    top5 = np.stack([rng.permutation(3) for _ in labels])
    paths = [f"val/x/\udcff{i}.png" for i in range(90)]  # bytes that are no text
    predictions = Predictions(np.array(paths), labels, top5, np.tile([0.6, 0.3, 0.1], (90, 1)), np.ones(90), CLASSES)
    write_predictions(folder / "predictions.npz", predictions)
    counts = EvalResult("", int(predictions.hit1.sum()), 90, 90, 0, 0, 90.0)
    protocol = Protocol("hornet_tiny_7x7", 3, ImageSettings(), dataset="mine")
    write_eval_json(folder / "eval.json", [results_from(counts, protocol, predictions=predictions)])
    return folder, predictions


def page(folder, out=None):
    """The page's HTML and its text without tags, after checking that it stands alone and is well formed."""
    return check(write_report(folder, out).read_text("utf-8"))


def check(html):
    opened, closed = Counter(re.findall(r"<([a-z]\w*)(?:\s[^>]*)?(?<!/)>", html)), Counter(re.findall(r"</(\w+)>", html))
    assert {tag: n for tag, n in opened.items() if tag not in ("meta", "link", "img", "br")} == closed
    names = re.findall(r' id="(.*?)"', html)
    assert len(names) == len(set(names))
    assert not re.search(r"""\s(src|href|xlink:href|action)="(?!#|data:)|<script|@import|url\((?!#)""", html)
    assert len(html) < 3e6
    return html, " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style.*?</style>", "", html, flags=re.S)).split())


def rows(html):
    """The cells of every table row."""
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", html, re.S)]


def test_a_whole_run_gives_one_page_with_every_section(tmp_path):
    folder, predictions = whole_run(tmp_path / "run <1>", lr="0.001")
    html, text = page(folder)
    quoted = f"&#39;{tmp_path}/run &lt;1&gt;&#39;"
    for words in ("run &lt;1&gt;", "DONE", "59.80 % best top-1, epoch 300", "1 × save failed", "2 attempts", "2.15.0",
                  "Most confident mistakes", "900 train images, 3 classes", "train: 120 files were left out",
                  "2 unreadable files", "/?1", "checkpoint-best.pth : top-1 59.80 %, from epoch 300",
                  f"python main.py --eval true --output_dir {quoted} --report {quoted}"):
        assert words in text, words
    assert "missing" not in re.sub(r"<style.*?</style>", "", html, flags=re.S)  # no section lacks anything
    found = rows(html)
    assert ["lr", "0.001", "flag", "0.004"] in found  # the last is the published recipe's
    assert ["1", "10:00", "", "PAUSED", "0", "99", ""] in found  # what earlier versions called PREEMPTED
    assert [row for row in found if row[0].startswith("/data/")] == [["/data/a.png", "epoch 1"], ["/data/b.png", "epoch 1"]]
    assert ["2026-01-01 00:00:00", "save failed", "the disk is full; epoch 5"] in found
    assert [row[1:3] for row in found if row[0] in ("tench, Tinca tinca", "naïve &lt;b&gt;&amp;", "猫") and len(row) == 6] == [
        ["500", "30"], ["300", "30"], ["100", "30"]]
    hits = [int(n) for n in re.findall(r"taken for [^\"]*?: (\d+) of 30", html)]
    assert sum(hits) == 90 and sum(hits[::4]) == predictions.hit1.sum()  # the diagonal of three rows


def test_log_alone_is_enough_for_curves_whatever_its_lines_and_the_rest_is_named(tmp_path):
    """Lines that are cut short, that stand twice and that lack numbers."""
    log = [*map(log_row, range(299)), log_row(299, train_loss=math.nan)]
    folder = write_lines(tmp_path / "run" / "log.txt", log)
    with open(folder / "log.txt", "a") as file:
        file.write('{"train_loss": 1.0, "epo\n\n[1, 2]\n' + json.dumps({"epoch": 300, "train_loss": None}) + "\n")
    html, text = page(folder)
    assert page(folder, tmp_path / "page.html")[0] == html  # the same each time
    assert html.count("<svg") == 6 and "301 epochs" in text and "59.80 % best top-1, epoch 300" in text
    for name in ("eval.json", "incidents", "predictions.npz", "config.yaml", "environment.json"):
        assert f"No {name}" in text or f"No record of {name}" in text


def test_one_epoch_has_an_axis_with_one_epoch_and_points_to_see(tmp_path):
    html, _ = page(write_lines(tmp_path / "log.txt", [log_row(0, test_acc1=99.0), log_row(0, test_acc1=46.0)]))
    assert "46.00 %" in html and "99.00 %" not in html  # the repeated epoch counts once, as it ended
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        texts = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
        assert texts[:texts.index("epoch")] == ["1"] and "<use " in svg
        ticks = [float(text.replace("\u2212", "-")) for text in texts if re.fullmatch(r"[\u2212\d.]+", text)][1:]
        assert min(ticks) == 0 < max(ticks), texts  # from zero: the height of a lone point means something


def test_records_of_no_use_are_named_and_do_not_stop_the_page(tmp_path, caplog):
    folder = whole_run(tmp_path / "run")[0]
    (folder / "environment.json").write_text("[1]")
    for name in (broken := ("predictions.npz", "data.json", "config.yaml")):
        (folder / name).write_bytes(b"{broken")
    text = page(folder)[1]
    assert "59.80 % best top-1" in text and "No environment.json" in text and all(name in caplog.text for name in broken)


def test_several_runs_are_compared_with_the_best_on_the_same_images(tmp_path, capfd):
    hits = {}
    for number, (name, lr) in enumerate({"a$": "0.004", "b": "0.002", "c": "0.004"}.items()):
        hits[name] = whole_run(tmp_path / name, seed=number, lr=lr)[1].hit1
    write_lines(tmp_path / "d" / "log.txt", [log_row(0)])
    assert main([*(str(tmp_path / name) for name in (*hits, "d")), "--price_per_hour", "2"]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capfd.readouterr().out.splitlines()]
    html, text = check((tmp_path / "a$" / "comparison.html").read_text("utf-8"))
    order = sorted(hits, key=lambda name: -hits[name].mean())
    assert [row[0] for row in table[2:]] == [*order, "d"]
    found = dict(zip(table[0], table[3]))
    assert found["to the best"].startswith(f"{100 * (hits[order[1]].mean() - hits[order[0]].mean()):+.2f} ± ")
    # 300 epochs of a minute on 8 processes, 10 updates of 512 images
    assert (found["hours"], found["cost"], found["images seen (M)"]) == ("5", "80", "1.531")
    assert 0 < float(found["p"]) <= 1
    assert ["lr", "0.004", "0.002", "0.004", "–"] in rows(html) and "a$: EMA" in text and html.count("<svg") == 7
    assert main([str(tmp_path / "d"), "--compare"]) == 0
    assert "No paired test" in check((tmp_path / "d" / "comparison.html").read_text("utf-8"))[1]


@pytest.mark.parametrize("name, code", [("nowhere", "missing_run"), ("run", "missing_run"), ("log.txt", "unreadable_file")])
def test_a_folder_without_a_run_is_one_sentence(tmp_path, name, code):
    (tmp_path / "run" / name).mkdir(parents=True)
    with refused(code, tmp_path / "run"):
        write_report(tmp_path / "run" if name != "nowhere" else tmp_path / "run" / "missing")


def test_a_browser_shows_the_page_and_no_label_covers_another(tmp_path):
    """A script added for the test reports texts of charts that overlap."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    folders = [whole_run(tmp_path / "a run with quite a long name, as people like them")[0],
               write_lines(tmp_path / "one" / "log.txt", [log_row(0)])]
    pages = [page(folder)[0] for folder in folders]
    pages.append(write_comparison(folders, price_per_hour=2.5)[0].read_text("utf-8"))
    script = """<script>
    const found = [];
    for (const svg of document.querySelectorAll("figure > svg")) {
      const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
      const frame = svg.getBoundingClientRect();
      for (const [i, [one, a]] of boxes.entries()) {
        if (a.left < frame.left - 1 || a.right > frame.right + 1) found.push(one + " leaves the chart");
        for (const [two, b] of boxes.slice(i + 1))
          if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom) found.push(one + " x " + two);
      }
    }
    document.title = "overlaps: " + JSON.stringify(found);
    </script>"""
    for html in pages:
        (tmp_path / "checked.html").write_text(html + script)
        done = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000",
             "--dump-dom", (tmp_path / "checked.html").as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and not re.findall(r".*CONSOLE.*", done.stderr)
        assert re.search(r"<title>(.*?)</title>", done.stdout)[1] == "overlaps: []"
