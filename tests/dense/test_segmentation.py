"""Training and evaluating segmentors: samples, figures, resuming, any number of processes, mistakes."""
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from config.parse import parse
from datasets.images import BadImage
from datasets.sample import ensure_sample
from dense import scenes
from dense.data import LabelledImages, UpdateSampler, find_data, find_pairs, pad_into, sample
from dense.options import SegmentationOptions
from dense.pixels import normalised
from dense.segmentation import run
from dense.segmentation_task import build_segmentor, count_pixels, scores
from report.page import read_run
from tests.dense.test_pixels import Scripted
from tests.kits.dense import given, stored
from tests.kits.errors import refused
from tests.kits.processes import codes
from tests.kits.runs import assert_equal_bits, result, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty drawn scenes to train on, seven to evaluate."""
    path = tmp_path_factory.mktemp("scenes") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "COUNTS", {"training": 20, "validation": 7})
        ensure_sample(path, scenes.write_segmentation, ("images", "annotations"))
    return path


def argv(folder, output, **changes):
    values = {"model": "hornet_pico_gf", "head_width": 8, "data_path": folder, "classes": folder / "classes.txt",
              "output_dir": output, "device": "cpu", "image_scale": "64 48", "crop_size": 48, "batch_size": 2,
              "global_batch": 6, "updates": 8, "check_every": 4, "lr": 0.01, "warmup_steps": 2, "drop_path": 0.3,
              "layer_scale_init_value": 0.5, "clip_grad": 1, "num_workers": 0, "seed": 3} | changes
    return [word for name, value in values.items() if value is not None
            for word in (f"--{name}", *str(value).split())]


def options(folder, **changes):
    return parse(argv(folder, None, **changes), SegmentationOptions).options


@pytest.mark.parametrize("case", stored("pipelines/seg_train.json"), ids=lambda case: case["picture"][13:15])
def test_a_training_sample_has_the_published_pixels(case, folder):
    ratio = {350: 0.171, 153: 0.075}[case["scale"][0]]
    place = [["randint", [1 + max(side - case["crop"], 0)], offset]
             for side, offset in zip(case["resized_hw"], case["offset_yx"])]
    draws = Scripted([["uniform", [0.5, 2.0], ratio]] + 11 * place)
    flip = 0.4 if case["flip"] else 0.6
    draws.uniform = lambda low, high: ratio if (low, high) == (0.5, 2.0) else flip
    draws.integers = lambda low, high: 0 if high == 2 else Scripted.integers(draws, low, high)
    draws.draws.pop(0)
    given_options = options(folder, image_scale="2048 512", crop_size=case["crop"])
    labels = given(case["labels"])[0].numpy().astype(np.int16)
    image, labels = sample(given(case["picture"]).numpy(), labels, draws, given_options)
    padded, maps = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    pad_into(padded[0], image, 0)
    pad_into(maps, labels, 255)
    x = normalised(torch.from_numpy(padded), torch.tensor([labels.shape]))[0].double().numpy()
    expected = case["image"]
    assert x.mean(axis=(1, 2)) == pytest.approx(expected["mean"], abs=1e-5)
    assert np.sqrt((x ** 2).sum(axis=(1, 2))) == pytest.approx(expected["norm"], rel=1e-5)
    assert zlib.crc32(maps.tobytes()) == case["label_crc32"] and int((maps == 255).sum()) == case["label_ignored"]


@pytest.mark.parametrize("name", ["miou_150", "miou_7"])
def test_figures(name):
    arrays, expected = stored(f"metrics/{name}.npz")
    confusion = torch.zeros(expected["classes"], expected["classes"] + 1, dtype=torch.int64)
    for labels, predicted in zip(arrays["labels"], arrays["predictions"]):
        count_pixels(confusion, torch.from_numpy(labels).long(), torch.from_numpy(predicted).long())
    found = scores(confusion)
    for key, value in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc")):
        assert found[key] / 100 == pytest.approx(expected[value], rel=1e-9)
        assert round(found[key], 2) == expected["rounded"][{"miou": "IoU", "macc": "Acc"}.get(key, "aAcc")]
    for key in ("iou", "acc"):
        there = [np.nan if value is None else 100 * value for value in expected[key]]
        assert found[key] == pytest.approx(there, rel=1e-9, nan_ok=True)


def test_any_number_of_processes_sees_the_same_samples(folder):
    data = find_data(options(folder), None, True, False).train
    seen = {}
    for world in (1, 2, 3):
        parts = {}
        for rank in range(world):
            sampler = UpdateSampler(len(data), 6, 6 // world, 1, rank, world, 3, updates=4)
            sampler.set_start(1, 2)
            for number, items in enumerate(sampler):
                batch = data.__getitems__(items)
                for row, position in enumerate(batch.positions.tolist()):
                    parts[number, position] = [tensor[row] for tensor in batch[:3]] + [batch.boxes[row]]
        seen[world] = parts
    assert len(seen[1]) == 12 and min(seen[1]) == (0, (4 + 2) * 6)
    for world in (2, 3):
        assert seen[world].keys() == seen[1].keys()
        assert all(torch.equal(one, other) for key in seen[1] for one, other in zip(seen[world][key], seen[1][key]))


def test_a_pass_leaves_no_image_out():
    sampler = UpdateSampler(20, 6, 6, 1, 0, 1, 3, updates=10)
    indices = [index for items in sampler for _, index, _ in items]
    assert sorted(indices[:20]) == sorted(indices[20:40]) == list(range(20)) and indices[:20] != indices[20:40]


@pytest.mark.slow
def test_a_killed_run_resumes_with_equal_bits_and_any_ranks_evaluate_alike(folder, tmp_path):
    def ends(name, world=1, hook=(), **changes):
        children = start(argv(folder, tmp_path / "run", **changes), tmp_path / name, world,
                         program="dense.segmentation", at=[*hook])
        return codes(children, 240), children

    assert ends("whole")[0] == [0]
    (tmp_path / "run").rename(tmp_path / "whole-run")
    kill = {"phase": "data", "update": 6, "do": "SIGKILL"}
    assert ends("killed", hook=[kill], save_every_minutes=1e-5)[0] == [-9]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-e1u*.pth"))[-1] >= "checkpoint-e1u5"
    assert ends("resumed")[0] == [0]
    assert_equal_bits(result(tmp_path / "run"), result(tmp_path / "whole-run"))
    state = torch.load(tmp_path / "run" / "checkpoint-1.pth", weights_only=True)["model"]
    moved = [value for name, value in state.items() if name.endswith("running_var")]
    assert moved and not any(torch.equal(value, torch.ones_like(value)) for value in moved)
    assert (tmp_path / "run" / "samples").is_dir() and (tmp_path / "run" / "report.html").is_file()
    read = read_run(tmp_path / "run")
    assert read.config["data_set"] == "files" and not read.recipe_difference
    found = []
    for world in (1, 2, 3):
        code, children = ends(f"eval{world}", world, eval="true", ms_flip="true", image_scale="128 96")
        assert code == [0] * world, children[0].text()
        found.append(json.loads((tmp_path / "run" / "eval.json").read_text()))
    assert found[0] == found[1] == found[2] and found[0]["images"] == 7 and found[0]["ms_flip"]
    assert len(found[0]["per_class"]) == 6


@pytest.mark.parametrize("change, code, named", [
    ("another size", "unreadable_image", "10x12"),
    ("outside", "unreadable_image", "label 77"),
    ("no label map", "missing_data", "0003.png"),
    ("no images", "missing_data", "no images"),
    ("no folder", "missing_data", "training"),
    ("one class", "unexpected_classes", "--classes")])
def test_bad_data_gets_one_sentence(folder, tmp_path, change, code, named):
    import shutil
    shutil.copytree(folder, tmp_path / "data")
    maps = tmp_path / "data" / "annotations" / "training"
    for path in sorted(maps.iterdir()):
        if change == "another size":
            Image.fromarray(np.ones((12, 10), np.uint8)).save(path)
        elif change == "outside":
            Image.fromarray(np.full(scenes.SIZE, 77, np.uint8)).save(path)
        elif change == "no label map" and path.name == "0003.png":
            path.unlink()
    if change == "no images":
        shutil.rmtree(tmp_path / "data" / "images" / "training")
        (tmp_path / "data" / "images" / "training").mkdir()
    if change == "no folder":
        shutil.rmtree(tmp_path / "data" / "images" / "training")
    if change == "one class":
        (tmp_path / "data" / "classes.txt").write_text("only\n")
    with refused(code, named):
        find_data(options(tmp_path / "data"), None, True, False)


def test_one_bad_pair_is_replaced_in_training_and_counts_as_incorrect_in_evaluation(folder, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path / "data")
    for split in ("training", "validation"):
        (tmp_path / "data" / "images" / split / "0001.png").write_bytes(b"no image")
    data = find_data(options(tmp_path / "data"), None, True, True)
    batch = data.train.__getitems__([(0, 1, 0), (0, 2, 1)])
    assert [index for index, _ in batch.unreadable] == [1] and batch.boxes[:, 0, 2:].min() > 0
    whole = data.val.__getitems__([1])
    assert whole.images == [] and whole.targets.shape == (1, *scenes.SIZE) and whole.unreadable[0][0] == 1
    with pytest.raises(BadImage):
        data.val.read(1)


@pytest.mark.parametrize("changes, code, named", [
    (dict(updates=7), "contradiction", "--check_every"), (dict(head="uper"), "invalid_value", "--head"),
    (dict(mixup=0.8), "unknown_flag", "--mixup"), (dict(crop_size=8), "invalid_value", "--crop_size"),
    (dict(batch_size=1, global_batch=1), "contradiction", "--batch_size"),
    (dict(data_path=None), "missing_data", "annotations/")])
def test_mistakes_in_options(folder, capsys, caplog, changes, code, named):
    with caplog.at_level("ERROR", "hornet"):
        assert run(argv(folder, None, **changes)) == 2
    text = caplog.text + capsys.readouterr().err
    assert named in text and "Traceback" not in text


def test_pairs_and_own_layout(folder, tmp_path):
    split = find_pairs(options(folder), "val")
    assert len(split.images) == len(split.labels) == 7 and split.labels[0].endswith("annotations/validation/0000.png")
    own = options(folder, data_path=folder / "images", label_path=folder / "annotations", zero_ignored="false")
    assert find_pairs(own, "train").images[0].endswith("images/training/0000.png")
    image, labels = LabelledImages(split, 7, own).read(0)
    assert image.shape[:2] == labels.shape and labels.min() >= 1


def test_predict_and_export(folder, tmp_path):
    from dense import export, predict
    from dense.evaluation import load_segmentor
    values = options(folder)
    torch.manual_seed(1)
    model = build_segmentor(values, 6)
    args = parse(argv(folder, None), SegmentationOptions).to_dict()
    names = (folder / "classes.txt").read_text().split()
    torch.save({"format": 3, "model": model.state_dict(), "args": args, "classes": names}, tmp_path / "c.pth")
    trained = load_segmentor(tmp_path / "c.pth")
    assert trained.options.head_width == 8 and trained.classes == names
    (tmp_path / "broken.png").write_bytes(b"no")
    images = [str(folder / "images" / "validation"), str(tmp_path / "broken.png")]
    call = predict.arguments().parse_args([*images, "--resume", str(tmp_path / "c.pth"), "--out", str(tmp_path / "out"),
                                           "--device", "cpu"])
    assert predict.run(call) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found) == 8 and sum("error" in each for each in found) == 1
    assert sum(row["share"] for row in found[0]["classes"]) == pytest.approx(1, abs=1e-4)
    labels = np.asarray(Image.open(tmp_path / "out" / "0000.png"))
    assert labels.shape == scenes.SIZE and labels.max() < 6
    rows = [row for row in json.loads((tmp_path / "out" / "coco.json").read_text()) if row["image_id"] == 0]
    for row in rows:
        counts, mask = row["segmentation"]["counts"], labels == row["category_id"] - 1
        flat = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool)
        assert np.array_equal(flat.reshape(mask.shape, order="F"), mask)
    assert export.arguments().parse_args(["--resume", "x", "--out", "y"]).out == "y"
