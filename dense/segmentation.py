"""Train and evaluate segmentors: `python -m dense.segmentation --help`."""
import sys

from config.options import Options
from dense.options import SegmentationOptions
from main import Work, main


def run(argv: list[str] | None = None) -> int:
    """Run a command line; returns an ExitCode."""
    return main(argv, SegmentationOptions, _work)


def _work(options: Options) -> Work:
    from dense.evaluation import SEGMENTOR, work
    return work(SEGMENTOR, options)


if __name__ == "__main__":
    sys.exit(run())
