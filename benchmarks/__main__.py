"""`python -m benchmarks {model,train,optim,data,family,all}`: a table of medians and ratios, and JSON beside
it."""
import argparse
import json
import multiprocessing
import sys

import timm
import torch

import models
from benchmarks import cases, data, timing
from benchmarks.plot import accuracy_speed
from common.files import write_json, write_text
from common.log import logger
from models.inspect import complexity
from models.zoo import PUBLISHED, VARIANTS
from tools.command import run_command

WORKS = ("model", "train", "optim", "data", "family", "all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("work", choices=WORKS, help="what to measure; family: a row for each published model")
    parser.add_argument("--models", nargs="+", default=["hornet_tiny_7x7", "hornet_tiny_gf"], metavar="MODEL",
                        choices=models.MODEL_NAMES, help="architectures (family always takes the ten published ones)")
    parser.add_argument("--batch", type=int, default=8, help="pictures per batch (default 8; family: 2)")
    parser.add_argument("--repeats", type=int, default=9, help="measured rounds (default 9; family: 3)")
    parser.add_argument("--size", type=int, help="picture size (default: the model's own)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall",
                        help="wall time, or this process' CPU time on a machine shared with others")
    parser.add_argument("--only", nargs="+", default=(), metavar="CASE", choices=cases.CASES,
                        help="with model and train: these cases beside the reference (default all; bfloat16 without "
                             f"instructions for it takes minutes): {', '.join(cases.CASES)}")
    parser.add_argument("--out", default="bench.json", help="where the JSON goes (default bench.json)")
    parser.add_argument("--plot", metavar="SVG", help="with family: draw published accuracy against measured speed")
    return parser


def _family(args: argparse.Namespace) -> list[dict]:
    """Each model in a process of its own, so that its peak memory is its own."""
    context, found = multiprocessing.get_context("spawn"), []
    for name in PUBLISHED:
        with torch.device("meta"):
            size = complexity(timm.create_model(name), VARIANTS[name].input_size)
        row = {"model": name, "params": size.params, "flops": size.flops, "input_size": VARIANTS[name].input_size,
               "top1": PUBLISHED[name].top1}
        for train in (False, True):
            answers = context.SimpleQueue()
            setting = cases.Setting(2, min(3, args.repeats), args.clock, args.size)
            child = context.Process(target=cases.report_member, args=(name, setting, train, args.threads, answers))
            child.start()
            child.join()
            kind = "train" if train else "evaluate"
            if child.exitcode:
                logger.warning("%s: %s ended with code %s (too little memory?)", name, kind, child.exitcode)
                continue
            row[f"{kind}_per_second"], row[f"{kind}_gib"] = answers.get()
        found.append(row)
        logger.info("%s", row)
    return found


def _family_table(found: list[dict]) -> str:
    lines = ["| model | parameters | FLOPs | size | img/s evaluating | img/s training | GiB evaluating | "
             "GiB training |", "|---|---|---|---|---|---|---|---|"]
    for row in found:
        numbers = [f"{row[key]:.3g}" if key in row else "" for key in (
            "evaluate_per_second", "train_per_second", "evaluate_gib", "train_gib")]
        lines.append(f"| {row['model']} | {row['params']:,} | {row['flops'] / 1e9:.1f} G | {row['input_size']} | "
                     + " | ".join(numbers) + " |")
    return "\n".join(lines)


def _work(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    setting = cases.Setting(args.batch, args.repeats, args.clock, args.size, tuple(args.only))
    result: dict = {"command": " ".join(["python -m benchmarks", *sys.argv[1:]]), "machine": timing.machine(),
                    "clock": args.clock}
    found: list[timing.Row] = []
    for work, measure in (("model", cases.evaluation), ("train", cases.training), ("optim", cases.optimizer)):
        if args.work in (work, "all"):
            for name in args.models[:1] if work == "optim" else args.models:
                logger.info("%s %s", work, name)
                found += measure(name, setting)
    if args.work in ("data", "all"):
        logger.info("data")
        found += data.loading(args.repeats, args.clock) + data.start_up(args.repeats, args.clock)
    result["rows"] = timing.as_json(found)
    result["family"] = _family(args) if args.work in ("family", "all") else []
    write_json(args.out, result)
    if args.plot and result["family"]:
        title = f"HorNet on {result['machine']['cpu']}, {args.threads} thread(s), float32 evaluation"
        write_text(args.plot, accuracy_speed(result["family"], title))
    parts = [result["command"], json.dumps(result["machine"]), f"clock: {args.clock}"]
    parts += [timing.table(found)] if found else []
    parts += [_family_table(result["family"])] if result["family"] else []
    print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(_parser(), _work, None))
