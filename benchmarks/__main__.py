"""`python -m benchmarks {model,train,data,all}`: the product against the plain formulation, in one
process, interleaved; a table of medians and ratios, and JSON.

Size 0 is the model's own. The clock "cpu" counts this process' CPU time, for a machine shared with others.
`--only` names cases of model and train: bfloat16 without instructions for it takes minutes.
"""
import argparse
import sys

import torch

from benchmarks import cases, timing
from models.zoo import MODEL_NAMES
from tools.command import run_command


def _work(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    found: list[timing.Row] = []
    for name, work in (("model", "evaluate"), ("train", "train")):
        for model in args.models if args.work in (name, "all") else ():
            found += cases.network(model, args, work)
    if args.work in ("data", "all"):
        found += cases.loading(args.repeats, args.clock) + cases.start_up(args.repeats, args.clock)
    return timing.report(found, args.out, clock=args.clock)


def main(argv: list[str] | None = None) -> int:
    choices = {"models": MODEL_NAMES, "clock": timing.CLOCKS, "only": cases.CASES}
    parser = timing.new_parser("benchmarks", __doc__, choices, models=["hornet_tiny_7x7", "hornet_tiny_gf"],
                               batch=8, size=0, repeats=9, threads=1, clock="wall", only=[*cases.CASES],
                               out="bench.json")
    parser.add_argument("work", choices=["model", "train", "data", "all"])
    return run_command(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
