"""COCO's layout: figures of average precision, objects, mistakes in annotation files."""
import copy
import json
import sys

import numpy as np
import pytest
from PIL import Image

from dense import coco
from dense.detection_task import find_data
from dense.options import DetectionOptions
from tests.kits.dense import DENSE, stored
from tests.kits.errors import refused


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
        rounded = {f"{kind}_mAP{end}": round(value, 4) for end, value in zip(
            ("", "_50", "_75", "_s", "_m", "_l"), found.values())}
        assert rounded == {name: value for name, value in expected["mmdet"].items() if name in rounded}
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
    codes = coco.encoded(objects.masks.astype(bool))
    assert json.dumps(codes) and (coco.decoded(codes[0], (48, 64)) == objects.masks[0]).all()


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
