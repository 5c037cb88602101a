"""Images and objects in COCO's layout, and COCO's average precision.

    data_path/annotations/instances_SET.json        images, annotations, categories
    data_path/SET/                                   the images that it names

pycocotools, or faster-coco-eval where it is installed, reads masks and computes the precision.
"""
import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError
from common.text import plural, printable
from datasets.images import BadImage, decode, read_file
from dense.scenes import NAMES, draw

COUNTS = {"training": 1000, "validation": 100}  # drawn scenes; many, as a detector evaluates after each epoch
SMALLEST = 32  # sides of images to train on
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@cache
def coco_tools() -> tuple[Any, Any, Any]:
    """The classes COCO and COCOeval and the module of masks of an installed library."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
        from faster_coco_eval.core import mask
    except ImportError:
        try:
            from pycocotools import mask
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError:
            raise UserError("Detection reads masks and computes average precision with pycocotools, which is "
                            "not installed: pip install pycocotools.", code="missing_package") from None
    return COCO, COCOeval, mask


@dataclass(frozen=True)
class Objects:
    """What is annotated in one image: boxes float32 (n, 4) as x1, y1, x2, y2, labels int64 (n,) in the order
    of the classes, and masks uint8 (n, height, width)."""
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Photo:
    """One row of an annotation file: its id, the image's path and size (height, width), its annotations."""
    id: int
    path: str
    size: tuple[int, int]
    annotations: list[dict]


@dataclass(frozen=True, kw_only=True)
class CocoSet:
    """The images of an annotation file.

    Attributes:
        file: the annotation file.
        photos: its images, those to train on where training is asked for.
        categories: category id -> position of the class.
        class_names: in order of their ids.
        left_out: sentences on what takes no part.
    """
    file: str
    photos: list[Photo]
    categories: dict[int, int]
    class_names: list[str]
    left_out: list[str]

    def objects(self, index: int) -> Objects:
        """Objects of image `index` with their masks."""
        photo = self.photos[index]
        masks = [decoded(row["segmentation"], photo.size) for row in photo.annotations]
        box = np.array([row["bbox"] for row in photo.annotations], dtype=np.float32).reshape(-1, 4)
        labels = [self.categories[row["category_id"]] for row in photo.annotations]
        return Objects(np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1),
                       np.array(labels, dtype=np.int64),
                       np.stack(masks) if masks else np.zeros((0, *photo.size), dtype=np.uint8))

    def pixels(self, index: int) -> np.ndarray:
        """Image `index`, uint8 (H, W, 3); BadImage when unreadable or not of the annotated size."""
        photo = self.photos[index]
        image = np.asarray(decode(read_file(photo.path), exif_orientation=True))
        if image.shape[:2] != photo.size:
            raise BadImage("{1}x{0} pixels, annotated as {3}x{2}".format(*image.shape[:2], *photo.size))
        return image


def decoded(segmentation: list | dict, size: tuple[int, int]) -> np.ndarray:
    """Polygons, or counts of a run-length code, as a mask uint8 (height, width)."""
    tools = coco_tools()[2]
    if isinstance(segmentation, list):
        return tools.decode(tools.merge(tools.frPyObjects(segmentation, *size)))
    if isinstance(segmentation["counts"], list):
        segmentation = tools.frPyObjects(segmentation, *size)
    return tools.decode(segmentation)


def read_coco(data_path: str, part: str, *, train: bool) -> CocoSet:
    """The images of `part` (such as train2017), checked; for training without crowds, empty or tiny ones.

    Raises: UserError for a missing or broken file, missing images, boxes outside, unknown categories.
    """
    file = Path(data_path, "annotations", f"instances_{part}.json")
    content = _content(file)
    categories = sorted((row["id"], str(row["name"])) for row in content["categories"])
    if not categories or len({number for number, _ in categories}) < len(categories):
        raise UserError(f"{file} names no categories, or two of one id; give each class an id of its own.",
                        code="broken_annotations")
    rows: dict[int, list[dict]] = {row["id"]: [] for row in content["images"]}
    sizes = {row["id"]: (row["height"], row["width"]) for row in content["images"]}
    for row in content["annotations"]:
        _check_annotation(row, file, sizes, {number for number, _ in categories})
        rows[row["image_id"]].append(row)
    _check_images(file, Path(data_path, part), [str(row["file_name"]) for row in content["images"]])
    used, left_out = {}, []
    for number, annotations in rows.items():
        used[number] = [row for row in annotations if not train or _takes_part(row, sizes[number])]
    dropped = len(content["annotations"]) - sum(map(len, used.values()))
    kept = [row for row in content["images"]
            if not train or rows[row["id"]] and min(sizes[row["id"]]) >= SMALLEST]
    if not kept:
        raise UserError(f"{file} leaves no image to work with; it needs images with annotations, of at least "
                        f"{SMALLEST} pixels.", code="empty_data")
    if len(kept) < len(content["images"]):
        left_out.append(f"{file.name}: {plural(len(content['images']) - len(kept), 'image')} without "
                        f"annotations or below {SMALLEST} pixels take no part in training")
    if dropped:
        left_out.append(f"{file.name}: {plural(dropped, 'annotation')} of crowds, marked ignore or below a "
                        "pixel take no part in training")
    photos = [Photo(row["id"], str(Path(data_path, part, row["file_name"])), sizes[row["id"]],
                    used[row["id"]]) for row in kept]
    return CocoSet(file=str(file), photos=photos, left_out=left_out,
                   class_names=[name for _, name in categories],
                   categories={number: place for place, (number, _) in enumerate(categories)})


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        for name, keys in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name")),
                           ("annotations", ("image_id", "category_id", "bbox", "segmentation"))):
            for number, row in enumerate(content[name]):
                missing = [key for key in keys if key not in row]
                if missing:
                    raise UserError(f"{file}: entry {number} of its {name} has no {missing[0]}; see COCO's "
                                    "format.", code="broken_annotations")
    except FileNotFoundError:
        raise UserError(f"{file} is missing: --data_path takes a folder in COCO's layout, annotations/ with "
                        "instances_SET.json beside the folders of images.", code="missing_data")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no annotation file in COCO's format ({type(error).__name__}: {error}); "
                        "copy or write it again.", code="broken_annotations")
    return content


def _check_annotation(row: Mapping[str, Any], file: Path, sizes: Mapping[int, tuple[int, int]],
                      categories: set[int]) -> None:
    name = f"{file}: annotation {row.get('id', '')} of image {row['image_id']}"
    if row["image_id"] not in sizes:
        raise UserError(f"{name} belongs to no image of the file; add the image or remove it.",
                        code="broken_annotations")
    if row["category_id"] not in categories:
        raise UserError(f"{name} is of category {row['category_id']}, which the file does not list among its "
                        "categories; add it there.", code="unknown_category")
    box, (height, width) = row["bbox"], sizes[row["image_id"]]
    if len(box) != 4 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        raise UserError(f"{name} has the box {box}; four numbers x, y, width, height are needed.",
                        code="broken_annotations")
    x, y, across, down = box
    if across >= 1 and down >= 1 and (x >= width or y >= height or x + across <= 0 or y + down <= 0):
        raise UserError(f"{name} has the box {box}, which lies outside the image of {width}x{height} pixels; "
                        "boxes are x, y, width, height in pixels.", code="box_outside")


def _takes_part(row: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether an annotation is learned from: no crowd, not marked ignore, at least a pixel inside."""
    x, y, across, down = row["bbox"]
    inside = min(x + across, size[1]) > max(x, 0) and min(y + down, size[0]) > max(y, 0)
    return bool(inside and across >= 1 and down >= 1 and row.get("area", 1) > 0 and row["segmentation"]
                and not row.get("iscrowd") and not row.get("ignore"))


def _check_images(file: Path, folder: Path, names: Sequence[str]) -> None:
    parents = {Path(name).parent for name in names}
    present = {str(parent / name) for parent in parents if (folder / parent).is_dir()
               for name in os.listdir(folder / parent)}
    missing = [name for name in names if str(Path(name)) not in present]
    if missing:
        raise UserError(f"{plural(len(missing), 'image')} of {file} are missing in {folder}, such as "
                        f"{printable(missing[0])}; copy them there.", code="missing_data")


def encoded(masks: Iterable[np.ndarray]) -> list[dict]:
    """Masks, bool (height, width), as compressed run-length codes in JSON's types."""
    found = [coco_tools()[2].encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [{"size": [int(side) for side in code["size"]], "counts": code["counts"].decode()
             if isinstance(code["counts"], bytes) else code["counts"]} for code in found]


def average_precision(file: str, results: Sequence[dict]) -> dict[str, dict]:
    """COCO's figures of results ({"image_id", "category_id", "score", "bbox", "segmentation"}) by "bbox" and
    "segm": those of FIGURES, 0 to 1, and under "per_category" the AP of each category's id that is annotated.

    Sizes are those of boxes for boxes and of masks for masks.
    """
    coco, evaluator, _ = coco_tools()
    figures = {}
    with contextlib.redirect_stdout(io.StringIO()):  # the libraries print tables
        truth = coco(file)
        for kind in ("bbox", "segm"):
            # With boxes beside the masks, the areas of boxes would count.
            rows = [{key: value for key, value in row.items() if kind == "bbox" or key != "bbox"}
                    for row in results]
            if not rows:
                figures[kind] = dict.fromkeys(FIGURES, 0.0) | {"per_category": {}}
                continue
            run = evaluator(truth, truth.loadRes(rows), kind)
            run.evaluate()
            run.accumulate()
            run.summarize()
            precision = run.eval["precision"][:, :, :, 0, -1]
            each = {number: values[values > -1] for number, values
                    in zip(run.params.catIds, precision.transpose(2, 0, 1))}
            figures[kind] = dict(zip(FIGURES, map(float, run.stats))) | {"per_category": {
                number: float(values.mean()) for number, values in each.items() if values.size}}
    return figures


def write_scenes(folder: Path) -> None:
    """Fill `folder` with the drawn scenes: annotations/ and one folder of images for each split."""
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)]
    (folder / "annotations").mkdir(parents=True)
    for split, count in COUNTS.items():
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            image, shapes = draw(index, split)
            height, width = image.shape[:2]
            images.append({"id": index, "file_name": f"{index:04d}.png", "height": height, "width": width})
            Image.fromarray(image).save(folder / split / f"{index:04d}.png")
            for kind, mask in shapes:
                rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
                box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": index, "category_id": kind + 1, "iscrowd": 0,
                    "bbox": [int(side) for side in box], "area": int(mask.sum()),
                    "segmentation": run_lengths(mask)})
        content = {"images": images, "categories": categories, "annotations": annotations}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def run_lengths(mask: np.ndarray) -> dict:
    """A mask, bool (height, width), as COCO's plain run-length code: lengths of 0s, 1s, … by columns."""
    flat = mask.ravel(order="F")
    ends = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    return {"size": [*mask.shape], "counts": [0] * bool(flat[0]) + np.diff(ends).tolist()}
