"""Train and evaluate detectors: `python -m dense.detection --help`."""
import sys

from config.options import Options
from dense.options import DetectionOptions
from main import Work, main


def run(argv: list[str] | None = None) -> int:
    """Run a command line; returns an ExitCode."""
    return main(argv, DetectionOptions, _work)


def _work(options: Options) -> Work:
    from dense.evaluation import DETECTOR, work
    return work(DETECTOR, options)


if __name__ == "__main__":
    sys.exit(run())
