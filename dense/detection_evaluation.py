"""`--eval true` of detection: find the weights, one pass over the images, average precision, the published
figure."""
from functools import partial
from pathlib import Path
from typing import cast

from common.errors import UserError
from common.files import write_json
from common.outcome import ExitCode
from config.parse import Resolved
from dense.coco import CocoSet
from dense.coco_images import CocoImages
from dense.detection_options import DetectionOptions
from dense.detection_task import build_detector, find_data, keeper, precision, results
from dense.evaluation import Kind, Trained, evaluate_each, heartbeat, load_trained, verdict
from dense.segmentation_task import share
from dense.zoo import DETECTORS
from launch.process import Process
from launch.watchdog import Watchdog

COCO_IMAGES = 5000
DETECTOR = Kind(
    noun="detector", options=DetectionOptions, background=1, joined="neck.fpn_convs.0", published=DETECTORS,
    last={"cascade_mask_rcnn": "roi_head.bbox_head.0.fc_cls.bias",
          "mask_rcnn": "roi_head.bbox_head.fc_cls.bias"},
    own=("model", "head", "system", "head_width", "layer_scale_init_value", "test_side", "longest_side"),
    of_published=lambda row: {"model": row.model, "head": row.head, "system": row.system, "head_width": 256},
    build=build_detector)
load_detector = partial(load_trained, DETECTOR)


def evaluate_detectors(resolved: Resolved, process: Process, watchdog: Watchdog) -> ExitCode:
    """Evaluate each checkpoint of `--resume`, or the best of the run's folder; the exit code."""
    return evaluate_each(resolved, process, lambda path: _evaluate(path, resolved, process, watchdog))


def _evaluate(path: str, resolved: Resolved, process: Process, watchdog: Watchdog) -> dict:
    options = cast(DetectionOptions, resolved.options)
    trained = load_detector(path, options, resolved.origins, device=process.device)
    data = process.local_first(lambda: find_data(trained.options, trained.classes if trained.named else None,
                                                 train=False, evaluate=True))
    if data.num_classes != trained.model.classes:
        raise UserError(f"{path} has {trained.model.classes} classes, the data {data.num_classes}; give the "
                        "data it was made for.", code="other_classes")
    loader = share(data, options, process, refuse_bad=not options.allow_bad_images)
    images = cast(CocoImages, data.val).rows
    try:
        found = results([trained.model], loader, images, process, heartbeat(watchdog),
                        keeper(options.output_dir, images, process))
        bad = sum(len(part) for part in process.all_gather_object(loader.take_unreadable()))
    finally:
        loader.close()
    assert found is not None
    if process.is_main and options.output_dir:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.output_dir) / "detections.json", found[0])
    return result_of(precision(found[0], images, process), trained, path, images, bad)


def result_of(found: dict[str, dict], trained: Trained, path: str, images: CocoSet, bad: int) -> dict:
    """What eval.json holds: figures in percent, settings, each class, and the comparison with the published
    box AP."""
    options, published = trained.options, trained.options.published
    result: dict = {f"{kind}_{name.lower()}": 100 * value for kind, figures in found.items()
                    for name, value in figures.items() if name != "per_category"}
    each = {name: {f"{kind}_ap": 100 * figures["per_category"][number] for kind, figures in found.items()
                   if number in figures["per_category"]}
            for number, name in zip(images.categories, images.class_names)}
    result |= {
        "checkpoint": path, "weights": trained.entry, "images": len(images.photos), "bad_images": bad,
        "model": options.model, "head": options.head, "system": options.system,
        "test_side": options.test_side, "longest_side": options.longest_side, "per_class": each}
    line = ", ".join(f"{kind} AP {result[f'{kind}_ap']:.1f} (AP50 {result[f'{kind}_ap50']:.1f})"
                     for kind in ("box", "mask"))
    comparable = published and (len(each), len(images.photos), bad) == (80, COCO_IMAGES, 0)
    there = published.box_ap if published and comparable else None
    return result | verdict(line, "box AP", result["box_ap"], there)
