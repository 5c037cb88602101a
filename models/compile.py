"""`--compile`: torch.compile around a HorNet, used only after it has agreed with eager PyTorch on a batch.

What is compiled is the plain network, with the Fourier filter as matrix products (models/dft.py says why).
"""
from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from common.devices import float32_products
from common.log import logger
from models.dft import use_matrix_filter

_ROUNDING = 1e-3  # relative distance of a tensor that float32 sums in another order explain, tenfold


def compile_model(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype | None,
                  agree: Callable[[bool], bool]) -> nn.Module:
    """A HorNet in training mode, compiled for batches of `shape` under autocast to `dtype` (None: none).

    One batch of noise goes through both, forward and backward, which also does the compiling. Returns the
    model itself, as it was and with one warning, when it cannot be compiled here, when its logits or
    gradients are further from eager float32 than rounding in `dtype` explains, or when `agree` says so: it
    gets this process' own success and answers that of all. Parameters, gradients and their names are the
    model's own either way.
    """
    compiled, trouble = model, ""
    try:
        with float32_products():
            exact = _logits_and_gradients(model, model, shape, None)
        eager = _logits_and_gradients(model, model, shape, dtype)
        use_matrix_filter(model)
        compiled = cast(nn.Module, torch.compile(model))
        trouble = _furthest(model, _logits_and_gradients(compiled, model, shape, dtype), eager, exact)
    except Exception as error:  # Whatever a compiler raises, its own bugs included, and too little memory.
        trouble = " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:2]])
    if agree(not trouble):
        return compiled
    logger.warning("--compile is not used, training continues without it: %s",
                   trouble or "another process has failed")
    use_matrix_filter(model, False)
    return model


def _logits_and_gradients(call: nn.Module, model: nn.Module, shape: tuple[int, ...],
                          dtype: torch.dtype | None) -> list[Tensor]:
    """Of one fixed batch, in float32, kept in main memory."""
    device, draw = next(model.parameters()).device, torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw).to(device)
    # Nothing is dropped, so that every layer shows.
    keep_all = torch.ones(shape[0], cast(int, model.num_drop_draws), device=device)
    with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
        logits = call(x, keep_all).float()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.square().mean(), parameters)
    return [tensor.detach().cpu() for tensor in (logits, *gradients)]


def _furthest(model: nn.Module, found: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> str:
    """A sentence about the tensor further from `exact` than eager's own rounding allows; "" for none."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    names = ["the logits", *(f"the gradient of {name}" for name in trained)]
    worst, sentence = _ROUNDING, ""
    for name, ours, theirs, true in zip(names, found, eager, exact):
        scale = true.norm() + torch.finfo(torch.float32).tiny
        distance, allowed = float((ours - true).norm() / scale), 3 * float((theirs - true).norm() / scale)
        if not distance - allowed <= worst:  # also when it is not a number
            worst = distance - allowed
            sentence = f"{name} differs from eager PyTorch by {distance:.1e} of its size"
    return sentence
