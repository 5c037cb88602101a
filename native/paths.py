"""Optional fast paths. Plain PyTorch (`models.gnconv.Operators`) is the definition; a path here computes the same.

    paths = code_paths(device)             # chosen by the device's features, never by timing; save it with the run
    paths = use_code_paths(saved, device)  # on resume: the saved choice, so that the same bits come out
    accelerate(model, paths)               # give the model its operators
    with packed(model): ...                # evaluation: weights in the library's own layout meanwhile

A path is taken only after it has agreed with the plain one on small inputs, gradients included.
"""
import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from common.log import logger
from models.gnconv import PLAIN, Operators

PLAIN_PATHS = {"linear": "default", "kernels": "plain", "allocator": "default"}


def code_paths(device: torch.device | str) -> dict[str, str]:
    """The paths for `device` as a plain dictionary.

    "linear": "onednn" on AMD CPUs with AVX-512, where it doubles torch's default; "kernels": "compiled" where a C++ compiler
    is; "allocator": "keep" with the GNU C library (freed memory is kept: returning it costs a tenth of the time).
    """
    if torch.device(device).type != "cpu":
        return dict(PLAIN_PATHS)
    return {"linear": "onednn" if _onednn_helps() and _agrees("linear") else "default",
            "kernels": "compiled" if _agrees("kernels") else "plain",
            "allocator": "keep" if platform.libc_ver()[0] == "glibc" else "default"}


def use_code_paths(saved: dict[str, str], device: torch.device | str) -> dict[str, str]:
    """The `saved` choice where this machine has it; what it lacks is plain and told in one warning."""
    if torch.device(device).type != "cpu":
        return dict(PLAIN_PATHS)
    paths = {**PLAIN_PATHS, **{name: value for name, value in saved.items() if name in PLAIN_PATHS}}
    for name, value in (("linear", "onednn"), ("kernels", "compiled")):
        if paths[name] == value and not _agrees(name):
            logger.warning("The run used %s=%s, which this machine lacks: it goes on with the plain path, equal up "
                           "to rounding but not bit for bit.", name, value)
            paths[name] = PLAIN_PATHS[name]
    return paths


def operators(paths: dict[str, str]) -> Operators:
    """The operators that `paths` name."""
    onednn, compiled = paths.get("linear") == "onednn", paths.get("kernels") == "compiled"
    if not onednn and not compiled:
        return PLAIN
    from native.operators import CpuOperators
    return CpuOperators(onednn, compiled)


def accelerate(model: nn.Module, paths: dict[str, str]) -> None:
    """Let a HorNet compute with `paths`, in training and evaluation."""
    model.set_operators(operators(paths))
    if paths.get("allocator") == "keep":
        keep_freed_memory(True)


@contextmanager
def packed(*models: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """For forward passes without gradients: matrices are reordered once, not in every product.

    The weights must not change meanwhile. `dtype` is that of autocast, None without. Nothing happens with plain
    operators.
    """
    able = [model for model in models
            if hasattr(getattr(model, "ops", PLAIN), "pack") and next(model.parameters()).device.type == "cpu"]
    try:
        for model in able:
            model.ops.pack(model, dtype or torch.float32)
        yield
    finally:
        for model in able:
            model.ops.packed.clear()


def keep_freed_memory(keep: bool) -> None:
    """Let the GNU C library keep large freed blocks for the next allocation instead of giving them back.

    Every activation is large enough to be mapped and unmapped by the kernel otherwise, page by page.
    """
    libc = ctypes.CDLL(None)
    max_mappings, top_padding, trim_threshold = -4, -2, -1  # M_MMAP_MAX, M_TOP_PAD, M_TRIM_THRESHOLD
    libc.mallopt(max_mappings, 0 if keep else 65536)
    libc.mallopt(top_padding, 2 ** 26 if keep else 128 * 1024)
    libc.mallopt(trim_threshold, -1 if keep else 128 * 1024)  # -1: never


def _onednn_helps() -> bool:
    """AMD with AVX-512: torch's default library (MKL) leaves out its fast code there. Elsewhere both are near the peak."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch.backends.mkldnn.is_available() and "AuthenticAMD" in info and " avx512f " in info


@cache
def _agrees(name: str) -> bool:
    """Whether a path works here and equals the plain one in float32, outputs and gradients."""
    from native import kernels as native, operators as cpu
    if name == "kernels" and native.library() is None:
        return False
    ops = cpu.CpuOperators(onednn=name == "linear" or _onednn_helps(), compiled=name == "kernels")
    try:
        worst = _largest_difference(ops)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logger.warning("The CPU path %r failed its self-test (%s): plain PyTorch is used.", name, error)
        return False
    if not worst < 1e-4:
        logger.warning("The CPU path %r differs from plain PyTorch by %.1e: it is not used.", name, worst)
    return worst < 1e-4


def _largest_difference(ops: Operators) -> float:
    """Between a small HorNet block-like computation with `ops` and with the plain operators, relative to its scale."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, 15, 24, generator=draw)
    shapes = dict(norm=(24,), shift=(24,), pw=(12, 6, 1, 1), pw_bias=(12,), first=(40, 12), bias=(40,),
                  second=(24, 40), bias2=(24,), wide=(24, 1, 7, 7), small=(24, 1, 3, 3), half=(12, 1, 3, 3),
                  spectrum=(12, 5, 4, 2), gamma=(24,))
    p = {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}
    keep = torch.tensor([1.25, 0.0, 1.25])
    results = []
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for each in (PLAIN, ops):
            leaves = [t.clone().requires_grad_() for t in (x, *p.values())]
            t = dict(zip(p, leaves[1:]))

            def branch(y):
                y = each.layer_norm(y, t["norm"], t["shift"], 1e-6)
                y = each.depthwise(each.depthwise(y, t["wide"], t["shift"]), t["small"], None)
                y = each.global_local(y, t["half"], t["spectrum"])
                y = each.recursion(y[..., :6], y[..., 6:], [(t["pw"], t["pw_bias"])])
                return each.linear(each.linear_gelu(y, t["first"], t["bias"]), t["second"], t["bias2"])

            out = each.residual(leaves[0], branch, t["gamma"], keep)
            results.append([out, *torch.autograd.grad(out.square().mean(), leaves)])
    return max(float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in zip(*results))
