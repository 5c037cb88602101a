"""Looking at what a trained model does: predictions, features, heat maps, size.

    trained = models.load("runs/mine")                       # or a checkpoint file
    predict(trained.model, "cat.jpg")[0][0]                  # Prediction(index=3, name="cat", ...)
    extract_features(trained.model, ["cat.jpg", "dog.jpg"])  # (2, 512)
    heatmap(trained.model, Image.open("cat.jpg"))            # (1, 224, 224), where the model looks

These take one image or many: paths, Pillow images, or a normalised tensor (3, H, W) or (B, 3, H, W).
Detection and segmentation code takes `timm.create_model(..., features_only=True)` instead.
"""
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose

from common.errors import UserError
from config.options import ImageSettings
from models.hornet import HorNet
from models.zoo import default_classes

Images = Tensor | str | os.PathLike | Image.Image | Sequence[str | os.PathLike | Image.Image]
Transform = Callable[[Image.Image], Tensor]


class Prediction(NamedTuple):
    """One answer: the logit's index, the class's name for people, and its probability."""

    index: int
    name: str
    probability: float


@cache
def _imagenet_titles() -> dict[str, str]:
    both = ImageNetInfo("imagenet-22k"), ImageNetInfo("imagenet-1k")  # neither has all of the other's
    return {name: title for one in both for name, title in zip(one.label_names(), one.label_descriptions())}


def class_titles(class_names: Sequence[str]) -> list[str]:
    """Names for people: timm's ImageNet words for synsets such as n01440764, any other name unchanged."""
    return [_imagenet_titles().get(name, name) for name in class_names]


def image_transforms(model: HorNet) -> tuple[Callable[[Image.Image], Image.Image], Transform]:
    """The two steps from an RGB image to the model's input, as its `pretrained_cfg` says it is evaluated.

    The first gives the part of the image that the model sees, (size, size), the second that part as float32
    (3, size, size), normalised.
    """
    settings = resolve_data_config(model=model)
    steps, size = create_transform(**settings, is_training=False), settings["input_size"][1]
    assert isinstance(steps, Compose)
    resize, normalise = Compose(steps.transforms[:-2]), Compose(steps.transforms[-2:])
    turn = getattr(model, "pretrained_cfg", {}).get("exif_orientation", False)

    def part(image: Image.Image) -> Image.Image:
        image = ImageOps.exif_transpose(image) if turn else image
        small = size <= ImageSettings.SMALL and image.size == (size, size)  # CIFAR is evaluated as it is
        return image if small else resize(image)
    return part, normalise


def image_transform(model: HorNet) -> Transform:
    """RGB image → float32 (3, size, size), the very values that the evaluation of `main.py` sees."""
    return Compose(image_transforms(model))


def as_rgb(image: Image.Image | str | os.PathLike) -> Image.Image:
    """An image, or that in a file, as RGB; 16-bit grey is scaled to 8 bits, as in a training.

    Raises what Pillow raises, and UserError (`unreadable_image`) for 32-bit pixels, whose range nobody knows.
    """
    image = image if isinstance(image, Image.Image) else Image.open(image)
    # Pillow opens PNG and PPM with 16 bits as mode I, too, which has 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        pixels = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(pixels.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"{getattr(image, 'filename', '') or 'the image'} has 32-bit pixels, which have no "
                        "common range; save it with 8 or 16 bits.", code="unreadable_image")
    return image.convert("RGB")


def predict(model: HorNet, images: Images, topk: int = 5, class_names: Sequence[str] | None = None,
            transform: Transform | None = None, batch_size: int = 32) -> list[list[Prediction]]:
    """The `topk` most probable classes of each image, best first; one list per image, also for a single one.

    Args:
        images: one image or many, see above.
        class_names: in logit order; when None, those that `models.load` left in the model's `pretrained_cfg`,
            or the published head's (1000 or 10,459 classes), or numbers.
        transform: from an RGB image to a float tensor (3, H, W); `image_transform(model)` when None.
        batch_size: images per forward pass.
    """
    names = class_names or getattr(model, "pretrained_cfg", {}).get("label_names") or ()
    names = names if class_names or len(names) == model.num_classes else default_classes(model.num_classes)
    if len(names) != model.num_classes:
        raise ValueError(f"{len(names)} class names for a model with {model.num_classes} classes")
    titles, answers = class_titles(names), []
    for batch in _batches(model, images, transform, batch_size):
        with torch.inference_mode():
            best = model(batch).float().softmax(-1).topk(min(topk, len(titles)))
        answers += [[Prediction(i, titles[i], p) for i, p in zip(row, shares)]
                    for row, shares in zip(best.indices.tolist(), best.values.tolist())]
    return answers


def extract_features(model: HorNet, images: Images, pooled: bool = True, transform: Transform | None = None,
                     batch_size: int = 32) -> Tensor:
    """Float32 (B, C), pooled and normalised: what the classifier sees; (B, C, H/32, W/32) unless `pooled`."""
    found = []
    for batch in _batches(model, images, transform, batch_size):
        with torch.inference_mode():
            features = model.forward_features(batch)
            found.append(model.forward_head(features, pre_logits=True) if pooled else features)
    return torch.cat(found).float().cpu()


def heatmap(model: HorNet, images: Images, classes: Sequence[int] | None = None,
            transform: Transform | None = None, batch_size: int = 8) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017) on the last stage: float32 (B, H, W) in [0, 1], the input's size.

    `classes` are the logits to explain, one per image; the most probable ones when None. An image in which
    nothing speaks for the class gives zeros.
    """
    maps, wanted = [], iter(() if classes is None else classes)
    for batch in _batches(model, images, transform, batch_size):
        with torch.enable_grad():
            features = model.forward_features(batch).detach().requires_grad_()
            logits = model.forward_head(features)
            chosen = logits.argmax(-1).tolist() if classes is None else [next(wanted) for _ in batch]
            gradient, = torch.autograd.grad(logits[range(len(batch)), chosen].sum(), features)
        weights, features = gradient.float().mean((2, 3), keepdim=True), features.detach().float()
        cam = (weights * features).sum(1, keepdim=True).relu()
        cam = F.interpolate(cam, size=batch.shape[2:], mode="bilinear")[:, 0]
        maps.append(cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-12))
    return torch.cat(maps).cpu()


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The image with its heat map (H, W in [0, 1]) over it, red where it is hot; at the heat map's size."""
    image = image.convert("RGB").resize((heat.shape[1], heat.shape[0]), Image.Resampling.BICUBIC)
    mask = Image.fromarray((heat.clamp(0, 1) * 160).to(torch.uint8).numpy(), "L")
    return Image.composite(Image.new("RGB", image.size, (255, 40, 0)), image, mask)


def flops(model: HorNet, side: int) -> int:
    """Multiply-adds of convolutions and Linear layers for one image of `side` x `side` pixels, as published.

    That is without norms, gates, activations and Fourier transforms; by a run on the meta device, without
    memory or arithmetic.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval().to("meta")(torch.empty(1, model.in_chans, side, side, device="meta"))
    return counter.get_total_flops() // 2


def _batches(model: HorNet, images: Images, transform: Transform | None, batch_size: int) -> Iterator[Tensor]:
    """What a model takes of `images`, part by part; the model is in evaluation mode meanwhile."""
    parameter, was_training = next(model.parameters()), model.training
    load = transform or image_transform(model)
    many: Sequence = [images] if (isinstance(images, (str, os.PathLike, Image.Image))
                                  or isinstance(images, Tensor) and images.ndim == 3) else list(images)
    if not many:
        raise ValueError("no images were given")
    model.eval()
    try:
        for start in range(0, len(many), batch_size):
            part = torch.stack([each if isinstance(each, Tensor) else load(as_rgb(each))
                                for each in many[start:start + batch_size]])
            yield part.to(device=parameter.device, dtype=parameter.dtype)
    finally:
        model.train(was_training)
