"""`python -m benchmarks {model,train,optim,data,all}`: a table of medians and ratios, and JSON."""
import argparse
import json
import sys

import torch

import models
from benchmarks import cases, data, timing
from common.files import write_json
from common.log import logger
from tools.command import run_command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("work", choices=["model", "train", "optim", "data", "all"])
    add("--models", nargs="+", default=["hornet_tiny_7x7", "hornet_tiny_gf"], choices=models.MODEL_NAMES,
        metavar="MODEL", help="architectures")
    add("--batch", type=int, default=8, help="images per batch (default 8)")
    add("--repeats", type=int, default=9, help="measured rounds (default 9)")
    add("--size", type=int, help="image size (default: the model's own)")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--clock", choices=timing.CLOCKS, default="wall", help="cpu: this process' CPU time, if others work")
    add("--only", nargs="+", default=(), metavar="CASE", choices=cases.CASES,
        help=f"of model and train these cases (default all): {', '.join(cases.CASES)}; bfloat16 without "
             "instructions for it takes minutes")
    add("--out", default="bench.json", help="where the JSON goes (default bench.json)")
    return parser


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
    write_json(args.out, {"command": command, "machine": machine, "clock": args.clock, "rows": found})
    print("\n\n".join([command, json.dumps(machine), f"clock: {args.clock}", timing.table(found)]))
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(_parser(), _work, argv)


if __name__ == "__main__":
    sys.exit(main())
