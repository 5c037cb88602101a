"""Exponential moving average of the weights."""
import copy

import torch
from torch import nn

from config.options import Options


class Ema:
    """A model whose entries follow those of another: `ema += (1 - decay) * (weights - ema)` after each
    update.

    `module` has the averaged weights. It starts as a copy of `model` and covers every state-dict entry
    (integer ones are copied). `device` keeps it elsewhere, e.g. on the CPU (`--model_ema_force_cpu`). All
    ranks compute the same values from the same weights.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | str | None = None):
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        if device is not None:
            self.module.to(device)
        source, own = (network.state_dict(keep_vars=True) for network in (model, self.module))
        self._pairs = [(own[name], source[name]) for name in own]

    @torch.no_grad()
    def update(self, applied: torch.Tensor) -> None:
        """Follow the model once. `applied` (0-dim bool) false on the device leaves everything as it is.

        On the CPU the flag is read, elsewhere it is a factor, so that the host need not wait.
        """
        on_host = "cpu" in (applied.device.type, self._pairs[0][0].device.type)
        if on_host and not applied.item():
            return
        pairs = [(own, value.to(own.device)) for own, value in self._pairs]
        own, new = map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point())))
        if on_host:
            torch._foreach_lerp_(own, new, 1 - self.decay)
        else:
            masked_lerp_(own, new, (1 - self.decay) * applied)
        for target, value in pairs:
            if not target.is_floating_point():
                target.copy_(value if on_host else torch.where(applied, value, target))


def masked_lerp_(own: list[torch.Tensor], new: list[torch.Tensor], weight: torch.Tensor) -> None:
    """`own += weight * (new - own)` with a 0-dim `weight` on the device (`_foreach_lerp_` takes numbers)."""
    change = torch._foreach_sub(new, own)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(own, change)


def half_life_notice(options: Options, updates_per_epoch: int) -> str | None:
    """A sentence when the average could not follow within this run: the half-life of a weight's share in it
    is above a fifth of the run. None if it can. A decay that fits has one of a twentieth."""
    decay, updates = options.model_ema_decay, options.epochs * updates_per_epoch
    if not options.model_ema or decay <= 0.5 ** (5 / updates):
        return None
    return (f"--model_ema_decay {decay:g} lets the averaged weights lag behind in a run of {updates:,} "
            f"updates: --model_ema_decay {0.5 ** (20 / updates):.5g} fits.")
