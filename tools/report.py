"""One HTML page about a run, or about two runs side by side: python -m tools.report RUN [RUN2].

The page needs no network and no script: curves, evaluation, incidents, mistakes, configuration and environment.
"""
import argparse
import sys
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from common.log import logger
from tools.command import run_command
from report.data import read_run, recipe_difference
from report.page import page


def write_report(folders: list[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about one or two run folders (or log.txt files) and return its path.

    `out` defaults to report.html in the first run's folder. Raises UserError for a folder without a run.
    """
    runs = [read_run(folder) for folder in folders]
    out = Path(out) if out is not None else runs[0].folder / "report.html"
    if out.is_dir():
        out = out / "report.html"
    html = page(runs, [recipe_difference(run) for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names with bytes that are no text are shown with a question mark: the page has to be valid UTF-8.
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))
    return out


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.report", allow_abbrev=False,
                                     description="One self-contained HTML page about a run, or two side by side.",
                                     epilog="example: python -m tools.report runs/quickstart --out report.html")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="the --output_dir of a training, the --report of an evaluation, or a log.txt")
    parser.add_argument("--out", help="where to write the page (default: report.html in the first run's folder)")
    return parser


def run(args: argparse.Namespace) -> int:
    if len(args.runs) > 2:
        raise UserError(f"{len(args.runs)} runs given: one page shows one run, or two side by side.")
    out = write_report(args.runs, args.out)
    logger.info("wrote %s (%.2f MB); open it in a browser", out, out.stat().st_size / 1e6)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
