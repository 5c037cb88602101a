"""From images to label maps: sliding windows, several scales, flips."""
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dense.options import SegmentationOptions
from dense.pixels import Size, normalised
from dense.segmentor import resized


def windows(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) along an axis; the last one is moved back to end with the image, a short side is one."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, side) for i in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def slide(model: nn.Module, images: Tensor, crop: int, stride: int) -> Tensor:
    """Logits (B, classes, H, W) of images (B, 3, H, W): the mean of those of all windows over a pixel."""
    height, width = images.shape[2:]
    total = torch.zeros(0)
    count = torch.zeros(1, 1, height, width, device=images.device)
    for top, bottom in windows(height, crop, stride):
        for left, right in windows(width, crop, stride):
            logits = model(images[:, :, top:bottom, left:right])
            if not len(total):
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, top:bottom, left:right] += logits
            count[:, :, top:bottom, left:right] += 1
    return total / count


def probabilities(model: nn.Module, variants: Iterable[tuple[Tensor, bool]], size: Size, crop: int,
                  stride: int) -> Tensor:
    """Class probabilities (1, classes, *size), the mean over (image (1, 3, h, w), whether flipped) variants.

    Logits are averaged over windows, probabilities over variants, at the original size.
    """
    maps = []
    for image, flipped in variants:
        found = resized(slide(model, image, crop, stride), size).softmax(dim=1)
        maps.append(found.flip(3) if flipped else found)
    return torch.stack(maps).mean(dim=0) if len(maps) > 1 else maps[0]


def label_map(model: nn.Module, scaled: Sequence[Tensor], size: Size, options: SegmentationOptions) -> Tensor:
    """Labels int64 (H, W) on the CPU, of an image at each scale, uint8 (h, w, 3), on the device."""
    variants = [(normalised(image[None]), False) for image in scaled]
    if options.ms_flip:
        variants = [pair for x, _ in variants for pair in ((x, False), (x.flip(3), True))]
    return probabilities(model, variants, size, options.crop_size, options.stride).argmax(1)[0].cpu()


def scaled_boxes(box: Sequence[int], ratios: Sequence[float]) -> list[Size]:
    """The box of each scale, sides truncated."""
    return [(int(box[0] * ratio), int(box[1] * ratio)) for ratio in ratios]
