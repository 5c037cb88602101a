"""One HTML page about a run, or about several compared: python -m tools.report RUN [RUN ...]."""
import argparse
import sys

from common.log import logger
from report.page import write_comparison, write_report
from tools.command import new_parser, run_command


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("report", "One self-contained HTML page about a run, or about several compared: "
                        "figures, accuracy against effort, paired tests.", "runs/a runs/b --price_per_hour 2")
    add = parser.add_argument
    add("run", metavar="RUN", nargs="+", help="the --output_dir of a run, or the --report of an evaluation")
    add("--compare", action="store_true", help="the page of several runs, also for one (default for several)")
    add("--price_per_hour", type=float, help="of one process (GPU), in any currency: adds the cost")
    add("--out", help="the page (default: report.html or comparison.html in the first run's folder)")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.compare or len(args.run) > 1:
        out, text = write_comparison(args.run, args.out, args.price_per_hour)
        sys.stdout.write(text)
    else:
        out = write_report(args.run[0], args.out)
    logger.info("wrote %s (%.2f MB); open it in a browser", out, out.stat().st_size / 1e6)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
