"""A trained model ready to use: architecture, weights that scored, classes and image settings of one file.

    trained = models.load("runs/mine")          # a run's folder: its best checkpoint
    trained = models.load("checkpoint.pth")     # a file or an https address
    trained = models.load("hornet_tiny_7x7")    # published weights
    trained.model(trained.transform(image)[None]).softmax(-1), trained.classes
"""
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch

from common.errors import UserError
from common.files import read_json
from common.safe_load import safe_torch_load
from config.options import OPTIONS, ImageSettings
from config.parse import check_model
from models.download import HUB_WEIGHTS, fetch_published, local_file
from models.hornet import HorNet
from models.inspect import Transform, image_transform
from models.weights import identify, load_for_model, published_names, select_weights
from models.zoo import MODEL_NAMES, VARIANTS, default_classes


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode with what is needed to use it.

    Attributes:
        model: timm and `models.inspect` find settings and classes in its `pretrained_cfg`.
        name: of the architecture.
        source: the file.
        weights: the file's entry, "model" or "model_ema" mostly.
        classes: names in logit order, as the file has them.
        settings: how images reach the network.
        transform: RGB image → float32 (3, size, size), the very values of `main.py`'s evaluation.
    """

    model: HorNet
    name: str
    source: Path
    weights: str
    classes: list[str]
    settings: ImageSettings
    transform: Transform


def load(source: str | os.PathLike, *, model: str | None = None, weights: str = "auto",
         input_size: int | None = None, device: str | torch.device = "cpu") -> Trained:
    """Load a run's folder (its best checkpoint), a checkpoint file, an https address or a published model.

    Args:
        model: name of the architecture, where the file does not say it and its tensors do not show it.
        weights: "model", "ema", or "auto" for those that scored.
        input_size: side of the images in pixels, the file's own when None.

    Raises UserError with one sentence for whatever cannot be loaded.
    """
    if model is not None:
        check_model(model, MODEL_NAMES)
    path = locate(source)
    checkpoint = safe_torch_load(path)
    state, key = select_weights(checkpoint, str(path), weights=weights)
    state = published_names(state)
    about = checkpoint if key else {}  # a bare state dict says nothing else
    args = about.get("args") or {}
    name = model or (args.get("model") if args.get("model") in MODEL_NAMES else identify(state))
    if not name:
        raise UserError(f"{path} does not say which model it holds; name it with --model.",
                        code="unknown_model")
    settings = ImageSettings.from_args({"input_size": VARIANTS[name].input_size, **args})
    if input_size is not None:
        OPTIONS["input_size"].convert([str(input_size)], "--input_size")
        settings = replace(settings, input_size=input_size)
    count = len(state["head.weight"]) if "head.weight" in state else 1000
    classes = list(about.get("classes") or default_classes(count))
    net = timm.create_model(name, num_classes=count, layer_scale_init_value=settings.layer_scale_init_value)
    assert isinstance(net, HorNet)
    load_for_model(net, path, weights=weights, class_names=classes, checkpoint=checkpoint)
    size = settings.input_size
    vars(net)["pretrained_cfg"].update(  # where timm's functions look
        input_size=(net.in_chans, size, size), crop_pct=settings.eval_crop_pct or 1.0, mean=settings.mean,
        crop_mode="center" if settings.eval_crop_pct else "squash", std=settings.std, interpolation="bicubic",
        num_classes=count, label_names=tuple(classes), exif_orientation=settings.exif_orientation)
    return Trained(net.to(device).eval(), name, path, key, classes, settings, image_transform(net))


def locate(source: str | os.PathLike) -> Path:
    """The file of a published model's name, an address, a run's folder (its best), a Hub folder, a path."""
    if str(source) in MODEL_NAMES and not os.path.exists(source):
        return fetch_published(str(source))
    path = Path(local_file(source))
    found = best_checkpoint(path) if path.is_dir() else path
    if found is None:
        raise UserError(f"{path} holds no checkpoint; name a run's folder or a file.",
                        code="missing_checkpoint")
    return found


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint in a run's folder that scored best by the manifests (the moving average wins a tie).

    It is the newest where none was evaluated, the weights of a folder in the Hub's layout, or None.
    """
    def score(path: Path) -> float:
        try:
            return float(read_json(f"{path}.json")["score"])
        except (OSError, ValueError, KeyError, TypeError):
            return -math.inf
    names = ("checkpoint-best-ema.pth", "checkpoint-best.pth")
    found = max((run / name for name in names if (run / name).is_file()), key=score, default=None)
    others = (*run.glob("checkpoint-*.pth"), *run.glob(HUB_WEIGHTS))
    return found or max(filter(Path.is_file, others), key=os.path.getmtime, default=None)
