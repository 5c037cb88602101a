"""The options of detection. No torch in here."""
from dataclasses import dataclass
from typing import ClassVar

from config.options import Accepts, at_least, one_of
from dense.options import DenseOptions, option
from dense.zoo import DETECTORS, Published

_MODEL, _TRAINING, _DATA, _EVALUATION = "Model and weights", "Training", "Data", "Evaluation"
_SIDES = Accepts("from 32 pixels on, several in one or more words", lambda v: len(v) > 0 and min(v) >= 32)


@dataclass
class DetectionOptions(DenseOptions):
    """The options of `python -m dense.detection`."""
    USAGE: ClassVar[str] = """dense.detection [--config RECIPE] [--FLAG VALUE ...]

  python -m dense.detection --config recipes/quickstart_detection.yaml
  python -m dense.detection --config recipes/coco_cascade_tiny_gf.yaml --data_path COCO --output_dir RUN
  python -m dense.detection --config recipes/coco_cascade_tiny_gf.yaml --data_path COCO \\
      --eval true --resume CHECKPOINT"""
    LAYOUT: ClassVar[str] = "annotations/ and the folders of images"
    QUICKSTART: ClassVar[str] = "quickstart_detection"
    SAMPLE: ClassVar[str] = "data/scenes-coco"

    data_path: str = option(_DATA, "", "folder of annotations/ (instances_SET.json) and of each "
                            "SET's images")
    train_set: str = option(_DATA, "train2017", "the SET to train on")
    val_set: str = option(_DATA, "val2017", "the SET to evaluate")
    system: str = option(_MODEL, "cascade_mask_rcnn", "how objects are found",
                         one_of("mask_rcnn", "cascade_mask_rcnn"))
    head_width: int = option(_MODEL, 256, "channels of pyramid and heads", at_least(8, 4096))
    drop_path: float = option(_MODEL, 0.4, "rate of stochastic depth in the last block",
                              Accepts("from 0 to below 1", lambda v: 0 <= v < 1))
    epochs: int = option(_TRAINING, 36, "passes over the training images", at_least(1, 10 ** 6))
    milestones: tuple[int, ...] = option(_TRAINING, (27, 33), "epochs after which the learning rate is a "
                                         "tenth")
    warmup_steps: int = option(_TRAINING, 500, "updates of warm-up", at_least(0))
    roi_samples: int = option(_TRAINING, 512, "boxes of an image that the heads learn from",
                              at_least(4, 10 ** 6))
    train_sides: tuple[int, ...] = option("Augmentation", tuple(range(480, 801, 32)),
                                          "short sides in training, one of which is drawn", _SIDES)
    crops: bool = option("Augmentation", True, "half of the images are cropped, as published")
    test_side: int = option(_EVALUATION, 800, "short side in evaluation", at_least(32, 8192))
    longest_side: int = option(_EVALUATION, 1333, "limit of the long side, in training too",
                               at_least(32, 8192))

    @property
    def published(self) -> Published | None:
        """The published detector of these options, if there is one."""
        return next((each for each in DETECTORS.values() if (each.model, each.head, each.system, 256) == (
            self.model, self.head, self.system, self.head_width)), None)
