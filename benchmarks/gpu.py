"""`python -m benchmarks.gpu`: training and evaluation on a GPU, with its share of the peak and of each phase.

Each row is a whole update (preparation, forward, backward, clipping, fused AdamW, EMA) or a forward pass of
one micro-batch of noise on the device. `peak` is a large matrix product of the same run; MFU is 2 operations
per multiply-add, three times as many for training, over that peak. The plain reference formulation and
timm's convnext_tiny, eager and compiled, are measured in the same process. On another device with
`--device cpu --size 32 --batch 2` it shows that everything runs.
"""
import argparse
import sys
from collections.abc import Callable

import timm
import torch
from torch import nn

from benchmarks.reference import PlainHorNet
from benchmarks.timing import machine, markdown
from common.devices import PhaseClock, asynchronous, autocast, set_float32
from common.files import write_json
from common.log import logger
from config.options import Options
from datasets.dataset import Batch
from datasets.device import TrainPrepare
from dryrun import peak_memory
from engine import drop_draws
from launch.process import choose_device
from models import inspect
from models.compile import compile_blocks
from models.zoo import PUBLISHED, VARIANTS
from optim.build import build_loss, build_optimizer
from optim.ema import Ema
from optim.schedule import Schedule
from optim.update import Update
from tools.command import run_command

Step = Callable[[PhaseClock], object]
OTHERS = ("reference", "convnext", "convnext compiled")
PHASES = ("prepare", "forward", "backward", "update")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", default=[name for name in PUBLISHED if "384" not in name], metavar="MODEL")
    add("--batch", type=int, default=128, help="images per micro-batch (default 128)")
    add("--size", type=int, default=224, help="side of the images (default 224)")
    add("--repeats", type=int, default=20, help="measured updates (default 20)")
    add("--device", default="cuda", help="cuda, cuda:1, cpu, ...")
    add("--paths", nargs="+", default=["eager", "compiled", *OTHERS], choices=["eager", "compiled", *OTHERS],
        help="compiled: as --compile true; the last three stand for hornet_tiny_7x7 only")
    add("--out", default="bench-gpu.json", help="where the JSON goes (default bench-gpu.json)")
    return parser


def network(name: str, path: str, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """The network of a row, and the stages of it that are compiled."""
    model = timm.create_model(name, drop_path_rate=0.2).to(args.device).train()
    if path == "convnext compiled":
        return torch.compile(model), ""  # type: ignore
    if path == "compiled":
        shape = (args.batch, 3, args.size, args.size)
        return model, compile_blocks(model, shape, torch.bfloat16, agree=bool, from_first=str) or "nothing"
    return (PlainHorNet(model) if path == "reference" else model), ""


def steps(model: nn.Module, args: argparse.Namespace) -> tuple[Step, Step]:
    """A training update that marks its phases, and an evaluation pass, of `model` in bf16."""
    device, count, side = torch.device(args.device), args.batch, args.size
    options = Options(batch_size=count, update_freq=1, clip_grad=1.0, lr=1e-5, warmup_epochs=0, epochs=1,
                      input_size=side)
    places = torch.arange(0, count * side ** 2, 24)  # as many as are erased on average
    numbers, boxes = torch.arange(count), torch.zeros(count, 1, 4, dtype=torch.int32)
    batch = Batch(torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8), numbers, numbers, numbers,
                  boxes, 0, erased=(places, torch.randn(len(places), 3)))
    prepare, criterion = TrainPrepare(options, 1000, device), build_loss(options)
    update = Update(model, build_optimizer(model, options, lambda name: 1.0), Schedule(options, 100), options,
                    ema=Ema(getattr(model, "_orig_mod", model), 0.9999))
    draws = getattr(getattr(model, "model", model), "num_drop_draws", 0)
    pixels, _ = prepare(batch)

    def train(clock: PhaseClock) -> None:
        clock.begins("prepare")
        images, targets = prepare(batch)
        clock.begins("forward")
        with autocast(device, torch.bfloat16):
            logits = model.train()(images, *drop_draws(draws, 0, 0, batch, device).values())
        loss = criterion(logits.float(), targets)
        clock.begins("backward")
        update.backward(loss)
        clock.begins("update")
        update.step(0)

    def evaluate(clock: PhaseClock) -> None:
        clock.begins("forward")
        with torch.no_grad(), autocast(device, torch.bfloat16):
            model.eval()(pixels)
    return train, evaluate


def timed(step: Step, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each phase of a step: of `repeats`, after three that are not counted."""
    for count in (3, repeats):
        clock = PhaseClock(device)
        for _ in range(count):
            step(clock)
        clock.begins("end")
    return {phase: seconds / repeats for phase, seconds in clock.read().items()}


def peak(device: torch.device, side: int) -> float:
    """bf16 operations per second of the best of five large matrix products."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    times = (timed(lambda clock: (clock.begins(""), a @ a), device, 5) for _ in range(5))
    return 2 * side ** 3 / min(each[""] for each in times)


def rows(name: str, path: str, args: argparse.Namespace, best: float) -> list[dict]:
    """Training and evaluation of one network, whose peak of memory is that of both."""
    device = torch.device(args.device)
    if asynchronous(device):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    name = "convnext_tiny" if "convnext" in path else name
    model, note = network(name, path, args)
    flops = inspect.flops(timm.create_model(name), args.size) if name in VARIANTS else 0
    found = []
    for work, step, passes in zip(("train", "evaluate"), steps(model, args), (3, 1)):
        phases = timed(step, device, args.repeats)
        seconds = sum(phases.values())
        found.append({
            "model": name, "path": f"{path} {note}".strip(), "work": work, "batch": args.batch,
            "images_per_second": args.batch / seconds,
            "mfu": 2 * passes * flops * args.batch / seconds / best or None,
            **{phase: phases[phase] / seconds if phase in phases else None for phase in PHASES},
            "gib": peak_memory(device)[0] / 2 ** 30})
    logger.info("%s", found)
    return found


def table(found: list[dict]) -> str:
    """The rows as a Markdown table."""
    forms = {"images_per_second": ",.1f", "gib": ".1f"} | dict.fromkeys(("mfu", *PHASES), ".1%")
    return markdown(", ".join(found[0]), [
        ["" if value is None else format(value, forms.get(key, "")) for key, value in row.items()]
        for row in found])


def _work(args: argparse.Namespace) -> int:
    set_float32(False)
    device = choose_device(args.device, 0, 1)
    best, found = peak(device, 8192 if asynchronous(device) else 256), []
    for name in args.models:
        for path in args.paths:
            if path not in OTHERS or name == args.models[0]:
                torch.compiler.reset()
                found += rows(name, path, args, best)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    about = machine() | {"device": name, "peak_tflops": best / 1e12}
    write_json(args.out, {"machine": about, "rows": found})
    print("\n\n".join([str(about), table(found)]))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(_parser(), _work, argv)


if __name__ == "__main__":
    sys.exit(main())
