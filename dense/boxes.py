"""Boxes, anchors and masks of the detectors as plain functions: coding, overlaps, assignment, sampling,
suppression.

Boxes are x1, y1, x2, y2 in pixels, float32, sides x2 - x1. Where torchvision's detectors compute otherwise
(rounded anchors, one-sided limits, another assignment) the published rule stands here; its operators are used
as they are.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, roi_align

from common.random import numpy_generator

Size = tuple[int, int]  # height, width
Stds = tuple[float, float, float, float]

STRIDES = (4, 8, 16, 32, 64)
_RATIOS = (0.5, 1.0, 2.0)  # height / width
_SCALE = 8  # an anchor's side in strides
_LARGEST = math.log(1000 / 16)  # of the change of a side, both ways
_FINEST = 56  # boxes of less than twice this side are pooled from the finest level


def encode(boxes: Tensor, targets: Tensor, stds: Stds) -> Tensor:
    """Deltas (N, 4) from `boxes` to `targets`: shift in sides, logarithm of the sides' ratio, over `stds`."""
    centre, side = _centre_and_side(boxes)
    target_centre, target_side = _centre_and_side(targets)
    deltas = torch.cat([(target_centre - centre) / side, (target_side / side).log()], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode(boxes: Tensor, deltas: Tensor, stds: Stds, size: Size | None = None) -> Tensor:
    """Boxes (N, 4 k) from boxes (N, 4) and deltas (N, 4 k); clipped to an image of `size` where given."""
    deltas = deltas.unflatten(-1, (-1, 4)) * deltas.new_tensor(stds)
    centre, side = _centre_and_side(boxes[:, None])
    centre = centre + side * deltas[..., :2]
    half = side * deltas[..., 2:].clamp(-_LARGEST, _LARGEST).exp() / 2
    found = torch.cat([centre - half, centre + half], dim=-1)
    return (found if size is None else clip(found, size)).flatten(1)


def clip(boxes: Tensor, size: Size) -> Tensor:
    """Boxes (..., 4) moved into an image of `size`."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def _centre_and_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    first, last = boxes[..., :2], boxes[..., 2:]
    return (first + last) / 2, last - first


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union, (N, M), of boxes (N, 4) and (M, 4); 0 for empty boxes."""
    corner = torch.maximum(first[:, None, :2], second[None, :, :2])
    shared = (torch.minimum(first[:, None, 2:], second[None, :, 2:]) - corner).clamp(min=0).prod(-1)
    area, other = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second))
    return shared / (area[:, None] + other - shared).clamp(min=1e-6)


def anchors(grids: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Anchors per level (h, w), each (h * w * 3, 4), cell by cell, row by row: centred on multiples of the
    stride, not rounded."""
    found = []
    for (height, width), stride in zip(grids, STRIDES):
        ratio = torch.tensor(_RATIOS, device=device).sqrt()
        half = torch.stack([_SCALE * stride / ratio, _SCALE * stride * ratio], dim=-1) / 2
        sides = (torch.arange(side, device=device) for side in (height, width))
        y, x = torch.meshgrid(*sides, indexing="ij")
        shift = stride * torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        found.append((shift + torch.cat([-half, half], dim=-1)).reshape(-1, 4))
    return found


def assign(boxes: Tensor, truths: Tensor, *, positive: float, negative: float,
           low_quality: float | None = None) -> Tensor:
    """The ground truth of each box, int64 (N,): its index + 1, 0 for background, -1 to ignore it.

    A box belongs to the truth it overlaps most if by at least `positive`, to the background below `negative`.
    With `low_quality` each truth then takes the boxes that overlap it most (all ties), if by at least that,
    whatever they were before: a later truth overrules an earlier one.
    """
    found = boxes.new_full((len(boxes),), -1, dtype=torch.int64)
    if not len(truths) or not len(boxes):
        return found.zero_()
    table = overlaps(truths, boxes)
    most, which = table.max(dim=0)
    found[most < negative] = 0
    found = torch.where(most >= positive, which + 1, found)
    if low_quality is not None:
        for index, (row, best) in enumerate(zip(table, table.amax(dim=1))):
            found[(row == best) & (best >= low_quality)] = index + 1
    return found


def sample(assigned: Tensor, count: int, share: float, stream: str,
           key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Indices of at most `count` boxes, positive ones (at most `share` of `count`) and negative ones.

    The draws are a function of `key` (seed, update, position), `stream` and `assigned`: any process makes
    the same.
    """
    seed, *counters = key
    generator = numpy_generator(seed, stream, *counters)

    def some(candidates: Tensor, wanted: int) -> Tensor:
        order = generator.permutation(len(candidates))[:wanted]
        order.sort()
        return candidates[torch.from_numpy(order).to(candidates.device)]

    positive = some((assigned > 0).nonzero()[:, 0], int(count * share))
    return positive, some((assigned == 0).nonzero()[:, 0], count - len(positive))


def proposals(scores: Sequence[Tensor], deltas: Sequence[Tensor], grid: Sequence[Tensor], size: Size, *,
              per_level: int, count: int) -> tuple[Tensor, Tensor]:
    """The best boxes (n, 4) of one image and their scores (n,), best first.

    Per level: logits (N,), deltas and anchors (N, 4). The `per_level` best of each are decoded, clipped to
    `size`, dropped when empty, suppressed within their level at an overlap of 0.7; the `count` best stay.
    """
    boxes, values, levels = [], [], []
    for level, (logits, delta, anchor) in enumerate(zip(scores, deltas, grid)):
        value, best = logits.sigmoid().sort(descending=True, stable=True)
        best = best[:per_level]
        boxes.append(decode(anchor[best], delta[best], (1, 1, 1, 1), size))
        values.append(value[:per_level])
        levels.append(torch.full_like(best, level))
    box, value, level = torch.cat(boxes), torch.cat(values), torch.cat(levels)
    real = (box[:, 2:] > box[:, :2]).all(dim=1)
    box, value, level = box[real], value[real], level[real]
    kept = batched_nms(box, value, level, 0.7)[:count]
    return box[kept], value[kept]


def best_of_each_class(boxes: Tensor, scores: Tensor, *, threshold: float = 0.05, overlap: float = 0.5,
                       count: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (n, 4), scores (n,), labels (n,) of the `count` best of boxes (N, classes, 4), scores (N, classes
    + 1), whose last column is the background. Suppressed class by class.
    """
    rows, labels = (scores[:, :-1] > threshold).nonzero(as_tuple=True)
    box, score = boxes[rows, labels], scores[rows, labels]
    kept = batched_nms(box, score, labels, overlap)[:count]
    return box[kept], score[kept], labels[kept]


def level_of(boxes: Tensor) -> Tensor:
    """The pyramid level, int64 0 to 3, from which a box (N, 4) is pooled."""
    side = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sqrt()
    return (side / _FINEST + 1e-6).log2().floor().clamp(0, 3).long()


def pool(maps: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
    """RoI features (N, C, size, size) of rois (N, 5), image index and box, each from its level of `maps`."""
    level = level_of(rois[:, 1:])
    found = rois.new_zeros(len(rois), maps[0].shape[1], size, size, dtype=maps[0].dtype)
    for index, (features, stride) in enumerate(zip(maps[:4], STRIDES)):
        here = (level == index).nonzero()[:, 0]
        pooled = roi_align(features, rois[here].to(features.dtype), size, 1 / stride, sampling_ratio=-1,
                           aligned=True)
        found = found.index_copy(0, here, pooled)
    return found


def mask_targets(masks: Tensor, which: Tensor, boxes: Tensor, side: int = 28) -> Tensor:
    """What the mask head should give for boxes (N, 4) of truths `which`: 0 or 1, float32 (N, side, side).

    masks: uint8 (truths, h, w) of the image.
    """
    rois = torch.cat([which[:, None].to(boxes.dtype), boxes], dim=1)
    found = roi_align(masks[:, None].to(boxes.dtype), rois, side, sampling_ratio=-1, aligned=True)
    return (found[:, 0] >= 0.5).to(boxes.dtype)


def paste(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Probabilities (N, 28, 28) of boxes (N, 4), sampled at the centres of an image's pixels, from a half on:
    bool (N, *size)."""
    height, width = size
    found = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for mask, box, out in zip(masks, boxes, found):
        left, top = (box[:2].floor() - 1).long().clamp(min=0).tolist()
        right, bottom = (min(int(end), side) for end, side in zip(box[2:].ceil() + 1, (width, height)))
        if right <= left or bottom <= top:
            continue
        x, y = (2 * (torch.arange(a, b, device=box.device) + 0.5 - box[i]) / (box[i + 2] - box[i]) - 1
                for i, (a, b) in enumerate(((left, right), (top, bottom))))
        points = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
        sampled = F.grid_sample(mask[None, None], points, align_corners=False)
        out[top:bottom, left:right] = sampled[0, 0] >= 0.5
    return found
