"""Looking at what a trained model does: predictions, features, heat maps, size.

    trained = models.load("runs/mine")                # or a checkpoint file
    predict(trained.model, "cat.jpg")[0][0]           # Prediction(index=281, name='tabby, tabby cat', probability=…)
    extract_features(trained.model, ["cat.jpg", "dog.jpg"])   # (2, 512)
    heatmap(trained.model, Image.open("cat.jpg"))     # (1, 224, 224), where the model looks

Every function takes one image or many: paths, Pillow images, or a normalised tensor (3, H, W) or (B, 3, H, W).
Detection and segmentation code takes `timm.create_model(…, features_only=True)` instead.
"""
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose

from common.errors import UserError
from config.options import ImageSettings
from models.zoo import default_classes

OneImage = str | os.PathLike | Image.Image
Images = Tensor | OneImage | Sequence[OneImage]
Transform = Callable[[Image.Image], Tensor]


class Prediction(NamedTuple):
    """One answer: the logit's index, the class's name for people, and its probability."""

    index: int
    name: str
    probability: float


class Complexity(NamedTuple):
    """`params`: number of parameters; `flops`: multiply-adds of convolutions and Linear layers for one image.

    Published FLOPs count the same way: no norms, gates, activations or Fourier transforms.
    """

    params: int
    flops: int


@lru_cache(maxsize=1)
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo()


def class_titles(class_names: Sequence[str]) -> list[str]:
    """Names for people: timm's ImageNet words for synsets such as n01440764, any other name unchanged."""
    def title(name: str) -> str:
        if len(name) != 9 or name[0] != "n" or not name[1:].isdigit():
            return name
        try:
            return _imagenet().label_name_to_description(name)
        except KeyError:  # looks like a synset, and is none that timm has words for
            return name
    return [title(name) for name in class_names]


def names_of(model: nn.Module, count: int) -> list[str]:
    """The names of the model's `count` classes in logit order, as `models.load` left them in its `pretrained_cfg`;
    ImageNet's synsets for a published head (1000 or 10,459 classes), else numbers."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    return list(names) if len(names) == count else default_classes(count)


def image_transforms(model: nn.Module) -> tuple[Callable[[Image.Image], Image.Image], Transform]:
    """The two steps from an RGB image to the model's input, as its `pretrained_cfg` says that it is evaluated: the
    part of the image that the model sees, (size, size); and that part as float32 (3, size, size), normalised."""
    settings = resolve_data_config(model=model)
    steps = create_transform(**settings, is_training=False).transforms
    resize, size = Compose(steps[:-2]), settings["input_size"][1]

    def part(image: Image.Image) -> Image.Image:  # CIFAR's images are evaluated as they are
        return image if image.size == (size, size) and size <= ImageSettings.SMALL else resize(image)
    return part, Compose(steps[-2:])


def image_transform(model: nn.Module) -> Transform:
    """RGB image → float32 (3, size, size), the very values that the evaluation of `main.py` sees."""
    return Compose(image_transforms(model))


def as_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB by Pillow, but 16-bit grey scaled to 8 bits instead of cut off at 255."""
    if image.mode.startswith("I"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def open_image(path: str | os.PathLike) -> Image.Image:
    """The image in a file as RGB. Raises UserError (`unreadable_image`)."""
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except Exception as error:  # damaged files make Pillow's plug-ins raise nearly anything
        raise UserError(f"{os.fspath(path)} is not a readable image ({error}); give a file that Pillow reads.",
                        code="unreadable_image") from error


def predict(model: nn.Module, images: Images, topk: int = 5, class_names: Sequence[str] | None = None,
            transform: Transform | None = None, batch_size: int = 32) -> list[list[Prediction]]:
    """The `topk` most probable classes of each image, best first; one list per image, also for a single one.

    Args:
        images: one image or many: paths, Pillow images of any size and mode, or a normalised float tensor.
        class_names: in logit order; those of `names_of` when not given.
        transform: from an RGB image to a float tensor (3, H, W); `image_transform(model)` when not given.
        batch_size: images per forward pass.
    """
    answers = []
    for batch in _batches(model, images, transform, batch_size):
        with torch.inference_mode(), _evaluating(model):
            probabilities = model(batch).float().softmax(-1)
        count = probabilities.shape[-1]
        names = class_titles(class_names or names_of(model, count))
        if len(names) != count:
            raise ValueError(f"{len(names)} class names for a model with {count} classes")
        values, indices = probabilities.topk(min(topk, count))
        answers += [[Prediction(i, names[i], p) for i, p in zip(row, shares)]
                    for row, shares in zip(indices.tolist(), values.tolist())]
    return answers


def extract_features(model: nn.Module, images: Images, pooled: bool = True, transform: Transform | None = None,
                     batch_size: int = 32) -> Tensor:
    """Float32 (B, C): pooled and normalised, what the classifier sees; `pooled=False`: (B, C, H/32, W/32)."""
    found = []
    for batch in _batches(model, images, transform, batch_size):
        with torch.inference_mode(), _evaluating(model):
            features = model.forward_features(batch)
            found.append((model.forward_head(features, pre_logits=True) if pooled else features).float().cpu())
    return torch.cat(found)


def heatmap(model: nn.Module, images: Images, classes: Sequence[int] | None = None,
            transform: Transform | None = None, batch_size: int = 8) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017) on the last stage: float32 (B, H, W) in [0, 1], the size of the model's input.

    `classes` are the logits to explain, one per image; the most probable ones when not given. An image in which
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
    """The image with its heat map (H, W in [0, 1]) laid over it, red where it is hot; at the heat map's size."""
    image = image.convert("RGB").resize((heat.shape[1], heat.shape[0]), Image.Resampling.BICUBIC)
    mask = Image.fromarray((heat.clamp(0, 1) * 160).to(torch.uint8).numpy(), "L")
    return Image.composite(Image.new("RGB", image.size, (255, 40, 0)), image, mask)


def complexity(model: nn.Module, input_size: int | tuple[int, int]) -> Complexity:
    """Parameters and FLOPs for one image of `input_size` (a side, or height and width) in pixels.

    Counted by a run on the meta device, without memory or arithmetic.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    channels = model.get_parameter("downsample_layers.0.0.weight").shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval().to("meta")(torch.empty(1, channels, height, width, device="meta"))
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def _batches(model: nn.Module, images: Images, transform: Transform | None, batch_size: int) -> Iterator[Tensor]:
    parameter = next(model.parameters())
    if isinstance(images, Tensor):
        batches = images[None] if images.ndim == 3 else images
    else:
        batches = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else images
        transform = transform or image_transform(model)
    if not len(batches):
        raise ValueError("no images were given")
    for start in range(0, len(batches), batch_size):
        part = batches[start:start + batch_size]
        if not isinstance(part, Tensor):
            loaded = (as_rgb(i) if isinstance(i, Image.Image) else open_image(i) for i in part)
            part = torch.stack([transform(image) for image in loaded])
        yield part.to(device=parameter.device, dtype=parameter.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block, then what was before."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)

