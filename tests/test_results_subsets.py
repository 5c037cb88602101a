"""ImageNet-ReaL, V2, -A, -R and -Sketch: recognised by their folders and judged by the right logits."""
import importlib.resources
import json
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.real_labels import RealLabelsImagenet

import models  # noqa: F401  (registers the models with timm)
from datasets.labels import imagenet_synsets
from datasets.subsets import real_labels, recognise
from datasets.transforms import eval_transform
from main import main
from report.metrics import multi_label_accuracy
from report.results import read_predictions

SYNSETS = imagenet_synsets()


@pytest.mark.parametrize("name, some", [("imagenet-a", "n01498041"), ("imagenet-r", "n01443537")])
def test_sets_of_200_classes_are_recognised_in_any_order(name, some):
    assert recognise([SYNSETS[i] for i in random.Random(0).sample(range(1000), 200)]) is None
    info = importlib.resources.files("timm.data") / "_info"
    listed = (info / f"{name.replace('-', '_')}_synsets.txt").read_text().split()
    found = recognise(sorted(listed, reverse=True))
    assert found.name == name and some in found.folders and len(found.columns) == 200
    assert [SYNSETS[i] for i in found.columns] == list(found.folders) == listed


def test_v2_folders_are_class_indices():
    found = recognise(sorted(map(str, range(1000))))
    assert found.name == "imagenet-v2" and found.columns is None
    assert found.folders[10] == "10" and sorted(map(str, range(1000)))[10] != "10"


def test_val_and_sketch_differ_by_the_names_of_their_pictures():
    assert recognise(SYNSETS, ["val/n01440764/sketch_1.JPEG", "b/sketch_2.JPEG"]).name == "imagenet-sketch"
    assert recognise(SYNSETS, ["val/n01440764/ILSVRC2012_val_00000293.JPEG"]).name == "imagenet-val"
    assert recognise(SYNSETS[:10], ["a/ILSVRC2012_val_00000293.JPEG"]).name == "imagenet-val"
    assert recognise(SYNSETS[:10], ["a/photo.JPEG"]) is None
    assert recognise(["cats", "dogs"]) is None and recognise([]) is None


def test_real_accuracy_equals_timms():
    paths = [f"/val/x/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50000)]
    top5 = np.random.default_rng(0).integers(0, 1000, (50000, 5))
    answers = real_labels(paths)
    for i in range(0, 50000, 2):
        top5[i, i % 5] = (answers[i] or [0])[0]
    theirs = RealLabelsImagenet(paths)
    scores = torch.zeros(50000, 5)

    class Output:  # what timm asks of logits: their top k, which are given here
        def topk(self, k, *_):
            return scores, torch.from_numpy(top5)
    theirs.add_result(Output())
    found = multi_label_accuracy(top5, answers)
    assert found["acc1"] == pytest.approx(theirs.get_accuracy(1))
    assert found["acc5"] == pytest.approx(theirs.get_accuracy(5))
    assert found["images"] == len(theirs.is_correct[1]) == 46837


def test_real_labels_follow_the_number_in_the_name_not_the_order():
    a, b = "x/ILSVRC2012_val_00000001.JPEG", "y/ILSVRC2012_val_00050000.JPEG"
    assert real_labels([b, a]) == real_labels([a, b])[::-1]
    assert real_labels(["x/ILSVRC2012_val_00050001.JPEG"]) is None
    assert real_labels([a, "other.JPEG"]) is None and real_labels([]) is None


@pytest.fixture(scope="module")
def imagenet_model(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("hornet_pico_7x7", num_classes=1000)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    path = tmp_path_factory.mktemp("model") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return path, model.eval()


def write_set(root, folders, name="p_{}.JPEG", pictures=2):
    rng, count = np.random.default_rng(0), 0
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for _ in range(pictures if len(folders) < 100 else 1):
            count += 1
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(
                root / folder / name.format(f"{count:08d}"))
    return root


def evaluated(root, path, out):
    code = main(["--eval", "true", "--model", "hornet_pico_7x7", "--input_size", "64", "--eval_data_path", str(root),
                 "--data_path", str(root.parent), "--device", "cpu", "--num_workers", "0", "--batch_size", "100",
                 "--resume", str(path), "--output_dir", str(out), "--report", str(out)])
    assert code == 0
    return json.loads((out / "eval.json").read_text()), read_predictions(out / "predictions.npz")


def test_imagenet_a_is_judged_among_its_200_classes(imagenet_model, tmp_path):
    info = importlib.resources.files("timm.data") / "_info"
    folders = (info / "imagenet_a_synsets.txt").read_text().split()
    result, p = evaluated(write_set(tmp_path / "imagenet-a", folders), imagenet_model[0], tmp_path / "out")
    assert (result["dataset"], result["num_classes"], result["images"]) == ("imagenet-a", 200, 200)
    columns = [SYNSETS.index(folder) for folder in folders]
    transform, hits = eval_transform(64), 0
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for path in p.paths:
        pixels = torch.tensor(transform(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            best = imagenet_model[1]((pixels - mean) / std)[0, columns].topk(5).indices.tolist()
        hits += path.split("/")[-2] in [folders[i] for i in best]
    assert result["hits5"] == hits == p.counts().hits5 and hits > 0


def test_v2_and_real_count_by_the_right_classes(imagenet_model, tmp_path):
    v2 = write_set(tmp_path / "v2", [str(i) for i in range(1000)])
    result, p = evaluated(v2, imagenet_model[0], tmp_path / "out")
    assert result["dataset"] == "imagenet-v2" and "real" not in result
    assert all(int(path.split("/")[-2]) == label for path, label in zip(p.paths, p.labels))
    val = write_set(tmp_path / "val", SYNSETS[:20], "ILSVRC2012_val_{}.JPEG", 3)
    result, p = evaluated(val, imagenet_model[0], tmp_path / "out2")
    assert result["dataset"] == "imagenet-val" and result["images"] == 60
    answers = real_labels(p.paths)
    assert result["real"]["images"] == sum(bool(a) for a in answers)
    assert result["real"]["hits5"] == sum(bool(set(a) & set(row)) for a, row in zip(answers, p.top5.tolist()))
