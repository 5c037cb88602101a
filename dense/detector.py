"""Mask R-CNN and Cascade Mask R-CNN on HorNet: the networks, and how they find objects.

Names are those of the published files. What differs between the two systems, and what they learn, stands in
`detector_losses`.
"""
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense import boxes as geometry
from dense.backbone import Backbone, Filters
from dense.boxes import Size
from dense.detector_losses import STAGE_STDS, SYSTEMS, Rules, Truth, refined, roi_losses, rois_of, rpn_losses
from dense.necks import FPN, ConvNormAct, Filter


class Detections(NamedTuple):
    """Objects of one image in its original size: boxes float32 (n, 4), scores (n,), labels int64 (n,), masks
    bool (n, height, width)."""
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


class RPNHead(nn.Module):
    """Scores and deltas of three anchors per cell of each map."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.rpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.rpn_cls = nn.Conv2d(width, 3, 1)
        self.rpn_reg = nn.Conv2d(width, 12, 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            _normal(layer, 0.01)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, 3, h, w) and deltas (B, 12, h, w), anchor by anchor, of each level, float32."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        return [self.rpn_cls(x).float() for x in hidden], [self.rpn_reg(x).float() for x in hidden]


class BoxHead(nn.Module):
    """RoI features (N, width, 7, 7) to logits (N, classes + 1), background last, deltas (N, 4 classes)."""

    def __init__(self, classes: int, rules: Rules, width: int = 256):
        super().__init__()
        hidden = 4 * width
        self.fc_cls = nn.Linear(hidden, classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 * classes)
        self.shared_convs = nn.ModuleList(ConvNormAct(width, width, 3) for _ in range(rules.convolutions))
        self.shared_fcs = nn.ModuleList(
            nn.Linear(hidden if i else width * 7 * 7, hidden) for i in range(rules.layers))
        _normal(self.fc_cls, 0.01)
        _normal(self.fc_reg, 0.001)
        for layer in self.shared_fcs:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.shared_convs:
            x = layer(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x).float(), self.fc_reg(x).float()


class MaskHead(nn.Module):
    """RoI features (N, width, 14, 14) to mask logits (N, classes, 28, 28)."""

    def __init__(self, classes: int, width: int = 256, torch_defaults: bool = False):
        super().__init__()
        self.convs = nn.ModuleList(ConvNormAct(width, width, 3, norm=False, act=True) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv_logits = nn.Conv2d(width, classes, 1)
        for layer in () if torch_defaults else (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.constant_(layer.get_parameter("bias"), 0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = layer(x)
        return self.conv_logits(F.relu(self.upsample(x))).float()


class RoIHead(nn.Module):
    """The box and mask heads of all stages; a single stage has no number in the names."""

    def __init__(self, classes: int, rules: Rules, width: int = 256):
        super().__init__()
        boxes = [BoxHead(classes, rules, width) for _ in rules.overlaps]
        # The published cascade leaves its mask heads at PyTorch's initial values.
        masks = [MaskHead(classes, width, torch_defaults=rules.cascade) for _ in rules.overlaps]
        self.bbox_head = nn.ModuleList(boxes) if rules.cascade else boxes[0]
        self.mask_head = nn.ModuleList(masks) if rules.cascade else masks[0]

    @property
    def stages(self) -> list[tuple[nn.Module, nn.Module]]:
        """Box head and mask head of each stage."""
        boxes, masks = self.bbox_head, self.mask_head
        if isinstance(boxes, nn.ModuleList) and isinstance(masks, nn.ModuleList):
            return list(zip(boxes, masks))
        return [(boxes, masks)]


class Detector(nn.Module):
    """Backbone, pyramid, proposals and stages of heads.

    Called in training with normalised images float (B, 3, H, W) and a Truth for each, it gives its losses by
    name; `detect` finds the objects of one image.

    Args:
        model: name of the HorNet.
        filters: grids of its filters, as in `Backbone`.
        neck_filter: None for FPN; "conv" or a grid for HorFPN.
        system: a name in SYSTEMS.
        width: channels of pyramid and heads, 256 as published.
        roi_samples: boxes of an image that the heads learn from.
    """

    def __init__(self, model: str, classes: int = 80, filters: Filters | None = None,
                 neck_filter: Filter | None = None, system: str = "cascade_mask_rcnn", drop_path: float = 0.0,
                 width: int = 256, layer_scale_init_value: float = 1e-6, roi_samples: int = 512):
        super().__init__()
        self.rules, self.classes = replace(SYSTEMS[system], roi_samples=roi_samples), classes
        self.backbone = Backbone(model, filters, drop_path, layer_scale_init_value)
        self.neck = FPN(self.backbone.channels, neck_filter, width)
        self.rpn_head = RPNHead(width)
        self.roi_head = RoIHead(classes, self.rules, width)

    @property
    def num_drop_draws(self) -> int:
        """Uniform draws per image that drop path takes."""
        return self.backbone.num_drop_draws

    def forward(self, images: Tensor, truths: Sequence[Truth],
                drop_draws: Tensor | None = None) -> dict[str, Tensor]:
        """The losses of a batch, each 0-dim or, of the anchors, one per level (5,); they are to be summed."""
        maps = self.neck(self.backbone(images, drop_draws))
        logits, deltas = self.rpn_head(maps)
        losses = rpn_losses(self.rules, logits, deltas, truths)
        with torch.no_grad():
            found = self.proposals(logits, deltas, [truth.size for truth in truths],
                                   per_level=2000, count=self.rules.proposals)
        return losses | roi_losses(self.rules, self.roi_head.stages, maps, found, truths)

    def proposals(self, logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Sequence[Size], *,
                  per_level: int = 1000, count: int = 1000) -> list[Tensor]:
        """Boxes (n, 4) per image from the maps of the anchors, within its size before padding."""
        grid = geometry.anchors([(x.shape[2], x.shape[3]) for x in logits], logits[0].device)
        scores = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        moves = [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas]
        found = []
        for i, size in enumerate(sizes):
            found.append(geometry.proposals([x[i] for x in scores], [x[i] for x in moves], grid, size,
                                            per_level=per_level, count=count)[0])
        return found

    @torch.no_grad()
    def detect(self, image: Tensor, size: Size, original: Size, given: Tensor | None = None,
               threshold: float = 0.05) -> Detections:
        """The objects of one normalised image (1, 3, H, W), `size` before padding, in its `original` size.

        `given`: boxes (n, 4) in the network's image to use as proposals.
        """
        maps = self.neck(self.backbone(image))
        if given is None:
            scores, moves = self.rpn_head(maps)
            given, = self.proposals(scores, moves, [size])
        box = given
        logits, deltas = [], box.new_zeros(len(box), 4 * self.classes)
        for stage, (head, _) in enumerate(self.roi_head.stages):
            if stage:
                box = refined(box, logits[-1][:, :-1].argmax(dim=1), deltas, stage - 1, size)
            logit, deltas = head(geometry.pool(maps, rois_of([box]), 7))
            logits.append(logit)
        factor = box.new_tensor([size[1] / original[1], size[0] / original[0]] * 2)
        every = geometry.decode(box, deltas, STAGE_STDS[len(logits) - 1], size).unflatten(1, (-1, 4)) / factor
        scores = torch.stack(logits).mean(dim=0).softmax(dim=1)
        box, score, label = geometry.best_of_each_class(every, scores, threshold=threshold)
        features = geometry.pool(maps, rois_of([box * factor]), 14)
        masks = torch.stack([head(features).sigmoid() for _, head in self.roi_head.stages]).mean(dim=0)
        masks = masks[torch.arange(len(label), device=label.device), label]
        return Detections(box, score, label, geometry.paste(masks, box, original))


def _normal(layer: nn.Linear | nn.Conv2d, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
