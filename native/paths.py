"""Which fast paths a CPU takes. Plain PyTorch is the definition; a path here computes the same.

A path is taken only after it has agreed with the plain one on small blocks, gradients included. What is taken
is chosen by the machine's features, never by timing, and saved with a run: resumed, it computes the same
bits.
"""
import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from common.log import logger
from models.gnconv import GnConv
from models.hornet import Block
from native import kernels
from native.build import OFF, switched_off
from native.runner import BlockRunner

PLAIN_PATHS = {"linear": "default", "kernels": "plain", "allocator": "default"}


def attach(model: nn.Module, saved: dict[str, str] | None = None) -> dict[str, str]:
    """Let the blocks of a HorNet compute on this machine's fast paths, or on the `saved` ones of a run that
    resumes.

    Returns the paths, as plain data to be saved. On other devices than CPUs all of them are plain.
    """
    device = next(model.parameters()).device
    paths = use_code_paths(saved, device) if saved else code_paths(device)
    set_paths(model, paths)
    return paths


def set_paths(model: nn.Module, paths: dict[str, str]) -> None:
    """Let a HorNet compute on `paths`, in training and evaluation."""
    onednn, compiled = paths.get("linear") == "onednn", paths.get("kernels") == "compiled"
    runner = BlockRunner(onednn, compiled) if onednn or compiled else None
    for module in model.modules():
        if isinstance(module, Block):
            module.runner = runner
    if paths.get("allocator") == "keep":
        keep_freed_memory(True)


def code_paths(device: torch.device | str) -> dict[str, str]:
    """The paths for `device` as a plain dictionary.

    "linear": "onednn" on AMD CPUs with AVX-512, where it doubles torch's default; "kernels": "compiled" where
    a C++ compiler is; "allocator": "keep" with the GNU C library (freed memory is kept: returning it costs a
    tenth of the time).
    """
    if torch.device(device).type != "cpu" or switched_off():
        return dict(PLAIN_PATHS)
    return {"linear": "onednn" if _onednn_helps() and _agrees("linear") else "default",
            "kernels": "compiled" if _agrees("kernels") else "plain",
            "allocator": "keep" if platform.libc_ver()[0] == "glibc" else "default"}


def use_code_paths(saved: dict[str, str], device: torch.device | str) -> dict[str, str]:
    """The `saved` choice where this machine has it; what is missing is plain, with one warning."""
    if torch.device(device).type != "cpu":
        return dict(PLAIN_PATHS)
    paths = PLAIN_PATHS | {name: value for name, value in saved.items() if name in PLAIN_PATHS}
    for name, value in (("linear", "onednn"), ("kernels", "compiled")):
        if paths[name] == value and (switched_off() or not _agrees(name)):
            why = f"{OFF}=0 switches off" if switched_off() else "this machine lacks"
            logger.warning("The run was begun with %s=%s, which %s: it resumes on the plain path, equal up "
                           "to rounding but not bit for bit.", name, value, why)
            paths[name] = PLAIN_PATHS[name]
    return paths


@contextmanager
def packed(*models: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """For forward passes without gradients: matrices are reordered once, not in every product.

    The weights must not change meanwhile. `dtype` is that of autocast, None without. Nothing happens on plain
    paths.
    """
    runners = [(model, runner) for model in models if (runner := runner_of(model)) is not None]
    try:
        for model, runner in runners:
            runner.pack(model, dtype or torch.float32)
        yield
    finally:
        for _, runner in runners:
            runner.packed.clear()


def runner_of(model: nn.Module) -> BlockRunner | None:
    """What `attach` gave to the blocks of `model`; None for none."""
    found = (module.runner for module in model.modules() if isinstance(module, Block))
    return next((runner for runner in found if isinstance(runner, BlockRunner)), None)


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
    """AMD with AVX-512: torch's default library (MKL) leaves out its fast code there. Elsewhere both are near
    the peak.
    """
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch.backends.mkldnn.is_available() and "AuthenticAMD" in info and " avx512f " in info


@cache
def _agrees(name: str) -> bool:
    """Whether a path works here and equals the plain one in float32, outputs and gradients."""
    if name == "kernels" and kernels.library() is None:
        return False
    runner = BlockRunner(onednn=name == "linear" or _onednn_helps(), compiled=name == "kernels")
    try:
        worst = _largest_difference(runner)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logger.warning("The CPU path %r failed its self-test (%s): plain PyTorch is used.", name, error)
        return False
    if not worst < 1e-4:
        logger.warning("The CPU path %r differs from plain PyTorch by %.1e: it is not used.", name, worst)
    return worst < 1e-4


def _largest_difference(runner: BlockRunner) -> float:
    """Between small blocks with `runner` and without, outputs and gradients, relative to each tensor's scale.
    """
    worst = 0.0
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        x, keep = torch.randn(3, 24, 9, 15), torch.tensor([[1.25, 0.0], [0.0, 1.25], [1.25, 1.25]])
        for spatial in ("conv", (5, 4)):
            block = Block(GnConv(24, 3, filter=spatial))
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.3)
            plain = _output_and_gradients(block, x, keep)
            block.runner = runner
            fast = _output_and_gradients(block, x, keep)
            worst = max(worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain, fast)))
    return worst


def _output_and_gradients(block: Block, x: Tensor, keep: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), *block.parameters()]
    out = block(leaves[0], keep)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), leaves)]
