"""`--compile`: torch.compile of the blocks of a HorNet, where it agrees with eager PyTorch and is faster.

A stage's blocks are alike and share what is compiled: one graph in training and one in evaluation, four of
each in all, and as many for the evaluation of an average, whose parameters need no gradient. What is compiled
is the plain block, with the Fourier filter as matrix products (models/dft.py says why), which the compiler
fuses with its gates, norms and layer scale.
"""
import copy
from collections.abc import Callable
from types import FunctionType
from typing import cast

import torch
from torch import Tensor, nn

from common.devices import PhaseClock, autocast, float32_products
from common.log import logger
from models.dft import use_matrix_filter
from models.hornet import Block, HorNet, Stage

_ROUNDING = 1e-3  # relative distance of a tensor that float32 sums in another order explain, tenfold


def compile_blocks(model: HorNet, shape: tuple[int, int, int, int], dtype: torch.dtype | None, *,
                   agree: Callable[[bool], bool], from_first: Callable[[str], str],
                   saved: str | None = None) -> str:
    """Let the stages that gain by it compute on compiled blocks, for batches of `shape` under autocast to
    `dtype` (None: none) in training, in float32 in evaluation.

    One batch of noise goes through both, in evaluation and in training, which also does the compiling. The
    model is left as it was, with one warning, when it cannot be compiled here, when its logits or gradients
    are further from eager float32 than rounding in `dtype` explains, or when `agree` says so: it gets this
    process' own success and answers that of all. Blocks are timed on copies, on the first process, whose
    choice `from_first` brings; no weight, gradient or random draw is touched. Returns the numbers of the
    compiled stages, from 1, such as "1 3 4"; given as `saved`, they are taken without timing.
    """
    trouble, chosen = "", ""
    blocks = [[cast(Block, block) for block in cast(Stage, stage)] for stage in model.stages]
    before = [(block, block.runner) for stage in blocks for block in stage]
    try:
        with float32_products():
            exact = _passes(model, shape, None)
        eager = _passes(model, shape, dtype)
        chosen = _fastest(model, shape, dtype) if saved is None else saved
    except Exception as error:  # Whatever a compiler raises, its own bugs included, and too little memory.
        trouble = _first_lines(error)
    chosen = from_first(chosen)
    try:
        if chosen and not trouble:
            for number in map(int, chosen.split()):
                _use(compiled_runner(number), *blocks[number - 1])
            trouble = _furthest(model, _passes(model, shape, dtype), eager, exact)
    except Exception as error:
        trouble = _first_lines(error)
    model.train()
    if agree(not trouble):
        logger.info("Compiled where it is faster: the blocks of stages %s", chosen or "none")
        return chosen
    logger.warning("--compile is not used, training continues without it: %s",
                   trouble or "another process has failed")
    use_matrix_filter(model, False)
    for block, runner in before:
        block.runner = runner
    return ""


def _use(runner: Callable, *blocks: Block) -> None:
    """Let `blocks` compute on `runner`, a compiled one, without Fourier transforms."""
    for block in blocks:
        use_matrix_filter(block)
        block.runner = runner


def compiled_runner(number: int) -> Callable:
    """A runner for the blocks of one stage (see `models.hornet.Block`)."""

    def compute(block: Block, x: Tensor, keep: Tensor | None) -> Tensor:
        return block.compute(x, keep)

    # The compiler counts its graphs per code object, and stops at eight.
    name = f"block_of_stage_{number}"
    code = compute.__code__.replace(co_name=name)
    compiled = torch.compile(FunctionType(code, compute.__globals__, name), fullgraph=True)

    def run(block: Block, x: Tensor, keep: Tensor | None) -> Tensor:
        # Compiled code would not call hooks, and nothing within it is seen by a counter.
        if (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
                or any(module._forward_hooks for module in block.modules() if module is not block)):
            return NotImplemented
        if block.gamma1 is not None:  # the first block of a stage may get a narrower type than the others
            x = x.to(torch.promote_types(x.dtype, block.gamma1.dtype))
        if not torch.is_grad_enabled():
            torch._dynamo.maybe_mark_dynamic(x, 0)  # the last batch of an evaluation is smaller
        return compiled(block, x, keep)
    return run


def _fastest(model: HorNet, shape: tuple[int, int, int, int], dtype: torch.dtype | None) -> str:
    """The numbers of the stages whose blocks are faster compiled, forward and backward."""
    chosen, (batch, _, height, width) = [], shape
    device, draws = next(model.parameters()).device, torch.Generator().manual_seed(0)
    keep = torch.ones(batch, sum(model.cfg.depths), 2, device=device)[:, 0] if model.drop_path_rate else None
    for number, stage in enumerate(model.stages, start=1):
        side, block = 2 ** (number + 1), cast(Block, copy.deepcopy(cast(Stage, stage)[0]))
        noise = torch.randn(batch, block.gnconv.dim, height // side, width // side, generator=draws)
        x = noise.to(device, memory_format=torch.channels_last).requires_grad_()
        eager = _seconds(block, x, keep, dtype)
        _use(compiled_runner(number), block)
        if _seconds(block, x, keep, dtype) < eager:
            chosen.append(str(number))
    return " ".join(chosen)


def _seconds(block: nn.Module, x: Tensor, keep: Tensor | None, dtype: torch.dtype | None) -> float:
    """Of the fastest of five forward and backward passes, behind one that compiles."""
    clock = PhaseClock(x.device)
    for turn in range(6):
        clock.begins(str(turn))
        with autocast(x.device, dtype):
            out = block(x, keep)
        torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out))
    clock.begins("end")
    return min([*clock.read().values()][1:])


def _passes(model: HorNet, shape: tuple[int, ...], dtype: torch.dtype | None) -> list[Tensor]:
    """Of one fixed batch, in float32, kept in main memory: the logits of an evaluation, those of a training,
    its gradients."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    with float32_products(), torch.no_grad():
        evaluated = model.eval()(x)
    # Nothing is dropped, so that every layer shows.
    keep_all = torch.ones(shape[0], model.num_drop_draws, device=x.device)
    with autocast(x.device, dtype):
        logits = model.train()(x, keep_all).float()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.square().mean(), parameters)
    return [tensor.detach().cpu() for tensor in (evaluated, logits, *gradients)]


def _furthest(model: nn.Module, found: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> str:
    """A sentence about the tensor further from `exact` than eager's own rounding allows; "" for none."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    names = ["the evaluation's logits", "the logits", *(f"the gradient of {name}" for name in trained)]
    worst, sentence = _ROUNDING, ""
    for name, ours, theirs, true in zip(names, found, eager, exact):
        scale = true.norm() + torch.finfo(torch.float32).tiny
        distance, allowed = float((ours - true).norm() / scale), 3 * float((theirs - true).norm() / scale)
        if not distance - allowed <= worst:  # also when it is not a number
            worst = distance - allowed
            sentence = f"{name} differs from eager PyTorch by {distance:.1e} of its size"
    return sentence


def _first_lines(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:2]])
