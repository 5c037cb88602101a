"""ImageNet-ReaL, V2, -A, -R and -Sketch: recognised by their folders and judged by the right logits."""
import importlib.resources
import random

import numpy as np
import pytest
import torch
from timm.data.real_labels import RealLabelsImagenet

from datasets.labels import imagenet_synsets
from datasets.subsets import real_labels, recognise
from report.metrics import multi_label_accuracy

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
