"""`--eval true`: which weights, data and settings it takes, what it writes, and that all sums agree
exactly."""
import importlib.resources
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from common.synsets import imagenet_synsets
from config.parse import parse
from datasets.labels import real_labels
from datasets.sample import write_digits
from evaluation import with_checkpoint_settings
from main import main
from models import load
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
    """Six images of each of six digits, one that cannot be read, and a model in three kinds of files."""
    folder = tmp_path_factory.mktemp("world")
    write_digits(folder / "digits")
    shutil.copytree(folder / "digits/val", folder / "data/val", ignore=lambda _, names: sorted(names)[6:])
    (folder / "data/val/digit_2/broken.JPEG").write_bytes(b"not an image")
    state = lively("hornet_pico_gf", 6).state_dict()
    torch.save({"model": state}, folder / "authors.pth")
    torch.save({"state_dict": to_openmmlab(state)}, folder / "openmmlab.pth")
    torch.save({"format": 2, "model": state, "model_ema": {k: v * 1.05 for k, v in state.items()}, "scored": "model",
                "classes": [f"digit_{i}" for i in range(6)],
                "args": {"model": "hornet_pico_gf", "input_size": 64}}, folder / "ours.pth")
    return folder


def evaluate(data, *argv):
    return main(["--eval", "true", "--data_path", str(data), "--device", "cpu", "--num_workers", "0", "--batch_size", "100",
                 "--allow_bad_images", "true", *map(str, argv)])


def run(world, out, *argv):
    assert evaluate(world / "data", "--model", "hornet_pico_gf", "--input_size", "64", "--nb_classes", "6", "--output_dir",
                    out, *argv) == 0
    return json.loads((out / "eval.json").read_text())


def test_evaluation_predictions_and_reports_agree_exactly_whatever_the_file(world, tmp_path, capfd):
    ours, own, ema = world / "ours.pth", tmp_path / "own", tmp_path / "ema"
    result = run(world, own, "--batch_size", "16", "--resume", ours, "--report", own)
    assert (result["images"], result["bad_images"]) == (37, 1) and 0 < result["hits1"] < 36
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"top-1 {result['acc1']:.2f}") and f"{result['hits1']} of 37" in last
    p = read_predictions(own / "predictions.npz")
    assert (p.hit1.sum(), p.hit5.sum(), len(p.labels)) == (result["hits1"], result["hits5"], 37)
    assert p.nll.sum(dtype=float) / 36 == pytest.approx(result["loss"], rel=1e-12)
    broken, = np.flatnonzero(~p.judged)
    assert p.paths[broken].endswith("digit_2/broken.JPEG") and (p.labels[broken], p.top5[broken, 0]) == (2, -1)
    html = (own / "report.html").read_text("utf-8")
    assert f'<td class="n">{result["hits1"]}</td>' in html and "two different evaluations" not in html

    assert predict([str(world / "data/val"), "--resume", str(ours), "--out", "json"]) == 0
    answers = [(row["path"].split("/")[-2], [top["class"] for top in row["top"]])
               for row in json.loads(capfd.readouterr().out)]
    assert sum(classes[:1] == [true] for true, classes in answers) == result["hits1"]
    assert sum(true in classes for true, classes in answers) == result["hits5"]

    several = run(world, ema, "--resume", world / "authors.pth", world / "openmmlab.pth", ours)
    assert {(r["hits1"], r["loss"]) for r in several["results"]} == {(result["hits1"], result["loss"])}
    both = run(world, ema, "--resume", ours, "--weights", "both")["results"]
    average = run(world, ema, "--resume", ours, "--weights", "ema", "--report", ema)
    assert [(r["weights"], r["loss"]) for r in both] == [("model", result["loss"]), ("model_ema", average["loss"])]
    assert average["loss"] != result["loss"]
    capfd.readouterr()
    assert report([str(own), str(ema), "--out", str(tmp_path / "two.html")]) == 0
    scores = {row.split("|")[2].strip() for row in capfd.readouterr().out.splitlines()[2:]}
    assert scores == {f"{r['acc1']:.2f}" for r in (result, average)}
    assert "No paired test" not in (tmp_path / "two.html").read_text("utf-8")


def test_no_eval_json_stands_among_downloaded_files(world, tmp_path, monkeypatch):
    shutil.copy(world / "ours.pth", tmp_path)
    monkeypatch.setenv("HORNET_CACHE", str(tmp_path))
    assert evaluate(world / "data", "--resume", tmp_path / "ours.pth") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pth"]


def test_the_verdict_on_a_published_architecture_stands_beside_the_file(tmp_path, capfd):
    """Random weights on six images of ImageNet's classes: the line is printed, FAIL, and --check makes it
    count."""
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("hornet_tiny_7x7").state_dict()}, tmp_path / "tiny.pth")
    write_set(tmp_path / "data/val", ["n01440764", "n01443537", "n15075141"], "ILSVRC2012_val_{}.JPEG", 2, 240)
    assert evaluate(tmp_path / "data", "--model", "hornet_tiny_7x7", "--resume", tmp_path / "tiny.pth",
                    "--explain_difference", "true", "--check", "true") == 1
    shown = capfd.readouterr()
    line = shown.out.strip().splitlines()[-1]
    assert line.startswith("top-1 ") and "(published 82.84, difference -" in line and "6/50000 images" in line
    assert line.endswith(" FAIL") and "images: 6 instead of 50000" in shown.err
    assert json.loads((tmp_path / "eval.json").read_text())["verdict"] == "FAIL"


def test_the_weights_a_recipe_begins_with_come_after_what_was_trained_from_them(world, tmp_path):
    """A fine-tuned run's config.yaml names them, and is a recipe for its evaluation."""
    recipe, best, start, ours = (folder / name for folder, name in (
        (tmp_path, "config.yaml"), (tmp_path, "checkpoint-best.pth"), (world, "authors.pth"), (world, "ours.pth")))
    recipe.write_text(f"finetune: {start}\n")

    def evaluated(*flags):
        return run(world, tmp_path, *flags)["checkpoint"]
    assert evaluated("--config", recipe) == str(start)
    shutil.copy(ours, best)
    assert evaluated("--config", recipe) == str(best)
    assert evaluated("--config", recipe, "--resume", ours) == str(ours)
    assert evaluated("--finetune", start) == str(start)


def test_a_runs_folder_is_enough_for_its_evaluation_and_its_page_is_refreshed(images, tmp_path, capfd):
    """Its own data, model and image settings, and its best checkpoint, which need not be the last."""
    folder = tmp_path / "run"
    assert main(arguments(images, folder, epochs=2)) == 0
    log = map(json.loads, (folder / "log.txt").read_text().splitlines())
    best = max(line.get(key, -1) for line in log for key in ("test_acc1", "test_acc1_ema"))
    page = (folder / "report.html").read_text("utf-8")
    for recorded in ("train: 52 images", f">{torch.__version__.split('+')[0]}<", ">Where the time goes<", ">backward<",
                     "<td>lr</td><td>0.01</td><td>flag</td>"):
        assert recorded in page, recorded
    for flag in ("--output_dir", "--resume", "--report"):
        assert main(["--eval", "true", flag, str(folder), *DEVICE]) == 0
        result = json.loads((folder / "eval.json").read_text())
        assert result["acc1"] == pytest.approx(best) and result["checkpoint"].startswith(str(folder / "checkpoint-best"))
        assert (result["model"], result["input_size"], result["images"]) == ("hornet_pico_7x7", 32, 14)
        (folder / "eval.json").unlink()
        assert ((folder / "report.html").read_text("utf-8") == page) == (flag != "--report")
    assert "evaluated top-1" in (folder / "report.html").read_text("utf-8") and "evaluated top-1" not in page
    assert main(["--eval", "true", "--output_dir", str(folder), "--data_path", "/nowhere", *DEVICE]) == 2
    assert "/nowhere" in capfd.readouterr().err.splitlines()[-1]  # what is asked for wins


def test_a_lone_checkpoint_brings_its_network_but_no_data_path(tmp_path):
    """A file from elsewhere must not name the folders that are read, or written for the sample data."""
    args = {"model": "hornet_pico_gf", "input_size": 48, "data_set": "SAMPLE", "data_path": "/somewhere", "crop_pct": None}
    mine = ("--data_path", "/mine")

    def settings(*flags, args=args):
        resolved = parse(["--eval", "true", "--resume", "x.pth", *flags])
        found = with_checkpoint_settings(resolved, {"format": 2, "args": args}, str(tmp_path / "x.pth"))
        return found.model, found.input_size, found.data_set, found.data_path
    assert settings(*mine) == ("hornet_pico_gf", 48, "IMNET", "/mine")
    for flags, wrong, code in (((), args, "missing_data"), (mine, {"model": "resnet"}, "unknown_model"),
                               (mine, {"input_size": 7}, "invalid_value")):
        with refused(code):
            settings(*flags, args=wrong)
    (tmp_path / "config.yaml").touch()
    assert settings() == ("hornet_pico_gf", 48, "SAMPLE", "/somewhere")


def test_nothing_to_evaluate_is_one_sentence(world, tmp_path, capfd):
    for flags in ([], ["--output_dir", tmp_path], ["--resume", tmp_path], ["--resume", "best"]):
        assert evaluate(world / "data", *flags) == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")


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
    file, home, out = tmp_path / "22k.pth", tmp_path / "sets/imagenet", tmp_path / "out"
    torch.save({"model": lively("hornet_pico_7x7", 10459).state_dict()}, file)
    chosen = (importlib.resources.files("timm.data") / "_info" / "imagenet_a_synsets.txt").read_text().split()
    numbers = [str(i) for i in range(1000)]
    write_set(home / "val", SYNSETS[:20], "ILSVRC2012_val_{}.JPEG", 3)
    write_set(home.parent / "ImageNetV2-matched-frequency-format-val", numbers)
    write_set(home / "imagenet-a", chosen)
    write_set(tmp_path / "drawn", SYNSETS[:30], "sketch_{}.JPEG")
    argv = [home, "--model", "hornet_pico_7x7", "--input_size", "64", "--resume", file, "--output_dir", out,
            "--report", out, "--suite"]
    assert evaluate(*argv, f"imagenet,v2,a,sketch={tmp_path / 'drawn'}") == 0
    shown = capfd.readouterr()
    assert "another order of the classes" in shown.err  # the weights know nothing
    results = json.loads((out / "eval.json").read_text())["results"]
    real = {"dataset": "imagenet-real", **results[0]["real"]}
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.out.splitlines()[-5:]]
    assert [(row[0], *row[3:5]) for row in table] == [
        (r["dataset"], str(r["images"]), f"{r['acc1']:.2f}") for r in (results[0], real, *results[1:])]
    assert [r["num_classes"] for r in results] == [1000, 1000, 200, 1000] and "real" not in results[1]

    trained = load(file, model="hornet_pico_7x7", input_size=64)
    for name, folders, synsets in (("val", SYNSETS, SYNSETS), ("v2", numbers, SYNSETS), ("a", chosen, chosen),
                                   ("sketch", SYNSETS, SYNSETS)):
        columns, hits = [trained.classes.index(synset) for synset in synsets], 0
        p = read_predictions(out / f"imagenet-{name}" / "predictions.npz")
        for image in p.paths[::5]:
            with torch.no_grad():
                logits = trained.model(trained.transform(Image.open(image).convert("RGB"))[None])
            best = logits[0, columns].topk(5).indices.tolist()
            hits += image.split("/")[-2] in [folders[i] for i in best]
        assert hits == p.hit5[::5].sum()
        assert p.hit5.sum() == next(r["hits5"] for r in results if r["dataset"] == f"imagenet-{name}")
    p = read_predictions(out / "imagenet-val" / "predictions.npz")
    answers = real_labels(p.paths)
    hits = [(row[0] in a, bool({*a} & {*row})) for a, row in zip(answers, p.top5.tolist()) if a]  # some have none
    assert (real["images"], real["hits1"], real["hits5"]) == (len(hits), *map(sum, zip(*hits)))
    for flags in ("imagenet,r", f"r={home}"):  # there is none, and it is another
        assert evaluate(*argv, flags) == 2
        assert "imagenet-r" in capfd.readouterr().err.splitlines()[-1]
