"""One HTML page about a run, or about two runs side by side: python -m tools.report RUN [OTHER]."""
import argparse
import sys

from common.log import logger
from report.page import write_report
from tools.command import run_command


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", allow_abbrev=False,
        description="One self-contained HTML page about a run, or two side by side.",
        epilog="example: python -m tools.report runs/quickstart --out report.html")
    parser.add_argument("run", metavar="RUN",
                        help="the --output_dir of a run, or the --report of an evaluation")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another one, shown beside it")
    parser.add_argument("--out", help="the page (default: report.html in the first run's folder)")
    return parser


def run(args: argparse.Namespace) -> int:
    out = write_report([args.run, args.other] if args.other else [args.run], args.out)
    logger.info("wrote %s (%.2f MB); open it in a browser", out, out.stat().st_size / 1e6)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
