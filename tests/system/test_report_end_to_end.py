"""Evaluate, predict and report on one checkpoint: their sums agree exactly."""
import json
import shutil

import pytest
import timm
import torch
from PIL import Image

import models  # noqa: F401  (registers the models with timm)
from datasets.sample import ensure_sample
from main import main as evaluate
from models.weights import to_openmmlab
from report.results import read_predictions
from tools.predict import main as predict
from tools.report import main as report
from tools.report import write_report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six pictures of each digit and a model of lively random weights, in three kinds of files."""
    folder = tmp_path_factory.mktemp("world")
    ensure_sample(folder / "digits")
    for place in (folder / "digits" / "val").iterdir():
        (folder / "data" / "val" / place.name).mkdir(parents=True)
        for picture in sorted(place.iterdir())[:6]:
            shutil.copy(picture, folder / "data" / "val" / place.name)
    torch.manual_seed(0)
    model = timm.create_model("hornet_pico_gf", num_classes=10)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    state, classes = model.state_dict(), sorted(p.name for p in (folder / "data" / "val").iterdir())
    torch.save({"model": state}, folder / "authors.pth")
    torch.save({"state_dict": to_openmmlab(state)}, folder / "openmmlab.pth")
    torch.save({"format": 2, "model": state, "model_ema": {k: v * 1.05 for k, v in state.items()}, "scored": "model",
                "classes": classes,
                "args": {"model": "hornet_pico_gf", "input_size": 64}}, folder / "ours.pth")
    return folder


def run(world, out, *argv):
    code = evaluate(["--eval", "true", "--model", "hornet_pico_gf", "--input_size", "64", "--data_path",
                     str(world / "data"), "--device", "cpu", "--num_workers", "0", "--batch_size", "16", "--nb_classes",
                     "10", "--output_dir", str(out), *argv])
    assert code == 0
    return json.loads((out / "eval.json").read_text())


def test_eval_predictions_and_report_agree_exactly(world, tmp_path, capfd):
    result = run(world, tmp_path, "--resume", str(world / "ours.pth"), "--report", str(tmp_path))
    assert result["images"] == 60 and 0 < result["hits1"] < 60
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"top-1 {result['acc1']:.2f}") and f"{result['hits1']} of 60" in last
    counts = read_predictions(tmp_path / "predictions.npz").counts()
    assert (counts.hits1, counts.hits5, counts.images) == (result["hits1"], result["hits5"], 60)
    assert counts.loss == pytest.approx(result["loss"], rel=1e-12)
    html = write_report([tmp_path]).read_text("utf-8")
    assert f"<td class=\"n\">{result['hits1']}</td>" in html and "two different evaluations" not in html
    out = tmp_path / "answers.json"
    assert predict([str(world / "data" / "val"), "--resume", str(world / "ours.pth"), "--out", str(out)]) == 0
    rows = json.loads(out.read_text("utf-8"))
    assert sum(row["top"][0]["class"] == row["path"].split("/")[-2] for row in rows) == result["hits1"]
    assert sum(row["path"].split("/")[-2] in [t["class"] for t in row["top"]] for row in rows) == result["hits5"]


def test_the_report_folders_of_two_evaluations_are_compared(world, tmp_path, capfd):
    """With eval.json elsewhere, as for downloaded weights: the answers are enough for a page."""
    hits = []
    for weights in ("model", "ema"):
        result = run(world, tmp_path / "out", "--resume", str(world / "ours.pth"), "--weights", weights, "--report",
                     str(tmp_path / weights))
        hits.append(result["hits1"])
    assert report([str(tmp_path / "model"), str(tmp_path / "ema"), "--out", str(tmp_path / "two.html")]) == 0
    html = (tmp_path / "two.html").read_text("utf-8")
    assert all(f"<td class=\"n\">{n}</td>" in html for n in hits) and "60 pictures" in html
    assert "The two cannot be told apart" in html or "is better" in html or "Both get the same number" in html


def test_files_in_both_namings_and_both_weights_in_one_pass(world, tmp_path):
    paths = [str(world / name) for name in ("authors.pth", "openmmlab.pth", "ours.pth")]
    single = run(world, tmp_path / "one", "--resume", paths[0])
    several = run(world, tmp_path / "all", "--resume", *paths)["results"]
    assert [r["hits1"] for r in several] == [single["hits1"]] * 3 and len({r["loss"] for r in several}) == 1
    both = run(world, tmp_path / "both", "--resume", paths[2], "--weights", "both")["results"]
    assert [r["weights"] for r in both] == ["model", "model_ema"]
    assert both[0]["hits1"] == single["hits1"] and both[1]["loss"] != both[0]["loss"]


def test_the_weights_a_recipe_begins_with_stand_behind_what_came_of_them(world, tmp_path):
    """A fine-tuned run's config.yaml names them, and is a recipe for its evaluation."""
    recipe, best = tmp_path / "config.yaml", tmp_path / "checkpoint-best.pth"
    recipe.write_text(f"finetune: {world / 'authors.pth'}\n")
    assert run(world, tmp_path, "--config", str(recipe))["checkpoint"] == str(world / "authors.pth")
    shutil.copy(world / "ours.pth", best)
    assert run(world, tmp_path, "--config", str(recipe))["checkpoint"] == str(best)
    found = run(world, tmp_path, "--config", str(recipe), "--resume", str(world / "ours.pth"))
    assert found["checkpoint"] == str(world / "ours.pth") and "results" not in found
    found = run(world, tmp_path, "--finetune", str(world / "authors.pth"))
    assert found["checkpoint"] == str(world / "authors.pth") and "results" not in found


def test_eval_json_stands_beside_a_checkpoint_but_not_among_downloaded_files(world, tmp_path, monkeypatch):
    shutil.copy(world / "ours.pth", tmp_path)
    argv = ["--eval", "true", "--resume", str(tmp_path / "ours.pth"), "--data_path", str(world / "data"), "--device", "cpu",
            "--num_workers", "0"]
    monkeypatch.setenv("HORNET_CACHE", str(tmp_path))
    assert evaluate(argv) == 0 and not (tmp_path / "eval.json").exists()
    monkeypatch.delenv("HORNET_CACHE")
    assert evaluate(argv) == 0 and (tmp_path / "eval.json").exists()


def test_the_verdict_on_a_published_architecture(tmp_path, capfd):
    """Random weights on six pictures of ImageNet's classes: the line is printed, FAIL, and --check makes it count."""
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("hornet_tiny_7x7").state_dict()}, tmp_path / "tiny.pth")
    for i, synset in enumerate(["n01440764", "n01443537", "n15075141"]):
        (tmp_path / "data" / "val" / synset).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (260, 240), (80 * i, 120 * j, 9)).save(
                tmp_path / "data" / "val" / synset / f"ILSVRC2012_val_{10 * i + j + 1:08d}.JPEG")
    argv = ["--eval", "true", "--model", "hornet_tiny_7x7", "--resume", str(tmp_path / "tiny.pth"), "--data_path",
            str(tmp_path / "data"), "--device", "cpu", "--num_workers", "0", "--batch_size", "6",
            "--explain_difference", "true"]
    assert evaluate(argv) == 0
    said = capfd.readouterr()
    line = said.out.strip().splitlines()[-1]
    assert line.startswith("top-1 ") and "(published 82.84, difference -" in line and "6/50000 pictures" in line
    assert line.endswith(" FAIL") and "6 pictures instead of 50000" in said.err
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["verdict"] == "FAIL" and result["published"]["authors_top1"] == 82.8 and "real" in result
    assert evaluate([*argv, "--check", "true"]) == 1
