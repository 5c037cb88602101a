"""Pipelines give the published pixels: sizes, resizing, labels, photometric distortion, whole samples."""
import sys
import zlib

import numpy as np
import pytest
import torch

from dense import coco_images, pixels
from dense.coco import Objects
from dense.coco_images import Scales, network_input
from dense.data import at_scales, pad_into, sample
from dense.inference import scaled_boxes
from dense.options import SegmentationOptions
from dense.pixels import distort, fitted, normalised, resize, resize_labels
from dense.segmentation_task import count_pixels, scores
from tests.kits.dense import Scripted, check_image, dense_masks, given, stored


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
        scaled = at_scales(image, options)[0].numpy()
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
    image, labels = sample(given(case["picture"]).numpy(), labels, draws, options)
    padded, maps = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    pad_into(padded[0], image, 0)
    pad_into(maps, labels, 255)
    check_image(normalised(torch.from_numpy(padded), torch.tensor([labels.shape]))[0].numpy(), case["image"])
    assert not draws.draws and crc(maps) == case["label_crc32"]
    assert (int((maps == 255).sum()), int(maps.sum())) == (case["label_ignored"], case["label_sum"])


@pytest.mark.parametrize("case", stored("pipelines/det_train.json"), ids=["whole", "cropped"])
def test_training_pipeline_of_detection(case):
    image, scales = given(case["picture"]).numpy(), Scales()
    height, width = image.shape[:2]
    boxes = given(case["boxes"].partition(", labels")[0]).numpy()
    objects = Objects(boxes, np.arange(6), dense_masks(boxes, height, width))
    if case["crop_hw"] is None:
        draws = [case["flip"], 0, scales.train.index(case["first_resize"][0])]
    else:
        draws = [case["flip"], 1, scales.before_crop.index(case["first_resize"][0]), *case["crop_hw"],
                 *case["crop_offset_yx"], scales.train.index(case["second_resize"][0])]
    image, found = coco_images.train_transform(image, objects, Scripted(map(int, draws)), scales)
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


@pytest.mark.parametrize("name", ["miou_150", "miou_7"])
def test_mean_iou(name):
    arrays, expected = stored(f"metrics/{name}.npz")
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
