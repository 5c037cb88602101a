"""Pixels, samples, metrics, annotation files and recipes are the published ones; mistakes in files are one sentence."""
import copy
import json
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config.options import Options
from config.parse import RECIPES, parse
from dense import coco, coco_images, data, pixels
from dense.coco_images import Scales, network_input
from dense.detection_task import find_data
from dense.evaluation import SEGMENTOR
from dense.inference import scaled_boxes
from dense.optim import DenseSchedule, scale_by_depth
from dense.options import DetectionOptions, SegmentationOptions
from dense.pixels import distort, fitted, normalised, resize, resize_labels
from dense.segmentation_task import count_pixels, scores
from optim.groups import param_groups
from tests.kits.dense import DENSE, Scripted, check_image, dense_masks, files, given, row_of, stored
from tests.kits.errors import refused


def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def test_scaled_sizes():
    for box, table in stored("pipelines/sizes.json")["table"].items():
        for size, (width, height) in table.items():
            w, h = map(int, size.split("x"))
            assert fitted((h, w), [int(n) for n in box.split("x")]) == (height, width), (box, size)


@pytest.mark.parametrize("key", stored("pipelines/test_transform.json"))
def test_evaluation_pipeline(key):
    expected = stored("pipelines/test_transform.json")[key]
    kind, box, index, size = key.split("|")
    image = given(f"parity_image({index}, {size.replace('x', ', ')})").numpy()
    if kind == "seg":
        options = SegmentationOptions(image_scale=tuple(int(side) for side in box.split("x")))
        scaled = data.at_scales(image, options)[0].numpy()
        x = normalised(torch.from_numpy(scaled)[None])
    else:
        scaled = coco_images.test_transform(image, Scales())
        x = network_input(scaled, torch.device("cpu"))
    assert crc(scaled) == expected["resized_rgb_crc32"] and list(scaled.shape[:2]) == expected["img_shape"]
    factors = [new / old for new, old in zip(scaled.shape[1::-1], image.shape[1::-1])]
    assert factors == pytest.approx(expected["scale_factor"], rel=1e-6)
    assert list(x.shape[2:]) == expected["pad_shape"]
    check_image(x[0].numpy(), expected)


@pytest.mark.parametrize("case", stored("pipelines/seg_train.json"), ids=lambda case: case["picture"][13:15])
def test_training_pipeline_of_segmentation(case):
    options = SegmentationOptions(crop_size=case["crop"])
    ratio = {350: 0.171, 153: 0.075}[case["scale"][0]]
    assert list(scaled_boxes(options.image_scale, [ratio])[0]) == case["scale"]
    labels = given(case["labels"])[0].numpy().astype(np.int16)
    assert list(fitted(labels.shape, case["scale"])) == case["resized_hw"]
    # The published range of the ratio never makes such small images, so it is opened.
    options.jitter = (0.0, 2.0)
    draws = Scripted([ratio, *case["offset_yx"], 0.4 if case["flip"] else 0.6, 0, 0, 0, 0, 0])
    image, labels = data.sample(given(case["picture"]).numpy(), labels, draws, options)
    padded, maps = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    data.pad_into(padded[0], image, 0)
    data.pad_into(maps, labels, 255)
    check_image(normalised(torch.from_numpy(padded), torch.tensor([labels.shape]))[0].numpy(), case["image"])
    assert not draws.draws and crc(maps) == case["label_crc32"]
    assert (int((maps == 255).sum()), int(maps.sum())) == (case["label_ignored"], case["label_sum"])


@pytest.mark.parametrize("case", stored("pipelines/det_train.json"), ids=["whole", "cropped"])
def test_training_pipeline_of_detection(case):
    image, scales = given(case["picture"]).numpy(), Scales()
    height, width = image.shape[:2]
    boxes = given(case["boxes"].partition(", labels")[0]).numpy()
    objects = coco.Objects(boxes, np.arange(6), dense_masks(boxes, height, width))
    first, crop = case["first_resize"], case["crop_hw"]
    draws = [0, scales.train.index(first[0])] if crop is None else [
        1, scales.before_crop.index(first[0]), *crop, *case["crop_offset_yx"],
        scales.train.index(case["second_resize"][0])]
    image, found = coco_images.train_transform(image, objects, Scripted([int(case["flip"]), *draws]), scales)
    x = network_input(image, torch.device("cpu"))[0].numpy()
    assert list(image.shape[:2]) == case["img_shape"]
    assert list(x.shape[1:]) == case["pad_shape"] == case["mask_shape"]
    np.testing.assert_allclose(found.boxes, case["out_boxes"], rtol=1e-5, atol=1e-3)
    assert found.labels.tolist() == case["out_labels"]
    assert found.masks.sum(axis=(1, 2)).tolist() == case["mask_areas"]
    check_image(x, case["image"])


def test_labels_are_resized_to_the_nearest():
    for case, expected in stored("pipelines/labels.json").items():
        box, _ = case.split("|")
        labels = given(expected["labels"])[0].numpy().astype(np.uint8)
        found = resize_labels(labels, fitted(labels.shape, [int(n) for n in box.split("x")]))
        assert list(found.shape) == expected["size"] and crc(found) == expected["crc32"]
        h, w = found.shape
        rows, columns = [h // 2, h // 3, -1, h // 4], [w // 3, w // 2, -1, 2]
        assert found[rows, columns].tolist() == expected["probes"]
        assert int(found.sum()) == expected["sum"]


@pytest.mark.parametrize("case", stored("pipelines/photometric.json"))
def test_photometric_distortion(case):
    draws = Scripted(case["draws"])
    found = distort(given(case["picture"]).numpy(), draws)
    assert not draws.draws and crc(found) == case["crc32_rgb"]
    assert found[[0, 10, 24, 47], [0, 20, 63, 33]].tolist() == case["probes"]
    assert found.mean(axis=(0, 1)) == pytest.approx(case["mean_rgb"], rel=1e-9)


def test_a_missing_opencv_is_one_line(logged, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert pixels.opencv.__wrapped__() is None
    assert [("pip install opencv-python-headless" in line) for line in logged.messages] == [True]


def test_without_opencv_pixels_are_at_most_one_level_away(monkeypatch):
    image = given("parity_image(5, 131, 97)").numpy()
    sizes = [(61, 83), (194, 262), (97, 131), (333, 100)]
    hsv = pixels.to_hsv(image)
    exact = [*(resize(image, size) for size in sizes), hsv, pixels.from_hsv(hsv)]
    monkeypatch.setattr(pixels, "opencv", lambda: None)
    own = [*(resize(image, size) for size in sizes), pixels.to_hsv(image), pixels.from_hsv(hsv)]
    for a, b in zip(exact, own):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize("file", files("metrics/miou*"))
def test_mean_iou(file):
    arrays, expected = stored(file)
    confusion = torch.zeros(expected["classes"], expected["classes"] + 1, dtype=torch.int64)
    for labels, predicted in zip(arrays["labels"], arrays["predictions"]):
        count_pixels(confusion, torch.from_numpy(labels).long(), torch.from_numpy(predicted).long())
    found = scores(confusion)
    for key, entry, rounded in (("miou", "mIoU", "IoU"), ("macc", "mAcc", "Acc"), ("aacc", "aAcc", "aAcc")):
        assert found[key] / 100 == pytest.approx(expected[entry], rel=1e-9)
        assert round(found[key], 2) == expected["rounded"][rounded]
    for key, absent in (("iou", "absent"), ("acc", "absent_acc")):
        each = [np.nan if value is None else 100 * value for value in expected[key]]
        assert found[key] == pytest.approx(each, rel=1e-9, nan_ok=True)
        assert np.isnan(found[key]).sum() == expected[absent]


# COCO's annotation files and figures

@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def library(request, monkeypatch):
    """Either library, the other one not installed."""
    pytest.importorskip(request.param)
    coco.coco_tools.cache_clear()
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    yield request.param
    coco.coco_tools.cache_clear()


def test_average_precision(library):
    expected = stored("metrics/coco_expected.json")
    figures = coco.average_precision(str(DENSE / "metrics" / "coco_annotations.json"),
                                     stored("metrics/coco_results.json"))
    each = {kind: figures[kind].pop("per_category") for kind in figures}
    for kind, found in figures.items():
        assert found == pytest.approx(expected[kind], abs=1e-9)
    rounded = [round(value, 4) for found in figures.values() for value in [*found.values()][:6]]
    assert rounded == [*expected["mmdet"].values()]
    assert {str(number): value for number, value in each["bbox"].items()} == pytest.approx(
        expected["bbox_per_category"], abs=1e-9)
    # Areas of masks count for masks, not those of boxes.
    other = expected["segm_with_box_areas"]
    assert {name for name in other if figures["segm"][name] != pytest.approx(other[name])} == {"APs", "APl"}
    assert coco.coco_tools()[0].__module__.split(".")[0] == library


def test_without_either_library_is_one_sentence(monkeypatch):
    for name in ("faster_coco_eval", "pycocotools"):
        monkeypatch.setitem(sys.modules, name, None)
    coco.coco_tools.cache_clear()
    with refused("missing_package", "pip install pycocotools"):
        coco.coco_tools()


CONTENT = {
    "images": [{"id": 7, "file_name": "a.png", "height": 48, "width": 64},
               {"id": 8, "file_name": "b.png", "height": 48, "width": 64}],
    "categories": [{"id": 3, "name": "disc"}, {"id": 1, "name": "box"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [4, 5, 20, 10], "area": 200, "iscrowd": 0,
         "segmentation": [[4, 5, 24, 5, 24, 15, 4, 15]]},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1,
         "segmentation": {"size": [48, 64], "counts": [0, 9, 3063]}}]}


def write(folder, content=CONTENT) -> None:
    (folder / "annotations").mkdir()
    (folder / "val").mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations" / "instances_val.json").write_text(text)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8)).save(folder / "val" / name)


def test_objects_of_an_annotation_file(tmp_path):
    write(tmp_path)
    found = coco.read_coco(str(tmp_path), "val", train=True)
    assert found.class_names == ["box", "disc"] and len(found.photos) == 1
    assert len(found.left_out) == 2 and "1 image" in found.left_out[0] and "1 annotation" in found.left_out[1]
    objects = found.objects(0)
    assert objects.boxes.tolist() == [[4, 5, 24, 15]] and objects.labels.tolist() == [1]
    assert objects.masks.shape == (1, 48, 64) and objects.masks.sum() == 200
    assert len(coco.read_coco(str(tmp_path), "val", train=False).photos) == 2


def changed(part: str, row: int, **values) -> dict:
    content = copy.deepcopy(CONTENT)
    content[part][row] |= values
    return content


@pytest.mark.parametrize("content, code, names", [
    (json.dumps(CONTENT)[:200], "broken_annotations", "instances_val.json"),
    ("[1, 2]", "broken_annotations", "instances_val.json"),
    ({"images": [], "categories": []}, "broken_annotations", "annotations"),
    ({**CONTENT, "images": [{"id": 7, "file_name": "a.png"}]}, "broken_annotations", "height"),
    (changed("annotations", 0, category_id=99), "unknown_category", "99"),
    (changed("annotations", 0, image_id=99), "broken_annotations", "image 99"),
    (changed("annotations", 0, bbox=[70, 5, 20, 10]), "box_outside", "[70, 5, 20, 10]"),
    (changed("annotations", 0, bbox=[1, 2, float("nan"), 4]), "broken_annotations", "nan"),
    (changed("images", 1, file_name="c.png"), "missing_data", "c.png"),
    ({**CONTENT, "categories": []}, "broken_annotations", "categories"),
    (changed("categories", 0, id=1), "broken_annotations", "categories"),
    ({**CONTENT, "annotations": []}, "empty_data", "annotations"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "")
def test_mistakes_are_one_sentence(tmp_path, content, code, names):
    write(tmp_path, content)
    with refused(code, names):
        coco.read_coco(str(tmp_path), "val", train=True)


def test_missing_annotations_and_other_categories(tmp_path):
    write(tmp_path)
    with refused("missing_data", "instances_train2017.json"):
        coco.read_coco(str(tmp_path), "train2017", train=True)
    with refused("other_classes", "box, plate"):
        find_data(DetectionOptions(data_path=str(tmp_path), val_set="val"), ["box", "plate"], train=False,
                  evaluate=True)


# Recipes

GROUPS = stored("param_groups.json.gz")
NAMES = stored("state_dicts.json.gz")
DROP_PATH = {"seg": {"tiny": 0.4, "small": 0.3, "base_7x7": 0.4, "base_gf": 0.5, "large": 0.4},
             "det": {"tiny": 0.4, "small": 0.6, "base": 0.7, "large": 0.7}}
CLIP = {"upernet_tiny_gf": 1, "upernet_small_gf": 1, "upernet_base_gf": 1, "upernet_large_gf": 0.1,
        "horfpn_small_gf": 0.1}


@pytest.mark.parametrize("config", GROUPS)
def test_recipe(config):
    kind, name, row = row_of(config)
    file, by = ("ade20k", "stage") if kind is SEGMENTOR else ("coco", "layer")
    command = ["--config", str(RECIPES / f"{file}_{name}.yaml"), "--data_path", "x"]
    options = parse(command, kind.options).options
    assert options.published is row and options.lr == GROUPS[config]["base_lr"]
    expected = GROUPS[GROUPS[config].get("same_as", config)]["groups"]
    named = [(each, SimpleNamespace(requires_grad=True, ndim=len(shape))) for each, shape in NAMES[config]
             if not each.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    scale = scale_by_depth(options.decay_rate, options.decay_layers, by)
    groups = param_groups(named, options.weight_decay, scale_of=scale)
    found = {each: [group["lr_scale"], group["weight_decay"]] for group in groups for each in group["names"]}
    assert found.keys() == expected.keys()
    assert all(found[each] == pytest.approx(values, rel=1e-12) for each, values in expected.items())
    rates = DROP_PATH[config[:3]].items()
    assert options.drop_path == next(rate for size, rate in rates if size in row.model)
    assert (options.clip_grad, options.model_ema) == (CLIP.get(name), False)
    assert (options.batch_size, options.global_batch) == (2, 16)
    large = "large_gf" in name  # starts from the model of 384 pixels, and computes activations again
    assert (options.pretrained, bool(options.finetune), options.grad_checkpointing) == (not large, large, large)
    if kind is SEGMENTOR:
        assert (options.updates, options.check_every, options.warmup_steps) == (160_000, 16_000, 1500)
        sides = {512: (341, (2048, 512)), 640: (426, (2560, 640))}
        assert (options.stride, options.image_scale) == sides[row.crop]
    else:
        length = {"cascade_mask_rcnn": (36, (27, 33)), "mask_rcnn": (12, (8, 11))}
        assert (options.epochs, options.milestones) == length[row.system] and options.warmup_steps == 500


@pytest.mark.parametrize("case", stored("schedules.json"), ids=lambda case: f"{case['kind']}-{case['lr']}")
def test_schedules(case):
    options = Options(lr=case["lr"], min_lr=0.0, warmup_steps=case["warmup_iters"], epochs=case.get("epochs", 10))
    schedule = DenseSchedule(options, case.get("updates_per_epoch", 16_000), shape=case["kind"],
                             milestones=tuple(case.get("milestones", ())))
    for update, value in case["values"].items():
        assert schedule.lr(int(update)) == pytest.approx(value, rel=1e-12)
