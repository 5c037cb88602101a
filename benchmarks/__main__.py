"""`python -m benchmarks {model,train,optim,data,family,all}`: a table of medians and ratios, and JSON."""
import argparse
import json
import sys

import torch
from matplotlib.figure import Figure

import models
from benchmarks import cases, data, timing
from common.files import write_json
from common.log import logger
from models.zoo import PUBLISHED
from tools.command import run_command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("work", choices=["model", "train", "optim", "data", "family", "all"], help="family: all published")
    add("--models", nargs="+", default=["hornet_tiny_7x7", "hornet_tiny_gf"], choices=models.MODEL_NAMES,
        metavar="MODEL", help="architectures (family always takes the ten published ones)")
    add("--batch", type=int, default=8, help="images per batch (default 8; family: 2)")
    add("--repeats", type=int, default=9, help="measured rounds (default 9; family: at most 3)")
    add("--size", type=int, help="image size (default: the model's own)")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--clock", choices=timing.CLOCKS, default="wall", help="cpu: this process' CPU time, if others work")
    add("--only", nargs="+", default=(), metavar="CASE", choices=cases.CASES,
        help=f"of model and train these cases (default all): {', '.join(cases.CASES)}; bfloat16 without "
             "instructions for it takes minutes")
    add("--out", default="bench.json", help="where the JSON goes (default bench.json)")
    add("--plot", metavar="SVG", help="with family: draw published accuracy against measured speed")
    return parser


def _family(args: argparse.Namespace) -> list[dict]:
    """Every published model, float32, on this machine's paths."""
    found, setting = [], cases.Setting(2, min(3, args.repeats), args.clock, args.size)
    for name, variant in PUBLISHED.items():
        found.append({"model": name, "params": variant.params, "flops": variant.flops, "top1": variant.top1,
                      "input_size": variant.input_size, "evaluate_per_second": cases.speed(name, setting, train=False),
                      "train_per_second": cases.speed(name, setting, train=True)})
        logger.info("%s", found[-1])
    return found


def _family_table(found: list[dict]) -> str:
    return timing.markdown("model, parameters, FLOPs, size, img/s evaluating, img/s training", [
        [row["model"], f"{row['params']:,}", f"{row['flops'] / 1e9:.1f} G", str(row["input_size"]),
         f"{row['evaluate_per_second']:.3g}", f"{row['train_per_second']:.3g}"] for row in found])


def plot(family: list[dict], title: str, path: str) -> None:
    """Published top-1 over milliseconds per image (evaluation, float32), as the paper's figure."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", title=title, xlabel="milliseconds per image", ylabel="top-1 in %, published")
    for kind in ("7x7", "gf"):
        points = sorted((1e3 / row["evaluate_per_second"], row["top1"], row["model"]) for row in family
                        if kind in row["model"] and row["top1"])
        axes.plot([point[0] for point in points], [point[1] for point in points], "o-")
        for *place, name in points:
            axes.annotate(name, place, xytext=(8, -10), textcoords="offset points", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def _work(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    setting = cases.Setting(args.batch, args.repeats, args.clock, args.size, tuple(args.only))
    command, machine = " ".join(["python -m benchmarks", *sys.argv[1:]]), timing.machine()
    found: list[timing.Row] = []
    for work in ("model", "train"):
        for name in args.models if args.work in (work, "all") else ():
            logger.info("%s %s", work, name)
            found += cases.network(name, setting, work == "train")
    if args.work in ("optim", "all"):
        found += cases.optimizer(args.models[0], setting)
    if args.work in ("data", "all"):
        found += data.loading(args.repeats, args.clock) + data.start_up(args.repeats, args.clock)
    family = _family(args) if args.work in ("family", "all") else []
    write_json(args.out, {"command": command, "machine": machine, "clock": args.clock, "rows": found,
                          "family": family})
    if args.plot and family:
        plot(family, f"HorNet on {machine['cpu']}, {args.threads} thread(s), float32 evaluation", args.plot)
    tables = [timing.table(found)] * bool(found) + [_family_table(family)] * bool(family)
    print("\n\n".join([command, json.dumps(machine), f"clock: {args.clock}", *tables]))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(_parser(), _work, argv)


if __name__ == "__main__":
    sys.exit(main())
