"""What follows a non-finite update, and where the first non-finite number came from."""
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from common.devices import asynchronous


@dataclass
class FiniteWatch:
    """Decides what follows a non-finite update. One watch serves the whole run, and it decides the same on
    every rank, since the flags it is fed are agreed.

    `mode`: "stop" ends the run at the first non-finite update; "skip" goes on without it, and asks for a
    rollback to the last good checkpoint after `in_a_row` of them; "rollback" asks for one each time. After
    `give_up_after` rollbacks, or ten times as many skipped updates, the answer is "stop".
    """
    mode: str = "skip"
    in_a_row: int = 3
    give_up_after: int = 5
    row: int = 0
    skipped: int = 0
    rollbacks: int = 0

    def state_dict(self) -> dict[str, int]:
        """The counts so far."""
        return {"row": self.row, "skipped": self.skipped, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over counts; those that `state` lacks are left as they are."""
        vars(self).update({name: state[name] for name in self.state_dict().keys() & state.keys()})

    def decide(self, finite: bool, overflow: bool = False) -> str:
        """"go", "skip", "rollback" or "stop" after an update that was `finite` or not.

        `overflow`: the loss was finite and a loss scale above 1 was in use, which will be halved. Such
        updates are how that scale finds its value; they are skipped and not held against the run.
        """
        if finite or overflow:
            self.row = 0 if finite else self.row
            return "go"
        self.row, self.skipped = self.row + 1, self.skipped + 1
        if self.mode == "stop" or self.skipped > 10 * self.give_up_after:
            return "stop"
        if self.mode == "skip" and self.row < self.in_a_row:
            return "skip"
        self.row, self.rollbacks = 0, self.rollbacks + 1
        return "stop" if self.rollbacks > self.give_up_after else "rollback"


class Readback:
    """Brings small tensors to the host when that costs no wait.

    On an accelerator the copy is asynchronous and taken when the next one has been queued, so that the device
    always has work; on the CPU it is read at once.
    """

    def __init__(self):
        self._pending: deque = deque()

    def add(self, values: torch.Tensor, context: tuple) -> None:
        """Queue the copy of `values` (1-dim), to arrive with `context`."""
        event = None
        if asynchronous(values.device):
            event = torch.Event(values.device)
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event.record()
        self._pending.append((values, event, context))

    def arrived(self, wait: bool) -> Iterator[tuple[list[float], tuple]]:
        """What has been queued and not been given yet, but without `wait` not the last on an accelerator."""
        while self._pending and (wait or len(self._pending) > 1 or self._pending[0][1] is None):
            values, event, context = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield values.tolist(), context


def diagnose(model: nn.Module, forward: Callable[[], torch.Tensor]) -> dict:
    """Replay a batch and name the first place that is not finite. Changes no weight, gradient or buffer.

    `forward` runs the unwrapped `model` on the batch and returns its loss. Returns `first_module` (name of
    the first module whose output is non-finite, in order of execution; "" for none), its `module_type`,
    `parameters` (up to ten that are non-finite themselves, or whose gradient is, last layers first) and
    `reproduced` (whether anything of this was found).
    """
    found: dict = {}

    def look(name: str):
        def hook(module, inputs, output):
            if not found and not _finite(output):
                found.update(first_module=name or "(model)", module_type=type(module).__name__)
        return hook

    # Modules end after those inside them, so the first to end with a bad output is the innermost cause.
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        loss = forward()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        bad = [name for name, p in model.named_parameters() if not _finite(p)]
        if not bad and _finite(loss):
            grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            bad = [name for (name, _), grad in zip(named, grads) if not _finite(grad)][::-1]
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    reproduced = bool(found or bad or not _finite(loss))
    return {"reproduced": reproduced, "first_module": "", "module_type": "", "parameters": bad[:10], **found}


def _finite(value: object) -> bool:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return all(bool(tensor.detach().isfinite().all()) for tensor in tensors)
