"""One HTML page about a run, or about two runs side by side: python -m tools.report RUN [RUN2]."""
import argparse
import sys

from common.errors import UserError
from common.log import logger
from report.page import write_report
from tools.command import run_command


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", allow_abbrev=False,
        description="One self-contained HTML page about a run, or two side by side.",
        epilog="example: python -m tools.report runs/quickstart --out report.html")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="the --output_dir of a training, the --report of an evaluation, or a log.txt")
    parser.add_argument("--out", help="the page (default: report.html in the first run's folder)")
    return parser


def run(args: argparse.Namespace) -> int:
    if len(args.runs) > 2:
        raise UserError(f"{len(args.runs)} runs given: a page shows one run, or two side by side.",
                        code="invalid_value")
    out = write_report(args.runs, args.out)
    logger.info("wrote %s (%.2f MB); open it in a browser", out, out.stat().st_size / 1e6)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
