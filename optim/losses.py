"""The training loss that fits the targets."""
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def mixing(options) -> bool:
    """Whether mixup or cutmix is on, so that targets are soft (B, classes) with the smoothing already inside."""
    return options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None


def build_loss(options) -> nn.Module:
    """Mean loss over a micro-batch: soft-target with mixing, else label smoothing, else plain cross-entropy."""
    if mixing(options):
        return SoftTargetCrossEntropy()
    if options.smoothing > 0:
        return LabelSmoothingCrossEntropy(options.smoothing)
    return nn.CrossEntropyLoss()
