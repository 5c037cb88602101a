"""Looking at what a trained model does: predictions, features and heat maps of pictures.

    model = timm.create_model("hornet_tiny_7x7", pretrained=True)
    predict(model, [Image.open("cat.jpg")])[0][0]     # Prediction(index=281, name='tabby, tabby cat', probability=…)
    extract_features(model, [Image.open("cat.jpg")])  # (1, 512)
    heatmap(model, [Image.open("cat.jpg")])           # (1, 224, 224), where the model looks

Detection and segmentation code takes `timm.create_model(…, features_only=True)` instead.
"""
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn

from models.zoo import default_classes

Pictures = Tensor | Sequence[Image.Image]


class Prediction(NamedTuple):
    """One answer: the logit's index, the class's name, and its probability."""
    index: int
    name: str
    probability: float


@lru_cache(maxsize=1)
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo()


def class_titles(class_names: Sequence[str]) -> list[str]:
    """Names for people: timm's ImageNet words for synsets such as n01440764, any other name unchanged."""
    return [_title(name) for name in class_names]


def _title(name: str) -> str:
    if len(name) != 9 or name[0] != "n" or not name[1:].isdigit():
        return name
    try:
        return _imagenet().label_name_to_description(name)
    except KeyError:  # looks like a synset, and is none that timm has words for
        return name


def picture_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """RGB picture → float32 (3, size, size), as the model's `pretrained_cfg` says it is evaluated."""
    return create_transform(**resolve_data_config(model=model), is_training=False)


def predict(model: nn.Module, images: Pictures, topk: int = 5, class_names: Sequence[str] | None = None,
            transform: Callable[[Image.Image], Tensor] | None = None, batch_size: int = 32) -> list[list[Prediction]]:
    """The `topk` most probable classes of each picture, best first.

    Args:
        images: pictures of any size and mode, or a normalised float tensor (B, 3, H, W).
        class_names: in logit order; ImageNet's for a published head (1000 or 10,459 classes) when not given, else
            numbers.
        transform: from an RGB picture to a float tensor (3, H, W); `picture_transform(model)` when not given.
        batch_size: pictures per forward pass.
    """
    answers = []
    for batch in _batches(model, images, transform, batch_size):
        with torch.inference_mode(), _evaluating(model):
            probabilities = model(batch).float().softmax(-1)
        names = class_titles(class_names or default_classes(probabilities.shape[-1]))
        if len(names) != probabilities.shape[-1]:
            raise ValueError(f"{len(names)} class names for a model with {probabilities.shape[-1]} classes")
        values, indices = probabilities.topk(min(topk, probabilities.shape[-1]))
        answers += [[Prediction(i, names[i], p) for i, p in zip(row, shares)]
                    for row, shares in zip(indices.tolist(), values.tolist())]
    return answers


def extract_features(model: nn.Module, images: Pictures, pooled: bool = True,
                     transform: Callable[[Image.Image], Tensor] | None = None, batch_size: int = 32) -> Tensor:
    """Float32 (B, C): pooled and normalised, what the classifier sees; `pooled=False`: (B, C, H/32, W/32)."""
    found = []
    for batch in _batches(model, images, transform, batch_size):
        with torch.inference_mode(), _evaluating(model):
            features = model.forward_features(batch)
            found.append((model.forward_head(features, pre_logits=True) if pooled else features).float().cpu())
    return torch.cat(found)


def heatmap(model: nn.Module, images: Pictures, classes: Sequence[int] | None = None,
            transform: Callable[[Image.Image], Tensor] | None = None, batch_size: int = 8) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017) on the last stage: float32 (B, H, W) in [0, 1], the size of the model's input.

    `classes` are the logits to explain, one per picture; the most probable ones when not given. A picture in which
    nothing speaks for the class gives zeros.
    """
    maps, start = [], 0
    for batch in _batches(model, images, transform, batch_size):
        with torch.enable_grad(), _evaluating(model):
            features = model.forward_features(batch).detach().requires_grad_()
            logits = model.forward_head(features)
            chosen = (logits.argmax(-1) if classes is None
                      else torch.as_tensor(classes[start:start + len(batch)], device=logits.device))
            gradient, = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), features)
        start += len(batch)
        weighted = (gradient.float().mean((2, 3), keepdim=True) * features.detach().float()).sum(1, keepdim=True).relu()
        large = F.interpolate(weighted, size=batch.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        maps.append((large / large.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu())
    return torch.cat(maps)


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture with its heat map (H, W in [0, 1]) laid over it, red where it is hot; at the heat map's size."""
    picture = image.convert("RGB").resize((heat.shape[1], heat.shape[0]), Image.Resampling.BICUBIC)
    mask = Image.fromarray((heat.clamp(0, 1) * 160).to(torch.uint8).numpy(), "L")
    return Image.composite(Image.new("RGB", picture.size, (255, 40, 0)), picture, mask)


def _batches(model: nn.Module, images: Pictures, transform: Callable[[Image.Image], Tensor] | None,
             batch_size: int) -> Iterator[Tensor]:
    parameter = next(model.parameters())
    if not len(images):
        raise ValueError("no pictures were given")
    if not isinstance(images, Tensor):
        transform = transform or picture_transform(model)
    for start in range(0, len(images), batch_size):
        part = images[start:start + batch_size]
        batch = part if isinstance(part, Tensor) else torch.stack([transform(p.convert("RGB")) for p in part])
        yield batch.to(device=parameter.device, dtype=parameter.dtype)


class _evaluating:
    """Evaluation mode for a block, then what was before."""

    def __init__(self, model: nn.Module):
        self.model, self.was = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was)
