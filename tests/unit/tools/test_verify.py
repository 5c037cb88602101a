"""tools.verify: all steps on generated weights in both formats, and what is reported where a model does not pass."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from models.zoo import PUBLISHED
from report.metrics import Predictions
from report.results import write_predictions
from tools import verify
from tools.verify import NAMES, as_markdown, main


@pytest.mark.parametrize("names", [NAMES[:2], pytest.param(NAMES, marks=pytest.mark.slow)])
def test_a_rehearsal_goes_through_all_steps(names, tmp_path, capfd):
    assert main(["--dry_run", "true", "--models", *names, "--out", str(tmp_path), "--device", "cpu"]) == 0
    said = capfd.readouterr()
    assert said.out.endswith((tmp_path / "verified.md").read_text())
    rows = json.loads((tmp_path / "verified.json").read_text())["models"]
    assert sorted(row["model"] for row in rows) == sorted(names) and {row["verdict"] for row in rows} == {"PASS"}
    assert {row["file"].startswith("hornet-") for row in rows} == {True, False}  # both formats
    assert {(row["top-1"], row["top-5"]) for row in rows} == {(10.0, 50.0)} and sum(row["changed"] == [] for row in rows) == 1


def answers(*top1):
    number = np.arange(len(top1))
    top5 = np.stack([top1, *[number * 0 + 1] * 4], 1)
    return Predictions(np.array([f"/here/n01/{i}.JPEG" for i in number]), number * 0, top5, np.ones((len(top1), 5)),
                       np.zeros(len(top1)), ["tench", "goldfish"])


@pytest.mark.parametrize("acc1, departures, verdict", [
    (82.86, [], "PASS"), (82.82, [], "PASS"), (82.861, [], "FAIL"), (82.818, [], "FAIL"), (82.84, ["TF32: True"], "FAIL")])
def test_ten_images_are_the_limit_and_the_protocol_is_insisted_on(acc1, departures, verdict, tmp_path, monkeypatch):
    result = {"acc1": acc1, "acc5": 96.24, "checkpoint": "a.pth", "seconds": 61, "departures": departures}

    def evaluate(*_):
        (tmp_path / "eval.json").write_text(json.dumps(result))
        write_predictions(tmp_path / "predictions.npz", answers(0, 1, -1))
    monkeypatch.setattr(verify, "evaluate_checkpoints", evaluate)
    write_predictions(tmp_path / "predictions.npz", answers(0, 0, 1))
    resolved = SimpleNamespace(options=SimpleNamespace(report=str(tmp_path), model="hornet_tiny_7x7", hang_timeout=0))
    process = SimpleNamespace(rank=0, world_size=1, node_name="here", is_main=True, store=None)
    row = verify.verify(resolved, PUBLISHED["hornet_tiny_7x7"], process, rehearsal=False)
    assert row["verdict"] == verdict
    assert row["changed"] == ["n01/1.JPEG: tench, now goldfish", "n01/2.JPEG: goldfish, now unreadable"]
    text = as_markdown([row])
    assert f"82.84|{acc1 - 82.84:.2f}|96.24|96.24|{verdict}|0:01:01|" in text.replace(" ", "")
    assert ("2 images differ from the stored predictions: n01/1.JPEG" in text) == (verdict == "FAIL")
    assert all(words in text for words in departures)


def test_without_data_or_files_it_is_one_sentence(capfd, tmp_path, monkeypatch):
    assert main(["--out", str(tmp_path)]) == 2 and "--data_path" in capfd.readouterr().err

    def fetch(files, folder):
        raise UserError("get it from there.", code="download_failed")
    monkeypatch.setattr(verify, "fetch", fetch)
    assert main(["--data_path", str(tmp_path)]) == 2 and capfd.readouterr().err == "error: get it from there.\n"
