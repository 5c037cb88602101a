"""The update of the weights, written once: accumulate, scale, clip, step, average, zero.

Whether an update is finite is decided on the device and agreed by all ranks. An update that is not changes
nothing on any of them: neither weights, optimizer state nor EMA.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config.options import Options
from optim.ema import Ema
from optim.schedule import Schedule


class UpdateStats(NamedTuple):
    """What an update did, as float32 tensors on the device; reading one waits for the device.

    `loss` is this rank's mean over the update's micro-batches, `grad_norm` the norm before clipping (after it
    in the official mode), `finite` is 1.0 when the update was applied; all are 0-dim. `values` holds the
    three in one tensor, and after them 1.0 when the loss was finite on every rank, and the loss scale in use.
    """
    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    values: Tensor


class LossScale:
    """Dynamic loss scale as torch's GradScaler keeps it, in device tensors and with its state dict.

    It is separate because GradScaler reads its flag on the host for optimizers without a fused kernel, and
    does not know whether another rank overflowed.
    """

    def __init__(self, device: torch.device, enabled: bool, initial: float = 65536.0, interval: int = 2000):
        self.enabled, self.interval = enabled, interval
        self.scale = torch.tensor(initial if enabled else 1.0, device=device)
        self._good = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, finite: Tensor) -> None:
        """Halve after an overflow, double after `interval` finite updates in a row (never to infinity, which
        could not be halved again). `finite`: 0-dim bool."""
        if self.enabled:
            torch._amp_update_scale_(self.scale, self._good, 1.0 - finite.float(), 2.0, 0.5, self.interval)

    def state_dict(self) -> dict:
        """Plain values under GradScaler's names; empty when no scaling is used, as there."""
        if not self.enabled:
            return {}
        return {"scale": self.scale.item(), "growth_factor": 2.0, "backoff_factor": 0.5,
                "growth_interval": self.interval, "_growth_tracker": int(self._good.item())}

    def load_state_dict(self, state: dict) -> None:
        """Take over a state of ours or of GradScaler; nothing to do for an empty one."""
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self._good.fill_(state["_growth_tracker"])
            self.interval = int(state["growth_interval"])


def _clips_after(options: Options) -> str:
    """Clip after every "micro_batch", once per "update", or "never".

    `--clip_mode step` clips once per update; `official` as the authors' loops: in fp16 too, otherwise after
    every micro-batch and not at all for limits up to 0.1.
    """
    if options.clip_grad is None:
        return "never"
    if options.clip_mode == "step" or scales_loss(options):
        return "update"
    return "micro_batch" if options.clip_grad > 0.1 else "never"


def scales_loss(options: Options) -> bool:
    """Whether gradients are in fp16, whose range is too small for them as they are."""
    return options.use_amp and options.amp_dtype == "fp16"


class Update:
    """Turns `update_freq` micro-batches into one optimizer step.

        for m in range(update_freq):
            with update.micro_batch(last=m == update_freq - 1):
                update.backward(criterion(model(images), targets))
        stats = update.step(k)

    `model` may be wrapped by DistributedDataParallel. `schedule` gives each global update's learning rate and
    weight decay. `agree(flags)` gives the elementwise minimum over all ranks; without it there is one rank.

    Of `options` it reads update_freq, use_amp, amp_dtype, clip_mode, and clip_grad, which limits by
    `clip_by`: the total norm, the absolute value, or (agc) the ratio to the weights, the head left out as in
    the NFNets paper.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule,
                 options: Options, *, ema: Ema | None = None,
                 agree: Callable[[Tensor], Tensor] = lambda flags: flags):
        self.model, self.optimizer, self.schedule, self.options = model, optimizer, schedule, options
        self.ema, self.agree = ema, agree
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self._agc_parameters = [p for name, p in named if ".head." not in f".{name}"]
        device = self.parameters[0].device
        self.scaler = LossScale(device, scales_loss(options))
        # torch's fused optimizers divide by a device scalar and obey a device flag within their one pass over
        # the tensors. Their CPU kernel reads that scalar as float32, hence not for other weights.
        self._fused = (getattr(optimizer, "_step_supports_amp_scaling", False)
                       and all(p.dtype == torch.float32 for p in self.parameters))
        # Reading the flag on the CPU waits for nothing and saves work. Optimizers without a fused kernel know
        # no flag: there the host has to read it, which waits for an accelerator.
        self.host_reads = device.type == "cpu" or not self._fused
        self._clips_after, self._limit = _clips_after(options), options.clip_grad or 0.0
        self._loss = torch.zeros((), device=device)
        # Statistics of BatchNorm change in the forward pass; those before are kept until an update applies.
        self._buffers, self._before = list(model.buffers()), []

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of a micro-batch belong inside; ranks reduce gradients at the `last`."""
        self._before = self._before or [buffer.clone() for buffer in self._buffers]
        # What no_sync() sets, so that one code path serves both cases. Clipping the accumulated gradient
        # after every micro-batch means the reduced one, so that mode reduces each time, as the authors do.
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last or self._clips_after == "micro_batch"
        yield
        if self._clips_after == "micro_batch":
            self._clip()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, the mean over a micro-batch (0-dim)."""
        share = loss / self.options.update_freq
        self._loss += share.detach()
        (share * self.scaler.scale if self.scaler.enabled else share).backward()

    @torch.no_grad()
    def step(self, update: int) -> UpdateStats:
        """Apply global update `update`, unless a loss or the gradient is non-finite on any rank."""
        self.schedule.apply(self.optimizer, update)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        scale = self.scaler.scale.clone()
        norm = torch.nn.utils.get_total_norm(grads) / scale
        flags = self.agree(torch.stack([torch.isfinite(self._loss), torch.isfinite(norm)]).float())
        finite = flags.min() > 0
        self._step(grads, scale, norm, finite)
        for buffer, before in zip(self._buffers, self._before):
            buffer.copy_(torch.where(finite, buffer, before))
        self._before = []
        if self.ema is not None:
            self.ema.update(finite)
        self.scaler.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        values = torch.stack([self._loss, norm.float(), finite.float(), flags[0], scale])
        self._loss = torch.zeros_like(self._loss)
        return UpdateStats(values[0], values[1], values[2], values)

    def _step(self, grads: list[Tensor], scale: Tensor, norm: Tensor, finite: Tensor) -> None:
        if self.host_reads and not finite.item():
            return
        by_norm = self.options.clip_by == "norm"
        clips = self._clips_after == "update"
        divisor = scale
        if clips and by_norm:
            # The reciprocal of clip_grad_norm_'s coefficient, so that one pass unscales, clips and steps.
            divisor = scale * ((norm + 1e-6) / self._limit).clamp(min=1.0)
        in_one_pass = self._fused and (by_norm or not clips)
        if not in_one_pass and (self.scaler.enabled or clips):
            torch._foreach_div_(grads, divisor.to(grads[0].dtype))
        if clips and not by_norm:
            self._clip()
        optimizer: Any = self.optimizer  # only fused ones know the two attributes
        if in_one_pass and not (self.host_reads and divisor.item() == 1.0):
            optimizer.grad_scale = divisor.float()
        if not self.host_reads:
            optimizer.found_inf = 1.0 - finite.float()
        optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None

    @torch.no_grad()
    def _clip(self) -> None:
        if self.options.clip_by == "agc":
            adaptive_clip_grad(self._agc_parameters, self._limit)
        elif self.options.clip_by == "value":
            torch.nn.utils.clip_grad_value_(self.parameters, self._limit)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._limit)
