"""A trained model for the tools: architecture, weights, class names and picture settings from one checkpoint."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import models
from common.errors import UserError
from common.safe_load import safe_torch_load
from datasets.device import Normalise
from datasets.transforms import eval_transform, mean_std
from models.download import fetch_published, local_file
from models.weights import identify, load_for_model, published_names, select_weights
from models.zoo import VARIANTS, default_classes


@dataclass
class Trained:
    """A model in evaluation mode with what is needed to use it; `crop_pct` None means warping or the default."""
    model: nn.Module
    name: str
    source: str
    classes: list[str]
    input_size: int
    crop_pct: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def seen(self, picture: Image.Image) -> Image.Image:
        """The part of an RGB picture that the model sees, at its input size."""
        return Image.fromarray(self._crop(picture))

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """RGB picture → float32 (3, size, size), the very pixels that the evaluation of `main.py` sees."""
        crop, normalise = self._crop, Normalise(self.mean, self.std, "cpu")
        return lambda picture: normalise(torch.tensor(crop(picture))[None])[0].permute(2, 0, 1).contiguous()

    @property
    def _crop(self) -> Callable[[Image.Image], np.ndarray]:
        return eval_transform(self.input_size, self.crop_pct)


def load_trained(model: str | None = None, resume: str | None = None, weights: str = "auto",
                 input_size: int | None = None, device: str | torch.device = "cpu") -> Trained:
    """Load `resume` (a file or https address), or the published weights of `model` when it is None.

    The architecture is `model`, or what the checkpoint says, or what its tensors look like. Raises UserError.
    """
    if resume is None and model is None:
        raise UserError("name what to load: --resume CHECKPOINT, or --model NAME for the published weights of a model.")
    if model is not None and model not in models.MODEL_NAMES:
        raise UserError(f"--model {model} is not known; known are {', '.join(models.MODEL_NAMES)}.")
    if resume is None:
        resume = str(fetch_published(model))
    path = Path(local_file(resume))
    checkpoint = safe_torch_load(path)
    state = published_names(select_weights(checkpoint, str(path), weights=weights)[0])
    args = checkpoint.get("args") if isinstance(checkpoint.get("args"), dict) else {}
    name = model or args.get("model") or identify(state)
    if name not in models.MODEL_NAMES:
        raise UserError(f"{path} does not say which model it holds; name it with --model.")
    count = state["head.weight"].shape[0] if "head.weight" in state else 1000
    scale = args.get("layer_scale_init_value", 1e-6)  # 0: the network has no layer scale at all
    net = timm.create_model(name, num_classes=count, layer_scale_init_value=1e-6 if scale else 0)
    load_for_model(net, path, weights=weights, class_names=checkpoint.get("classes"))
    return _with_settings(net.to(device).eval(), name, str(path), checkpoint, args, input_size)


def _with_settings(net: nn.Module, name: str, source: str, checkpoint: dict, args: dict[str, Any],
                   input_size: int | None) -> Trained:
    classes = checkpoint.get("classes") or default_classes(net.num_classes)
    size = input_size or args.get("input_size") or VARIANTS[name].input_size
    if not isinstance(size, int) or size < 32:
        raise UserError(f"input size {size!r} is not accepted: a whole number of pixels from 32 on is needed.")
    mean, std = mean_std(args.get("imagenet_default_mean_and_std", True) is not False)
    return Trained(net, name, source, list(classes), size, args.get("crop_pct"), tuple(mean), tuple(std))
