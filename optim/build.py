"""Optimizers by name."""
import difflib

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import nn

from common.errors import UserError
from optim.groups import param_groups

# torch's optimizers whose fused kernel takes a device flag and changes nothing when it is set. SGD's is left out:
# a flag set on its very first step leaves the momentum uninitialised (torch 2.15).
_FUSED = {"adamw", "adam"}
_FUSED_DEVICES = {"cpu", "cuda", "xpu", "mps"}
_NEED_CLOSURE = {"adahessian", "kron", "kronc", "kronw"}


def build_optimizer(model: nn.Module, options) -> torch.optim.Optimizer:
    """timm's optimizer `options.opt` over `model`'s weight-decay and layer-decay groups, fused where torch has it.

    Reads opt, lr, weight_decay, layer_decay, opt_eps, opt_betas, momentum. Raises UserError for unknown names.
    """
    name = options.opt.lower()
    bare = name.rsplit("_", 1)[-1]
    if bare not in list_optimizers() or bare in _NEED_CLOSURE:
        near = difflib.get_close_matches(bare, set(list_optimizers()) - _NEED_CLOSURE, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; accepted are e.g. adamw, sgd, lamb and lion."
        raise UserError(f"--opt {options.opt} is not one of timm's optimizers that train with a plain loop{hint}")
    groups = param_groups(model.named_parameters(), options.weight_decay, options.layer_decay)
    settings = {"lr": options.lr, "weight_decay": 0.0, "momentum": options.momentum, "eps": options.opt_eps}
    if options.opt_betas is not None:
        settings["betas"] = tuple(options.opt_betas)
    devices = {parameter.device.type for parameter in model.parameters()}
    if name in _FUSED and devices <= _FUSED_DEVICES:
        settings["fused"] = True
    try:
        return create_optimizer_v2(groups, name, **settings)
    except (ImportError, AssertionError) as error:
        module = get_optimizer_class(bare, bind_defaults=False).__module__
        raise UserError(f"--opt {options.opt} needs a package that is not installed ({module}: {error}).") from error


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restore moments and step counts from `state`, and keep this run's own choices (fused kernel, scales, betas).

    `Optimizer.load_state_dict` would take over the file's `fused=None`. Raises UserError when the file's groups
    hold other numbers of tensors, or moments of other shapes.
    """
    ours, theirs = optimizer.state_dict()["param_groups"], state["param_groups"]
    if [len(group["params"]) for group in ours] != [len(group["params"]) for group in theirs]:
        raise UserError(
            f"the checkpoint's optimizer state has groups of {[len(g['params']) for g in theirs]} tensors, this run's "
            f"of {[len(g['params']) for g in ours]}: resume with the same --layer_decay, --opt and model, or start "
            f"from its weights with --finetune.")
    sizes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    order = [index for group in theirs for index in group["params"]]
    for index, shape in zip(order, sizes):
        for name, value in state["state"].get(index, {}).items():
            if torch.is_tensor(value) and value.ndim == len(shape) > 0 and value.shape != shape:
                raise UserError(f"the checkpoint's optimizer state {name} of tensor {index} has shape "
                                f"{tuple(value.shape)}, this model's tensor {tuple(shape)}: it is of another model; "
                                f"give --model as it was trained, or start from its weights with --finetune.")
    kept = [{**own, "params": saved["params"]} for own, saved in zip(ours, theirs)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": kept})
