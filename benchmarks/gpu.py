"""`python -m benchmarks.gpu`: training and evaluation on a GPU, with its share of the peak and of each phase.

Each row is a whole update (preparation, forward, backward, clipping, fused AdamW, EMA) or a forward pass of
one micro-batch of noise on the device, in bf16. The peak is a large matrix product of the same run; MFU is 2
operations per multiply-add, three times as many for training, over that peak. Of the paths, compiled is as
--compile true; the plain reference formulation and timm's convnext_tiny, eager and compiled, are measured in
the same process, beside the first model alone. On another device with `--device cpu --size 32 --batch 2` it
shows that everything runs.
"""
import argparse
import sys
from collections.abc import Callable

import timm
import torch
from torch import nn

from benchmarks.cases import noise, steps
from benchmarks.reference import PlainHorNet
from benchmarks.timing import Row, new_parser, report
from common.devices import PhaseClock, asynchronous, set_float32
from dryrun import peak_memory
from launch.process import choose_device
from models import inspect
from models.compile import compile_blocks
from models.zoo import MODEL_NAMES, PUBLISHED
from tools.command import run_command

PATHS = ["eager", "compiled", "reference", "convnext", "convnext compiled"]
PHASES = ("prepare", "forward", "backward", "update")


def network(name: str, path: str, args: argparse.Namespace) -> nn.Module:
    """The network of a row."""
    model = timm.create_model(name, drop_path_rate=0.2).to(args.device).train()
    if path == "convnext compiled":
        model.compile()
    if path == "compiled":
        shape = (args.batch, 3, args.size, args.size)
        compile_blocks(model, shape, torch.bfloat16, agree=bool, from_first=str)
    return PlainHorNet(model) if path == "reference" else model


def timed(step: Callable[[PhaseClock], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each phase of a step: of `repeats`, after three that are not counted."""
    for count in (3, repeats):
        clock = PhaseClock(device)
        for _ in range(count):
            step(clock)
        clock.begins("end")
    return {phase: seconds / repeats for phase, seconds in clock.read().items()}


def peak(device: torch.device, side: int) -> float:
    """bf16 operations per second of a large matrix product."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side ** 3 / timed(lambda clock: (clock.begins(""), a @ a), device, 20)[""]


def rows(name: str, path: str, args: argparse.Namespace, best: float) -> list[Row]:
    """Training and evaluation of one network, whose peak of memory is that of both."""
    device, found = torch.device(args.device), []
    if asynchronous(device):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    name = "convnext_tiny" if "convnext" in path else name
    works = steps(network(name, path, args), noise(args.batch, args.size), device, torch.bfloat16)
    flops = inspect.flops(timm.create_model(name), args.size) if name in MODEL_NAMES else 0
    for (work, step), passes in zip(works.items(), (3, 1)):
        phases = timed(step, device, args.repeats)
        seconds = sum(phases.values())
        found.append({
            "model": name, "path": path, "work": work, "batch": args.batch, "img/s": args.batch / seconds,
            "mfu": 2 * passes * flops * args.batch / seconds / best or "",
            **{phase: phases.get(phase, 0) / seconds for phase in PHASES},
            "GiB": peak_memory(device)[0] / 2 ** 30})
    sys.stderr.write("".join(f"{row}\n" for row in found))
    return found


def _work(args: argparse.Namespace) -> int:
    set_float32(False)
    device = choose_device(args.device, 0, 1)
    best, found = peak(device, 8192 if asynchronous(device) else 256), []
    for name in args.models:
        for path in args.paths:
            if path in PATHS[:2] or name == args.models[0]:
                torch.compiler.reset()
                found += rows(name, path, args, best)
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return report(found, args.out, device=about, peak_tflops=best / 1e12)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("benchmarks.gpu", __doc__, {"models": MODEL_NAMES, "paths": PATHS}, paths=PATHS,
                        models=[name for name in PUBLISHED if "384" not in name], batch=128, size=224,
                        repeats=20, device="cuda", out="bench-gpu.json")
    return run_command(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
