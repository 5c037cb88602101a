"""Parameters and multiply-adds of a model, counted by running it on the meta device: no memory, no arithmetic."""
import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from models.gnconv import Operators


@dataclass(frozen=True)
class Complexity:
    """`params`: number of parameters; `flops`: multiply-adds of convolutions and Linear layers for one picture.

    Published FLOPs count the same way: no norms, gates, activations or Fourier transforms.
    """

    params: int
    flops: int


class _CountingOperators(Operators):
    def __init__(self):
        self.flops = 0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._counted(super().linear(x, weight, bias), weight)

    def depthwise(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        return self._counted(super().depthwise(x, weight, bias, scale), weight)

    def patch_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._counted(super().patch_conv(x, weight, bias), weight)

    def _counted(self, out: Tensor, weight: Tensor) -> Tensor:
        self.flops += out.numel() * weight[0].numel()
        return out


def count(model: torch.nn.Module, input_size: int | tuple[int, int]) -> Complexity:
    """Complexity of a HorNet for one picture of `input_size` (a side, or height and width) in pixels."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    params = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model = copy.deepcopy(model).eval().to("meta")
        ops = _CountingOperators()
        model.set_operators(ops)
        model(torch.empty(1, model.in_chans, height, width, device="meta"))
    return Complexity(params, ops.flops + model.num_features * model.num_classes)
