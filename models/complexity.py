"""Parameters and multiply-adds of a model, counted by running it on the meta device: no memory, no arithmetic."""
import copy
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """`params`: number of parameters; `flops`: multiply-adds of convolutions and Linear layers for one picture.

    Published FLOPs count the same way: no norms, gates, activations or Fourier transforms.
    """

    params: int
    flops: int


def count(model: torch.nn.Module, input_size: int | tuple[int, int]) -> Complexity:
    """Complexity of a HorNet for one picture of `input_size` (a side, or height and width) in pixels."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    params = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model = copy.deepcopy(model).eval().to("meta")
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, model.in_chans, height, width, device="meta"))
    return Complexity(params, counter.get_total_flops() // 2)
