"""`--eval true`: which weights, data and settings it takes, what it writes, and that all sums agree
exactly."""
import importlib.resources
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import engine
from common.synsets import imagenet_synsets, published_22k_synsets
from config.parse import parse
from datasets.labels import real_labels
from datasets.sample import ensure_sample
from datasets.transforms import eval_transform
from evaluation import predictions_of, with_checkpoint_settings
from main import main
from models.weights import to_openmmlab
from report.results import read_predictions
from tests.kits.errors import refused
from tests.kits.runs import arguments
from tests.kits.trained import lively
from tools.predict import main as predict
from tools.report import main as report

SYNSETS = imagenet_synsets()
DEVICE = ["--device", "cpu", "--num_workers", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six images of each digit and a model in three kinds of files."""
    folder = tmp_path_factory.mktemp("world")
    ensure_sample(folder / "digits")
    for place in (folder / "digits" / "val").iterdir():
        (folder / "data" / "val" / place.name).mkdir(parents=True)
        for image in sorted(place.iterdir())[:6]:
            shutil.copy(image, folder / "data" / "val" / place.name)
    state = lively("hornet_pico_gf", 10).state_dict()
    torch.save({"model": state}, folder / "authors.pth")
    torch.save({"state_dict": to_openmmlab(state)}, folder / "openmmlab.pth")
    torch.save({"format": 2, "model": state, "model_ema": {k: v * 1.05 for k, v in state.items()}, "scored": "model",
                "classes": sorted(p.name for p in (folder / "data" / "val").iterdir()),
                "args": {"model": "hornet_pico_gf", "input_size": 64}}, folder / "ours.pth")
    return folder


def run(world, out, *argv):
    assert main(["--eval", "true", "--model", "hornet_pico_gf", "--input_size", "64", "--data_path", str(world / "data"),
                 "--batch_size", "16", "--nb_classes", "10", "--output_dir", str(out), *DEVICE, *argv]) == 0
    return json.loads((out / "eval.json").read_text())


# --------------------------------------------------------------------------------------------------- what is
# written

def test_evaluation_predictions_and_report_agree_exactly(world, tmp_path, capfd):
    result = run(world, tmp_path, "--resume", str(world / "ours.pth"), "--report", str(tmp_path))
    assert result["images"] == 60 and 0 < result["hits1"] < 60
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"top-1 {result['acc1']:.2f}") and f"{result['hits1']} of 60" in last
    p = read_predictions(tmp_path / "predictions.npz")
    assert (p.hit1.sum(), p.hit5.sum(), len(p.labels)) == (result["hits1"], result["hits5"], 60)
    assert p.nll.sum(dtype=float) / 60 == pytest.approx(result["loss"], rel=1e-12)
    html = (tmp_path / "report.html").read_text("utf-8")
    assert f'<td class="n">{result["hits1"]}</td>' in html and "two different evaluations" not in html
    assert predict([str(world / "data" / "val"), "--resume", str(world / "ours.pth"), "--out", "json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert sum(row["top"][0]["class"] == row["path"].split("/")[-2] for row in rows) == result["hits1"]
    assert sum(row["path"].split("/")[-2] in [t["class"] for t in row["top"]] for row in rows) == result["hits5"]


def test_the_report_folders_of_two_evaluations_are_compared(world, tmp_path, capfd):
    scores = []
    for weights in ("model", "ema"):
        result = run(world, tmp_path / "out", "--resume", str(world / "ours.pth"), "--weights", weights, "--report",
                     str(tmp_path / weights))
        scores.append(f"{result['acc1']:.2f}")
    capfd.readouterr()
    assert report([str(tmp_path / "model"), str(tmp_path / "ema"), "--out", str(tmp_path / "two.html")]) == 0
    assert {row.split("|")[2].strip() for row in capfd.readouterr().out.splitlines()[2:]} == {*scores}
    html = (tmp_path / "two.html").read_text("utf-8")
    assert "cannot be distinguished" in html or "is better than" in html


def test_outputs_of_the_engine_become_predictions_with_the_same_sums():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
    images, targets = torch.randn(40, 3, 2, 2), torch.arange(40) % 6
    targets[7] = -100
    images[3] = float("nan")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    loader = [SimpleNamespace(indices=part, images=images[part], targets=targets[part]) for part in order.split(9)]
    evaluation = engine.Evaluation(lambda b: (b.images, b.targets), torch.device("cpu"), outputs=True)
    result, = engine.evaluate([("model", model)], loader, evaluation)
    val = SimpleNamespace(targets=np.arange(40) % 6, path=lambda i: f"x/{i}.png")
    p = predictions_of(result, SimpleNamespace(val=val, class_names=list("abcdef")))
    assert (p.hit1.sum(), p.hit5.sum(), len(p.labels)) == (result.hits1, result.hits5, 40)
    assert p.judged.sum() == 38
    assert p.paths[7] == "x/7.png" and p.labels[7] == 1 and p.top5[7, 0] == -1


def test_eval_json_stands_beside_a_checkpoint_but_not_among_downloaded_files(world, tmp_path, monkeypatch):
    shutil.copy(world / "ours.pth", tmp_path)
    argv = ["--eval", "true", "--resume", str(tmp_path / "ours.pth"), "--data_path", str(world / "data"), *DEVICE]
    monkeypatch.setenv("HORNET_CACHE", str(tmp_path))
    assert main(argv) == 0 and not (tmp_path / "eval.json").exists()
    monkeypatch.delenv("HORNET_CACHE")
    assert main(argv) == 0 and (tmp_path / "eval.json").exists()


def test_the_verdict_on_a_published_architecture(tmp_path, capfd):
    """Random weights on six images of ImageNet's classes: the line is printed, FAIL, and --check makes it
    count."""
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("hornet_tiny_7x7").state_dict()}, tmp_path / "tiny.pth")
    write_set(tmp_path / "data" / "val", ["n01440764", "n01443537", "n15075141"], "ILSVRC2012_val_{}.JPEG", 2, 240)
    argv = ["--eval", "true", "--model", "hornet_tiny_7x7", "--resume", str(tmp_path / "tiny.pth"), "--data_path",
            str(tmp_path / "data"), "--batch_size", "6", "--explain_difference", "true", "--check", "true", *DEVICE]
    assert main(argv) == 1
    shown = capfd.readouterr()
    line = shown.out.strip().splitlines()[-1]
    assert line.startswith("top-1 ") and "(published 82.84, difference -" in line and "6/50000 images" in line
    assert line.endswith(" FAIL") and "images: 6 instead of 50000" in shown.err
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["verdict"] == "FAIL" and result["published"]["authors_top1"] == 82.8 and "real" in result


# ----------------------------------------------------------------------------------- which weights, data and
# settings

def test_files_in_both_namings_and_both_weights_in_one_pass(world, tmp_path):
    paths = [str(world / name) for name in ("authors.pth", "openmmlab.pth", "ours.pth")]
    several = run(world, tmp_path / "all", "--resume", *paths)["results"]
    assert len({r["hits1"] for r in several}) == 1 and len({r["loss"] for r in several}) == 1
    both = run(world, tmp_path / "both", "--resume", paths[2], "--weights", "both")["results"]
    assert [r["weights"] for r in both] == ["model", "model_ema"]
    assert both[0]["hits1"] == several[0]["hits1"] and both[1]["loss"] != both[0]["loss"]


def test_the_weights_a_recipe_begins_with_come_after_what_was_trained_from_them(world, tmp_path):
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


def test_a_runs_folder_is_enough_for_its_evaluation_and_its_page_is_refreshed(images, tmp_path, capfd):
    """Its own data, model and image settings, and its best checkpoint, which need not be the last."""
    folder = tmp_path / "run"
    assert main(arguments(images, folder, epochs=2)) == 0
    last = (folder / "log.txt").read_text().splitlines()
    best = max(json.loads(line).get(key, -1) for line in last for key in ("test_acc1", "test_acc1_ema"))
    page = (folder / "report.html").read_text("utf-8")
    for flags in (["--output_dir", str(folder)], ["--resume", str(folder)]):
        assert main(["--eval", "true", *flags, *DEVICE]) == 0
        result = json.loads((folder / "eval.json").read_text())
        assert result["acc1"] == pytest.approx(best) and result["checkpoint"].startswith(str(folder / "checkpoint-best"))
        assert (result["model"], result["input_size"], result["images"]) == ("hornet_pico_7x7", 32, 14)
        (folder / "eval.json").unlink()
    assert (folder / "report.html").read_text("utf-8") == page
    assert main(["--eval", "true", "--report", str(folder), *DEVICE]) == 0
    refreshed = (folder / "report.html").read_text("utf-8")
    assert "evaluated top-1" in refreshed and "evaluated top-1" not in page
    assert main(["--eval", "true", "--output_dir", str(folder), "--data_path", "/nowhere", *DEVICE]) == 2
    assert "/nowhere" in capfd.readouterr().err.splitlines()[-1]  # what is asked for wins


def test_a_lone_checkpoint_brings_its_network_but_no_data_path(tmp_path):
    """A file from elsewhere must not name the folders that are read, or written for the sample data."""
    args = {"model": "hornet_pico_gf", "input_size": 48, "data_set": "SAMPLE", "data_path": "/somewhere", "crop_pct": None}
    bare, mine = ["--eval", "true", "--resume", "x.pth"], ["--eval", "true", "--resume", "x.pth", "--data_path", "/mine"]

    def settings(argv, args=args):
        return with_checkpoint_settings(parse(argv), {"format": 2, "args": args}, str(tmp_path / "x.pth"))
    found = settings(mine)
    assert (found.model, found.input_size, found.data_set, found.data_path) == ("hornet_pico_gf", 48, "IMNET", "/mine")
    for argv, wrong, code in ((bare, args, "missing_data"), (mine, {"model": "resnet"}, "unknown_model"),
                              (mine, {"input_size": 7}, "invalid_value")):
        with refused(code):
            settings(argv, wrong)
    (tmp_path / "config.yaml").touch()
    assert (settings(bare).data_set, settings(bare).data_path) == ("SAMPLE", "/somewhere")


def test_nothing_to_evaluate_is_one_sentence(world, tmp_path, capfd):
    for flags in ([], ["--output_dir", str(tmp_path)], ["--resume", str(tmp_path)], ["--resume", "best"]):
        assert main(["--eval", "true", "--data_path", str(world / "data"), *flags, *DEVICE]) == 2
        assert "Traceback" not in capfd.readouterr().err


# ------------------------------------------------------------------ ImageNet's other validation sets

def write_set(root, folders, name="p_{}.JPEG", images=1, size=64):
    rng, count = np.random.default_rng(0), 0
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for _ in range(images):
            count += 1
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size)).save(
                root / folder / name.format(f"{count:08d}"))
    return root


def test_a_suite_is_one_table_and_a_22k_head_answers_with_its_rows_of_the_1000_classes(tmp_path, capfd):
    model, path, home, out = lively("hornet_pico_7x7", 10459), tmp_path / "22k.pth", tmp_path / "sets/imagenet", tmp_path / "out"
    torch.save({"model": model.state_dict()}, path)
    chosen = (importlib.resources.files("timm.data") / "_info" / "imagenet_a_synsets.txt").read_text().split()
    write_set(home / "val", SYNSETS[:20], "ILSVRC2012_val_{}.JPEG", 3)
    write_set(home.parent / "ImageNetV2-matched-frequency-format-val", [str(i) for i in range(1000)])
    write_set(home / "imagenet-a", chosen)
    write_set(tmp_path / "drawn", SYNSETS[:30], "sketch_{}.JPEG")
    argv = ["--eval", "true", "--model", "hornet_pico_7x7", "--input_size", "64", "--resume", str(path), "--data_path",
            str(home), "--batch_size", "100", "--output_dir", str(out), "--report", str(out), *DEVICE]
    assert main([*argv, "--suite", f"imagenet,v2,a,sketch={tmp_path / 'drawn'}"]) == 0
    shown = capfd.readouterr()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.out.splitlines()[-5:]]
    results = json.loads((out / "eval.json").read_text())["results"]
    names = ["imagenet-val", "imagenet-v2", "imagenet-a", "imagenet-sketch"]
    assert [r["dataset"] for r in results] == names and [r["num_classes"] for r in results] == [1000, 1000, 200, 1000]
    assert [row[0] for row in table] == [names[0], "imagenet-real", *names[1:]]
    assert [row[3:5] for row in table] == [[str(r["images"]), f"{r['acc1']:.2f}"] for r in (
        results[0], results[0]["real"], *results[1:])]
    assert "another order of the classes" in shown.err  # the weights know nothing
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for result, folders in zip(results, (SYNSETS, [str(i) for i in range(1000)], chosen, SYNSETS)):
        kept = chosen if folders is chosen else SYNSETS
        columns, hits = [published_22k_synsets().index(synset) for synset in kept], 0
        p = read_predictions(out / result["dataset"] / "predictions.npz")
        for image in p.paths[::5]:
            pixels = torch.tensor(eval_transform(64)(Image.open(image).convert("RGB"))).permute(2, 0, 1)[None] / 255
            with torch.no_grad():
                best = model((pixels - mean) / std)[0, columns].topk(5).indices.tolist()
            hits += image.split("/")[-2] in [folders[i] for i in best]
        assert hits == p.hit5[::5].sum() and result["hits5"] == p.hit5.sum() and "real" not in results[1]
    p = read_predictions(out / "imagenet-val" / "predictions.npz")
    answers = real_labels(p.paths)
    assert results[0]["real"]["images"] == sum(bool(a) for a in answers)
    assert results[0]["real"]["hits5"] == sum(bool(set(a) & set(row)) for a, row in zip(answers, p.top5.tolist()))
    assert main([*argv, "--suite", "imagenet,r"]) == 2
    assert "--suite r" in capfd.readouterr().err.splitlines()[-1]
