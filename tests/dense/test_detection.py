"""Training and evaluating detectors: images and objects on any number of processes, resuming, mistakes."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config.parse import parse
from datasets.sample import ensure_sample
from dense import coco, predict, scenes
from dense.coco_images import OrientedSampler
from dense.detection import run
from dense.detection_task import build_detector, find_data
from dense.detector import Detector
from dense.evaluation import load_detector
from dense.options import DetectionOptions
from dense.zoo import DETECTORS
from tests.kits.dense import dense_state
from tests.kits.errors import refused
from tests.kits.processes import codes
from tests.kits.runs import assert_equal_bits, result, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fourteen drawn scenes to train on, five to evaluate, in COCO's layout."""
    path = tmp_path_factory.mktemp("coco") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "COUNTS", {"training": 14, "validation": 5})
        ensure_sample(path, coco.write_scenes, ("annotations",))
    return path


def argv(folder, output, **changes):
    values = {"model": "hornet_pico_gf", "head_width": 8, "system": "cascade_mask_rcnn", "data_path": folder,
              "train_set": "training", "val_set": "validation", "output_dir": output, "device": "cpu",
              "train_sides": "64 80 96", "test_side": 64, "longest_side": 120, "crops": "false",
              "batch_size": 2, "global_batch": 6, "epochs": 2, "milestones": 1, "lr": 0.002, "warmup_steps": 2,
              "drop_path": 0.3, "layer_scale_init_value": 0.5, "roi_samples": 16, "num_workers": 0,
              "seed": 3} | changes
    return [word for name, value in values.items() if value is not None
            for word in (f"--{name}", *str(value).split())]


def options(folder, **changes):
    return parse(argv(folder, None, **changes), DetectionOptions).options


def test_any_number_of_processes_sees_the_same_images_and_objects(folder):
    data = find_data(options(folder), None, train=True, evaluate=False).train
    landscape = np.arange(len(data)) % 3 == 0
    seen = {}
    for world in (1, 2, 3):
        parts = {}
        for rank in range(world):
            sampler = OrientedSampler(landscape, 6, 6 // world, 1, rank, world, 3)
            sampler.set_start(1, 1)
            for items in sampler:
                batch = data.__getitems__(items)
                for row, truth in enumerate(batch.truths(3, 7, torch.device("cpu"))):
                    height, width = truth.size
                    parts[int(batch.positions[row])] = [
                        batch.images[row, :height, :width], truth.boxes, truth.labels, truth.masks,
                        torch.tensor([*truth.size, *truth.key])]
        seen[world] = parts
    assert sorted(seen[1]) == list(range(6, 12)) and sum(len(row[1]) for row in seen[1].values()) > 6
    for world in (2, 3):
        assert seen[world].keys() == seen[1].keys()
        assert all(torch.equal(one, other) for key, row in seen[1].items() for one, other in zip(row, seen[world][key]))


def test_neighbours_have_one_orientation_and_no_image_is_left_out():
    landscape = np.random.default_rng(0).random(21) < 0.4
    sampler = OrientedSampler(landscape, 2, 2, 1, 0, 1, 3)
    order = sampler.order(4)
    assert sorted(order) == list(range(21)) and (order != sampler.order(5)).any()
    pairs = landscape[order[:18]].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all() and pairs.any() and not pairs.all()


def test_what_is_sampled_does_not_depend_on_the_images_beside_it(folder):
    """Losses of two images of different size, each for itself and padded to the other's size."""
    data = find_data(options(folder, system="mask_rcnn"), None, train=True, evaluate=False).train
    model = build_detector(options(folder, system="mask_rcnn", drop_path=0), 5)
    model.load_state_dict(dense_state(model))
    model.eval()
    from dense.detector_losses import rpn_losses
    sampled = []
    for wide in (0, 64):
        batch = data.__getitems__([(0, 1, 0)])
        images = torch.nn.functional.pad(batch.network_input(torch.device("cpu")), (0, wide))
        truth = batch.truths(3, 7, torch.device("cpu"))
        with torch.no_grad():
            logits, deltas = model.rpn_head(model.neck(model.backbone(images)))
            constant = [torch.ones_like(x) for x in logits], [torch.zeros_like(x) for x in deltas]
        sampled.append(rpn_losses(model.rules, *constant, truth))
    for name in sampled[0]:
        assert torch.equal(sampled[0][name], sampled[1][name])


@pytest.mark.slow
def test_a_killed_run_resumes_with_equal_bits_and_any_ranks_evaluate_alike(folder, tmp_path):
    def ends(name, world=1, hook=(), **changes):
        children = start(argv(folder, tmp_path / "run", **changes), tmp_path / name, world,
                         program="dense.detection", at=[*hook])
        return codes(children, 280), children

    assert ends("whole")[0] == [0]
    (tmp_path / "run").rename(tmp_path / "whole-run")
    kill = {"phase": "data", "update": 3, "do": "SIGKILL"}
    assert ends("killed", hook=[kill], save_every_minutes=1e-5)[0] == [-9]
    assert ends("resumed")[0] == [0]
    assert_equal_bits(result(tmp_path / "run"), result(tmp_path / "whole-run"))
    state = torch.load(tmp_path / "run" / "checkpoint-1.pth", weights_only=True)["model"]
    moved = [value for name, value in state.items() if name.endswith("running_var")]
    assert moved and not any(torch.equal(value, torch.ones_like(value)) for value in moved)
    found = []
    for world in (1, 2, 3):
        code, children = ends(f"eval{world}", world, eval="true")
        assert code == [0] * world, children[0].text()
        found.append(json.loads((tmp_path / "run" / "eval.json").read_text()))
    assert found[0] == found[1] == found[2] and found[0]["images"] == 5
    assert list(found[0]["per_class"]) == list(scenes.NAMES)
    rows = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert rows and rows[0].keys() == {"image_id", "category_id", "score", "bbox", "segmentation"}


def test_one_bad_image_is_replaced_in_training_and_has_no_objects_in_evaluation(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    for split in ("training", "validation"):
        (tmp_path / "data" / split / "0001.png").write_bytes(b"no image")
    shutil.copy(folder / "training" / "0000.png", tmp_path / "data" / "training" / "0002.png")
    data = find_data(options(tmp_path / "data"), None, train=True, evaluate=True)
    batch = data.train.__getitems__([(0, 1, 0), (0, 2, 1)])
    assert {index for index, _ in batch.unreadable} == {1} and batch.counts.min() > 0
    whole = data.val.__getitems__([1])
    assert whole.targets.tolist() == [-100] and whole.unreadable[0][0] == 1 and whole.counts.tolist() == [0]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A checkpoint of an untrained detector whose boxes are sure of themselves."""
    path = tmp_path_factory.mktemp("trained") / "checkpoint-best.pth"
    given = options(folder, system="mask_rcnn")
    model = build_detector(given, 5)
    torch.nn.init.normal_(model.roi_head.stages[0][0].fc_cls.weight, std=3.0)
    torch.save({"model": model.state_dict(), "format": 2, "epoch": 0, "classes": list(scenes.NAMES),
                "args": {"model": given.model, "system": "mask_rcnn", "head_width": 8, "test_side": 64,
                         "longest_side": 120, "layer_scale_init_value": 0.5}}, path)
    return path


def test_predictions_of_a_folder(folder, trained, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "validation", images)
    (images / "0003.png").write_bytes(b"no image")
    assert predict.run(predict.arguments().parse_args([str(images), "--resume", str(trained), "--out",
                                                       str(tmp_path / "out"), "--device", "cpu"])) == 0
    plain, rows = (json.loads((tmp_path / "out" / name).read_text()) for name in ("predictions.json", "coco.json"))
    assert len(plain) == 5 and "error" in plain[3] and len(list((tmp_path / "out").glob("*.jpg"))) == 4
    assert {"class", "score", "box"} == plain[0]["objects"][0].keys()
    assert sum(len(each.get("objects", ())) for each in plain) == len(rows)
    found = predict.load(trained)(Image.open(images / "0000.png"))
    first = next(row for row in rows if row["image_id"] == 0)
    assert first["score"] == pytest.approx(float(found.scores[0])) and first["category_id"] == found.labels[0] + 1
    assert (coco.decoded(first["segmentation"], (96, 96)) == found.masks[0].numpy()).all()


def test_an_evaluation_keeps_drawings_and_figures(folder, trained, tmp_path, capsys):
    assert run(argv(folder, tmp_path / "run", eval="true", resume=trained, model=None, system=None, head_width=None,
                    test_side=None, longest_side=None, layer_scale_init_value=None)) == 0
    assert "box AP " in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["images"] == 5 and result["verdict"] == "" and result["test_side"] == 64
    assert len(list((tmp_path / "run" / "samples").glob("*.jpg"))) == 5


def test_a_dry_run(folder, capfd):
    assert run(argv(folder, None, dry_run="true")) == 0
    text = "".join(capfd.readouterr())
    assert "5 classes" in text and "Traceback" not in text


def test_run_lengths_are_cocos():
    mask = np.random.default_rng(0).random((7, 5)) < 0.5
    for each in (mask, ~mask, mask & False, mask | True):
        assert (coco.decoded(coco.run_lengths(each), (7, 5)) == each).all()


def test_each_published_detector_has_a_recipe():
    found = {}
    for file in (Path(__file__).parents[2] / "recipes").glob("coco_*.yaml"):
        given = parse(["--config", str(file), "--data_path", "COCO"], DetectionOptions).options
        found[given.published.config] = given
    assert found.keys() == {row.config for row in DETECTORS.values()}
    for name, given in found.items():
        size = next(size for size in ("tiny", "small", "base", "large") if size in name)
        cascade = {"tiny": (2e-4, 0.4, 0.7), "small": (2e-4, 0.6, 0.7), "base": (2e-4, 0.7, 0.8),
                   "large": (1e-4, 0.7, 0.7)}[size]
        values = given.lr, given.drop_path, given.decay_rate, given.decay_layers, given.epochs, given.milestones
        assert values == ((*cascade, 12, 36, (27, 33)) if "cascade" in name
                          else (1e-4, 0.6, 0.95, 6, 12, (8, 11)))


def test_other_categories_in_the_two_sets(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_validation.json"
    file.write_text(file.read_text().replace('"disc"', '"plate"'))
    with refused("other_classes", "plate"):
        find_data(options(tmp_path / "data"), None, train=True, evaluate=True)


@pytest.mark.parametrize("changes, named", [
    (dict(system="ssd"), "--system"), (dict(mixup=0.8), "--mixup"), (dict(train_sides=8), "--train_sides"),
    (dict(data_path=None), "annotations/"), (dict(train_set="train2017"), "instances_train2017.json")])
def test_mistakes_in_options(folder, capsys, caplog, changes, named):
    with caplog.at_level("ERROR", "hornet"):
        assert run(argv(folder, None, **changes)) == 2
    text = caplog.text + capsys.readouterr().err
    assert named in text and "Traceback" not in text


@pytest.mark.parametrize("name", DETECTORS)
def test_published_files_load_strictly_by_their_shape_alone(name, tmp_path):
    """Generated files with the published names and shapes; those of the large ones are not written."""
    row = DETECTORS[name]
    with torch.device("meta"):
        model = build_detector(DetectionOptions(model=row.model, head=row.head, system=row.system), 80)
    assert sum(value.numel() for value in model.parameters()) == row.params
    if row.params > 80_000_000:
        return
    state = {f"module.{key}": torch.full(value.shape, 0.5).half() for key, value in model.state_dict().items()
             if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "file.pth")
    found = load_detector(tmp_path / "file.pth")
    assert isinstance(found.model, Detector) and found.options.published == row
    assert (found.model.roi_head.stages[-1][0].fc_cls.bias == 0.5).all()
