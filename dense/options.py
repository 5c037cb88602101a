"""The options of segmentation and of detection. No torch in here."""
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from common.errors import UserError
from config.options import BELOW_ONE, NOT_NEGATIVE, PART, Accepts, Options, at_least, one_of
from dense.zoo import DETECTORS, HEADS, SEGMENTORS, Published

T = TypeVar("T")
SIDES = Accepts("two sides in pixels, such as 2048 512", lambda v: len(v) == 2 and min(v) >= 32)
SEVERAL_SIDES = Accepts("from 32 pixels on, several in one or more words",
                        lambda v: len(v) > 0 and min(v) >= 32)


def option(group: str, default: T, help: str, accepts: Accepts | None = None) -> T:
    """One option, as in `config.options`; `group` is a title of its groups."""
    return field(default=default, metadata={"group": group, "help": help, "accepts": accepts})


_MODEL, _TRAINING, _DATA, _EVALUATION = "Model and weights", "Training", "Data", "Evaluation"


@dataclass
class DenseOptions(Options):
    """What segmentation and detection share: main.py's options but for those of classification alone."""
    OMITTED: ClassVar[frozenset[str]] = frozenset(
        "eval_data_path nb_classes val_labels allow_class_mismatch reindex exif_orientation index_cache "
        "suite imagenet_default_mean_and_std input_size head_init_scale model_key model_prefix allow_partial "
        "lr_scale warmup_epochs weight_decay_end layer_decay clip_by clip_mode smoothing start_epoch aa "
        "freeze val_fraction allow_slow_parquet "
        "scale hflip color_jitter train_interpolation reprob remode recount mixup cutmix cutmix_minmax "
        "mixup_prob mixup_switch_prob mixup_mode crop_pct explain_difference report compile".split())

    data_set: str = option(_DATA, "files", "files: your own or the published set; SAMPLE: drawn scenes",
                           one_of("files", "SAMPLE"))
    model: str = option(_MODEL, "hornet_tiny_gf", "the backbone, such as hornet_base_7x7")
    finetune: str = option(_MODEL, "", "classification checkpoint (path or URL) for the backbone")
    head: str = option(_MODEL, "plain", "how the levels of features are joined: plain 3x3 convolutions, or "
                       "HorFPN's gnConv", one_of(*HEADS))
    drop_path: float = option(_MODEL, 0.4, "rate of stochastic depth in the last block", BELOW_ONE)
    batch_size: int = option("Batch", 2, "images per process in one forward pass", at_least(1, 2 ** 20))
    lr: float = option(_TRAINING, 1e-4, "highest learning rate, absolute (the recipes' are for 16 images)",
                       Accepts("above 0", lambda v: v > 0))
    min_lr: float = option(_TRAINING, 0.0, "learning rate at the end", NOT_NEGATIVE)
    warmup_steps: int = option(_TRAINING, 1500, "updates of warm-up", at_least(0))
    warmup_epochs: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    num_workers: int = option(_DATA, 4, "loader processes per training process", at_least(0, 512))
    decay_rate: float = option(_TRAINING, 0.9, "factor on the rate from each stage or layer to the one below",
                               PART)
    decay_layers: int = option(_TRAINING, 12, "number of the layer whose rate is that of the heads, less one",
                               at_least(0, 1000))


@dataclass
class SegmentationOptions(DenseOptions):
    """The options of `python -m dense.segmentation`. An epoch, where the house counts by epochs, is
    `check_every` updates."""
    OMITTED: ClassVar[frozenset[str]] = DenseOptions.OMITTED | {"epochs"}
    USAGE: ClassVar[str] = """dense.segmentation [--config RECIPE] [--FLAG VALUE ...]

  python -m dense.segmentation --config recipes/quickstart_segmentation.yaml
  python -m dense.segmentation --config recipes/ade20k_upernet_tiny_gf.yaml --data_path ADE20K \\
      --output_dir RUN
  python -m dense.segmentation --config recipes/ade20k_upernet_tiny_gf.yaml --data_path ADE20K \\
      --eval true --resume CHECKPOINT"""
    LAYOUT: ClassVar[str] = "images/ and annotations/"
    QUICKSTART: ClassVar[str] = "quickstart_segmentation"
    SAMPLE: ClassVar[str] = "data/scenes"

    data_path: str = option(_DATA, "", "folder of images/ and annotations/, each with training/ and "
                            "validation/")
    label_path: str = option(_DATA, "", "folder of the label maps, where data_path is that of the images")
    classes: str | None = option(_DATA, None, "file of class names, one per line; none: ADE20K's 150")
    zero_ignored: bool = option(_DATA, True, "a label of 0 is no class, k is class k, as in ADE20K; false: k "
                                "is class k + 1, 255 is none")
    head_width: int = option(_MODEL, 512, "channels of the head; the auxiliary one: half",
                             at_least(8, 8192))
    updates: int = option(_TRAINING, 160_000, "updates of the whole training", at_least(1))
    check_every: int = option(_TRAINING, 16_000, "updates between two evaluations", at_least(1))
    crop_size: int = option(_TRAINING, 512, "side of the crops, and of the windows of evaluation",
                            at_least(32, 4096))
    image_scale: tuple[int, ...] = option(_TRAINING, (2048, 512), "box that images are scaled into", SIDES)
    jitter: tuple[float, ...] = option(_TRAINING, (0.5, 2.0), "range of the factor on that box in training",
                                       Accepts("two numbers above 0, the lower one first",
                                               lambda v: len(v) == 2 and 0 < v[0] <= v[1]))
    ms_flip: bool = option(_EVALUATION, False, "evaluate at six scales, each flipped too")

    def __post_init__(self):
        if self.updates % self.check_every:
            raise UserError(f"--updates {self.updates} is not a multiple of --check_every "
                            f"{self.check_every}; give a divisor of it.", code="contradiction")
        self.epochs = self.updates // self.check_every

    def updates_per_epoch(self, images: int, global_batch: int) -> int:
        """Updates between two evaluations, however many passes over the images that is."""
        return self.check_every if images else 0

    @property
    def stride(self) -> int:
        """By how much a window moves: two thirds of its side, floored."""
        return self.crop_size * 2 // 3

    @property
    def published(self) -> Published | None:
        """The published segmentor of these options, if there is one."""
        return next((each for each in SEGMENTORS.values() if (each.model, each.head, each.crop, 512) == (
            self.model, self.head, self.crop_size, self.head_width)), None)


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
    epochs: int = option(_TRAINING, 36, "passes over the training images", at_least(1, 10 ** 6))
    milestones: tuple[int, ...] = option(_TRAINING, (27, 33), "epochs after which the learning rate is a "
                                         "tenth")
    warmup_steps: int = option(_TRAINING, 500, "updates of warm-up", at_least(0))
    roi_samples: int = option(_TRAINING, 512, "boxes of an image that the heads learn from",
                              at_least(4, 10 ** 6))
    train_sides: tuple[int, ...] = option("Augmentation", tuple(range(480, 801, 32)),
                                          "short sides in training, one of which is drawn", SEVERAL_SIDES)
    crops: bool = option("Augmentation", True, "half of the images are cropped, as published")
    test_side: int = option(_EVALUATION, 800, "short side in evaluation", at_least(32, 8192))
    longest_side: int = option(_EVALUATION, 1333, "limit of the long side, in training too",
                               at_least(32, 8192))

    @property
    def published(self) -> Published | None:
        """The published detector of these options, if there is one."""
        return next((each for each in DETECTORS.values() if (each.model, each.head, each.system, 256) == (
            self.model, self.head, self.system, self.head_width)), None)
