"""The optimizer and the training loss of the options."""
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import nn

from common.errors import UserError
from common.text import did_you_mean
from config.options import Options
from config.rules import mixes
from optim.groups import param_groups

# torch's optimizers whose fused kernel takes a device flag and changes nothing when it is set. SGD's is left
# out: a flag set on its very first step leaves the momentum uninitialised (torch 2.15).
_FUSED = {"adamw", "adam"}
_FUSED_DEVICES = {"cpu", "cuda", "xpu", "mps"}
_NEED_CLOSURE = {"adahessian", "kron", "kronc", "kronw"}


def build_loss(options: Options) -> nn.Module:
    """Mean loss over a micro-batch, from logits (B, classes): for soft targets (B, classes) with the
    smoothing already inside where images are mixed, else for labels (B,) with label smoothing, else plain
    cross-entropy."""
    if mixes(options):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing > 0 else nn.CrossEntropyLoss()


def fused(name: str, devices: Iterable[str]) -> bool:
    """Whether torch has a kernel that makes a whole step of the optimizer `name` on these kinds of device."""
    return name in _FUSED and _FUSED_DEVICES.issuperset(devices)


def build_optimizer(model: nn.Module, options: Options,
                    scale_of: Callable[[str], float] | None = None) -> torch.optim.Optimizer:
    """timm's optimizer `options.opt` over `model`'s weight-decay and layer-decay groups (with `scale_of`,
    groups by the learning-rate scale of each name), fused where torch has it.

    Reads opt, lr, weight_decay, layer_decay, opt_eps, opt_betas, momentum. Raises UserError for unknown
    names; so does its `load_state_dict` for a state that does not fit (see `_fitting`).
    """
    name = options.opt.lower()
    bare = name.rsplit("_", 1)[-1]
    known = {str(each) for each in list_optimizers()} - _NEED_CLOSURE
    if bare not in known:
        hint = did_you_mean(bare, known) or "; accepted are e.g. adamw, sgd, lamb and lion."
        raise UserError(f"--opt {options.opt} is not one of timm's optimizers that train with a plain "
                        f"loop{hint}", code="invalid_value")
    groups = param_groups(model.named_parameters(), options.weight_decay, options.layer_decay, scale_of)
    settings: dict[str, Any] = {"lr": options.lr, "weight_decay": 0.0, "momentum": options.momentum,
                                "eps": options.opt_eps}
    if options.opt_betas is not None:
        settings["betas"] = tuple(options.opt_betas)
    if fused(name, {parameter.device.type for parameter in model.parameters()}):
        settings["fused"] = True
    try:
        optimizer = create_optimizer_v2(groups, name, **settings)
    except (ImportError, AssertionError) as error:
        module = get_optimizer_class(bare, bind_defaults=False).__module__
        raise UserError(f"--opt {options.opt} needs a package that is not installed ({module}: {error}).",
                        code="missing_package") from error
    inner = getattr(optimizer, "_base_optimizer", optimizer)  # of Lookahead
    inner.register_load_state_dict_pre_hook(_fitting)
    return optimizer


def _fitting(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """`state` as this optimizer can load it: moments and step counts, with this run's own choices (fused
    kernel, scales, betas) instead of the file's. Raises UserError when it is of other tensors or damaged."""
    ours, theirs = optimizer.state_dict()["param_groups"], state["param_groups"]
    here, there = ([len(group["params"]) for group in groups] for groups in (ours, theirs))
    odd = "" if here == there else f"groups of {there} tensors instead of {here}"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in theirs for index in group["params"]]
    always = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else set()
    for parameter, index in zip(parameters, indices) if state["state"] else ():
        entries = state["state"].get(index, {})
        for name in always | entries.keys():
            if not _usable(entries.get(name), parameter, exact=name in always - {"step"}):
                odd = odd or f"{name} of tensor {index}, which here has the shape {tuple(parameter.shape)}"
    if odd:
        raise UserError(f"the checkpoint's optimizer state does not fit this run ({odd}): give --model, "
                        "--opt and --layer_decay as it was trained, or start from its weights with "
                        "--finetune.", code="invalid_checkpoint")
    kept = [{**own, "params": saved["params"]} for own, saved in zip(ours, theirs)]
    return {"state": state["state"], "param_groups": kept}


def _usable(value: object, parameter: nn.Parameter, exact: bool) -> bool:
    """Whether an entry of an optimizer's state is a number, or an ordinary tensor of the parameter's shape
    or, unless `exact`, a reduction of it."""
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (int, float)) and not exact
    fits = value.shape == parameter.shape or not exact and value.ndim != parameter.ndim
    return fits and value.layout is torch.strided and not value.is_meta and not value.is_quantized
