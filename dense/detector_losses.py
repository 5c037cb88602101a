"""What Mask R-CNN and Cascade Mask R-CNN learn: their rules, losses of the anchors and of the stages.

Which anchors and proposals of an image take part is a function of the image, its proposals and its key, not
of the images beside it: anchors are those of its own padded size, draws are keyed by seed, update, position.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from dense import boxes as geometry
from dense.boxes import STRIDES, Size, Stds

MULTIPLE = 32  # of an image's sides after padding
STAGE_STDS: tuple[Stds, ...] = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What Mask R-CNN and Cascade Mask R-CNN do differently.

    Attributes:
        overlaps: with a truth from which a proposal is positive, per stage; so many stages there are.
        weights: of the stages' losses.
        low_quality: each truth takes its best proposals too, if they reach that overlap.
        inside: only anchors within the image learn.
        beta: of the anchors' smooth L1 loss, 0 for L1.
        giou: the boxes' loss is 10 (1 - GIoU), else L1 on deltas.
        convolutions, layers: of a box head.
        proposals: per image in training.
        anchor_samples, roi_samples: per image, of which at most a half and a quarter are positive.
    """
    overlaps: tuple[float, ...]
    weights: tuple[float, ...]
    low_quality: bool
    inside: bool
    beta: float
    giou: bool
    convolutions: int
    layers: int
    proposals: int
    anchor_samples: int = 256
    roi_samples: int = 512

    @property
    def cascade(self) -> bool:
        """Several stages, each on the boxes of the one before."""
        return len(self.overlaps) > 1


SYSTEMS = {
    "mask_rcnn": Rules(overlaps=(0.5,), weights=(1.0,), low_quality=True, inside=False, beta=0.0, giou=False,
                       convolutions=0, layers=2, proposals=1000),
    "cascade_mask_rcnn": Rules(overlaps=(0.5, 0.6, 0.7), weights=(1.0, 0.5, 0.25), low_quality=False,
                               inside=True, beta=1 / 9, giou=True, convolutions=4, layers=1, proposals=2000)}


class Truth(NamedTuple):
    """What one image of a batch shows: boxes float32 (n, 4), labels int64 (n,), masks uint8 (n, h, w), in the
    `size` (height, width) of the image before padding; `key` (seed, update, position) of its draws."""
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    size: Size
    key: tuple[int, int, int]


def padded(size: Size) -> Size:
    """A size rounded up to what the network takes."""
    return -(-size[0] // MULTIPLE) * MULTIPLE, -(-size[1] // MULTIPLE) * MULTIPLE


def rpn_losses(rules: Rules, logits: Sequence[Tensor], deltas: Sequence[Tensor],
               truths: Sequence[Truth]) -> dict[str, Tensor]:
    """Classification and box loss of the anchors, each (5,) by level, over the number sampled."""
    sums, count = logits[0].new_zeros(2, len(logits)), 0
    for i, truth in enumerate(truths):
        sides = [[-(-side // stride) for side in padded(truth.size)] for stride in STRIDES]
        grid = geometry.anchors(sides, logits[0].device)
        level = torch.arange(len(grid), device=logits[0].device).repeat_interleave(
            torch.tensor([len(anchor) for anchor in grid], device=logits[0].device))
        cut = lambda maps: [x[i, :, :h, :w].permute(1, 2, 0) for x, (h, w) in zip(maps, sides)]
        logit = torch.cat([x.flatten() for x in cut(logits)])
        delta = torch.cat([x.reshape(-1, 4) for x in cut(deltas)])
        anchor = torch.cat(grid)
        assigned = _assigned_anchors(rules, anchor, truth)
        positive, negative = geometry.sample(assigned, rules.anchor_samples, 0.5, "rpn", truth.key)
        count += len(positive) + len(negative)
        both = torch.cat([positive, negative])
        target = (assigned[both] > 0).to(logit.dtype)
        loss = F.binary_cross_entropy_with_logits(logit[both], target, reduction="none")
        aim = geometry.encode(anchor[positive], truth.boxes[assigned[positive] - 1], (1, 1, 1, 1))
        moved = F.smooth_l1_loss(delta[positive], aim, beta=rules.beta, reduction="none").sum(dim=1)
        sums = sums + torch.stack([torch.zeros_like(sums[0]).index_add(0, level[both], loss),
                                   torch.zeros_like(sums[0]).index_add(0, level[positive], moved)])
    return dict(zip(("loss_rpn_cls", "loss_rpn_bbox"), sums / max(count, 1)))


def _assigned_anchors(rules: Rules, anchor: Tensor, truth: Truth) -> Tensor:
    """The truth of each anchor as `boxes.assign` gives it; -1 for those that leave the image, where they must
    not."""
    height, width = truth.size
    found = torch.full((len(anchor),), -1, device=anchor.device)
    used = torch.ones_like(found, dtype=torch.bool)
    if rules.inside:
        used = (anchor[:, :2] >= 0).all(dim=1) & (anchor[:, 2] < width) & (anchor[:, 3] < height)
    found[used] = geometry.assign(anchor[used], truth.boxes, positive=0.7, negative=0.3, low_quality=0.3)
    return found


def roi_losses(rules: Rules, stages: Sequence[tuple[nn.Module, nn.Module]], maps: Sequence[Tensor],
               proposals: Sequence[Tensor], truths: Sequence[Truth]) -> dict[str, Tensor]:
    """Losses of all stages, each a box head and a mask head, on the proposals (n, 4) of each image; those of
    a cascade are named s0.…, s1.…, s2.…"""
    losses, found = {}, list(proposals)
    for stage, (box_head, mask_head) in enumerate(stages):
        picked = [_pick(rules, stage, box, truth) for box, truth in zip(found, truths)]
        boxes = [box for box, *_ in picked]
        logits, deltas = box_head(geometry.pool(maps, rois_of(boxes), 7))
        background = logits.shape[1] - 1
        labels = torch.cat([F.pad(label, (0, len(box) - len(label)), value=background)
                            for box, label, *_ in picked])
        positive = (labels < background).nonzero()[:, 0]
        aims = torch.cat([truth.boxes[which] for truth, (*_, which, _) in zip(truths, picked)])
        values = {"loss_cls": F.cross_entropy(logits, labels),
                  "loss_bbox": _box_loss(rules, stage, torch.cat(boxes)[positive],
                                         of_class(deltas[positive], labels[positive]), aims) / len(labels)}
        rois = rois_of([box[:len(which)] for box, _, which, _ in picked])
        masks = mask_head(geometry.pool(maps, rois, 14))
        targets = torch.cat([geometry.mask_targets(truth.masks, which, box[:len(which)])
                             for truth, (box, _, which, _) in zip(truths, picked)])
        own = masks[torch.arange(len(rois), device=rois.device), labels[positive]]
        summed = F.binary_cross_entropy_with_logits(own, targets, reduction="sum")
        values["loss_mask"] = summed / max(own.numel(), 1)
        prefix = f"s{stage}." if rules.cascade else ""
        losses |= {prefix + name: rules.weights[stage] * value for name, value in values.items()}
        losses[prefix + "acc"] = (logits.argmax(dim=1) == labels).float().mean() * 100
        if stage + 1 < len(rules.overlaps):
            labels = torch.where(labels == background, logits[:, :-1].argmax(dim=1), labels)
            sizes = [len(box) for box in boxes]
            with torch.no_grad():
                found = [refined(box, label, delta, stage, truth.size)[~added]  # truths are added again there
                         for (box, *_, added), label, delta, truth
                         in zip(picked, labels.split(sizes), deltas.split(sizes), truths)]
    return losses


Picked = tuple[Tensor, Tensor, Tensor, Tensor]


def _pick(rules: Rules, stage: int, proposals: Tensor, truth: Truth) -> Picked:
    """The sampled boxes of an image, positive ones first; labels and truths of the positive ones; which boxes
    are truths themselves: those are candidates too."""
    least, count = rules.overlaps[stage], len(truth.boxes)
    assigned = geometry.assign(proposals, truth.boxes, positive=least, negative=least,
                               low_quality=least if rules.low_quality else None)
    boxes = torch.cat([truth.boxes, proposals])
    assigned = torch.cat([torch.arange(1, count + 1, device=assigned.device), assigned])
    positive, negative = geometry.sample(assigned, rules.roi_samples, 0.25, f"roi{stage}", truth.key)
    which, both = assigned[positive] - 1, torch.cat([positive, negative])
    return boxes[both], truth.labels[which], which, both < count


def _box_loss(rules: Rules, stage: int, boxes: Tensor, deltas: Tensor, aims: Tensor) -> Tensor:
    """Of the positive boxes, summed."""
    if not rules.giou:
        return F.l1_loss(deltas, geometry.encode(boxes, aims, STAGE_STDS[stage]), reduction="sum")
    decoded = geometry.decode(boxes, deltas, STAGE_STDS[stage])
    return 10 * generalized_box_iou_loss(decoded, aims, reduction="sum", eps=1e-6)


def refined(box: Tensor, label: Tensor, deltas: Tensor, stage: int, size: Size) -> Tensor:
    """Boxes (n, 4) moved by the deltas (n, 4 classes) of `label` (n,), within the image."""
    return geometry.decode(box, of_class(deltas, label), STAGE_STDS[stage], size)


def of_class(deltas: Tensor, label: Tensor) -> Tensor:
    """The deltas (N, 4) of one class per row from those of all (N, 4 classes)."""
    return deltas.unflatten(1, (-1, 4))[torch.arange(len(label), device=label.device), label]


def rois_of(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes of each image as (N, 5): the image's index in front."""
    return torch.cat([F.pad(box, (1, 0), value=i) for i, box in enumerate(boxes)])
