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
from torch import Tensor, nn

from benchmarks.reference import PlainHorNet
from benchmarks.timing import machine, markdown
from common.devices import PhaseClock, asynchronous, autocast, set_float32
from common.files import write_json
from common.log import logger
from config.options import Options
from datasets.dataset import Batch
from datasets.device import TrainPrepare
from engine import drop_draws
from models.compile import compile_blocks
from models.hornet import HorNet
from models.inspect import complexity
from optim.build import build_loss, build_optimizer
from optim.ema import Ema
from optim.schedule import Schedule
from optim.update import Update
from tools.command import run_command

GOALS = {"hornet_tiny_7x7": 6200, "hornet_base_7x7": 2100, "hornet_large_7x7": 1190}  # img/s, one H200
_TITLES = ("model, path, work, batch, img/s, MFU, prepare, forward, backward, update, GiB, goal on an H200")
OTHERS = ("reference", "convnext", "convnext compiled")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=[f"hornet_{size}_{kind}" for size in ("tiny", "small", "base", "large")
                                        for kind in ("7x7", "gf")], metavar="MODEL")
    add("--batch", type=int, default=128, help="images per micro-batch (default 128)")
    add("--size", type=int, default=224, help="side of the images (default 224)")
    add("--repeats", type=int, default=20, help="measured updates (default 20)")
    add("--device", default="cuda", help="cuda, cuda:1, cpu, ...")
    add("--paths", nargs="+", default=["eager", "compiled", *OTHERS], choices=["eager", "compiled", *OTHERS],
        help="compiled: as --compile true; the last three stand for hornet_tiny_7x7 only")
    add("--out", default="bench-gpu.json", help="where the JSON goes (default bench-gpu.json)")
    return parser


def network(name: str, path: str, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """The network of a row, and what of it is compiled."""
    if path.startswith("convnext"):
        model = timm.create_model("convnext_tiny", drop_path_rate=0.1).to(args.device).train()
        return (torch.compile(model), "all") if "compiled" in path else (model, "")  # type: ignore
    model = timm.create_model(name, drop_path_rate=0.2).to(args.device).train()
    if path == "compiled":
        chosen = compile_blocks(model, (args.batch, 3, args.size, args.size), torch.bfloat16, agree=bool, from_first=str)
        return model, f"stages {chosen}" if chosen else "nothing"
    return (PlainHorNet(model) if path == "reference" else model), ""


def updates(model: nn.Module, args: argparse.Namespace) -> tuple[Callable[[PhaseClock], None], Callable[[], Tensor]]:
    """One training update that marks its phases, and one evaluation pass, of `model` in bf16."""
    device, count = torch.device(args.device), args.batch
    options = Options(batch_size=count, update_freq=1, clip_grad=1.0, opt="adamw", lr=1e-5, warmup_epochs=0, epochs=1,
                      input_size=args.size)
    erased = torch.arange(0, count * args.size ** 2, 24), torch.randn(-(count * args.size ** 2 // -24), 3)
    batch = Batch(torch.randint(0, 256, (count, args.size, args.size, 3), dtype=torch.uint8), torch.arange(count),
                  torch.arange(count), torch.arange(count), torch.zeros(count, 1, 4, dtype=torch.int32), 0, erased=erased)
    prepare, criterion = TrainPrepare(options, 1000, device), build_loss(options)
    update = Update(model, build_optimizer(model, options), Schedule(options, 100), options,
                    ema=Ema(getattr(model, "_orig_mod", model), 0.9999))
    draws = getattr(getattr(model, "model", model), "num_drop_draws", 0)

    def train(clock: PhaseClock) -> None:
        clock.begins("prepare")
        images, targets = prepare(batch)
        clock.begins("forward")
        with autocast(device, torch.bfloat16):
            logits = model(images, *drop_draws(draws, 0, 0, batch, device).values())
        loss = criterion(logits.float(), targets)
        clock.begins("backward")
        update.backward(loss)
        clock.begins("update")
        update.step(0)
        clock.begins("end")

    def evaluate() -> Tensor:
        with torch.no_grad(), autocast(device, torch.bfloat16):
            return model(images)

    images = prepare(batch)[0]
    return train, evaluate


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds per call, of `repeats` after three that are not counted, on the device's clock."""
    for _ in range(3):
        call()
    clock = PhaseClock(device)
    clock.begins("work")
    for _ in range(repeats):
        call()
    clock.begins("end")
    return clock.read()["work"] / repeats


def peak(device: torch.device, size: int) -> float:
    """bf16 operations per second of the best of five large matrix products."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size ** 3 / min(measure(lambda: a @ a, device, 5) for _ in range(5))


def row(name: str, path: str, args: argparse.Namespace, best: float) -> list[dict]:
    """Training and evaluation of one network."""
    device = torch.device(args.device)
    module = torch.get_device_module(device) if asynchronous(device) else None
    if module:
        module.empty_cache()
        module.reset_peak_memory_stats(device)
    model, compiled = network(name, path, args)
    flops = complexity(model, args.size).flops if isinstance(model, HorNet) else None
    train, evaluate = updates(model, args)
    clock = PhaseClock(device)
    seconds = measure(lambda: train(PhaseClock(device)), device, args.repeats)
    for _ in range(args.repeats):
        train(clock)
    phases = clock.read()
    spent = sum(phases[phase] for phase in ("prepare", "forward", "backward", "update"))
    memory = module.max_memory_allocated(device) / 2 ** 30 if module else None
    model.eval()
    found = []
    for work, each, times in (("train", seconds, 3), ("evaluate", measure(evaluate, device, args.repeats), 1)):
        found.append({
            "model": "convnext_tiny" if path.startswith("convnext") else name, "path": path, "work": work,
            "compiled": compiled, "batch": args.batch, "images_per_second": args.batch / each,
            "mfu": None if flops is None else times * 2 * flops * args.batch / each / best, "gib": memory,
            "shares": {phase: phases[phase] / spent for phase in phases if phase != "end"} if times == 3 else {}})
    logger.info("%s", found)
    return found


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)
    return markdown(_TITLES, [[
        each["model"], f"{each['path']} {each['compiled']}".strip(), each["work"], str(each["batch"]),
        text(each["images_per_second"], ",.1f"), text(each["mfu"], ".1%"),
        *(text(each["shares"].get(phase), ".1%") for phase in ("prepare", "forward", "backward", "update")),
        text(each["gib"], ".1f"),
        text(GOALS.get(each["model"]) if each["work"] == "train" and each["path"] == "compiled" else None, ",")]
        for each in rows])


def _work(args: argparse.Namespace) -> int:
    set_float32(False)
    device = torch.device(args.device)
    best = peak(device, 8192 if asynchronous(device) else 256)
    rows = []
    for name in args.models:
        for path in args.paths:
            if path not in OTHERS or name == args.models[0]:
                torch.compiler.reset()
                rows += row(name, path, args, best)
    about = machine() | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else args.device,
                         "peak_tflops": best / 1e12}
    write_json(args.out, {"machine": about, "rows": rows})
    print("\n\n".join([str(about), table(rows)]))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(_parser(), _work, argv)


if __name__ == "__main__":
    sys.exit(main())
