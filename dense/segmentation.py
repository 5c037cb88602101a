"""Train and evaluate segmentors: `python -m dense.segmentation --help`."""
import sys

from config.options import Options
from dense.options import SegmentationOptions
from main import Work, main


def run(argv: list[str] | None = None) -> int:
    """Run a command line; returns an ExitCode."""
    return main(argv, SegmentationOptions, _work)


def _work(options: Options) -> Work:
    from functools import partial

    from dense.evaluation import evaluate_segmentors
    from dense.segmentation_task import Segmentation, find_scenes
    from dryrun import check
    from training import train

    if options.dry_run:
        return partial(check, data=find_scenes, task=Segmentation)
    if options.eval:
        return evaluate_segmentors
    return partial(train, data=find_scenes, task=Segmentation, evaluate=evaluate_segmentors)


if __name__ == "__main__":
    sys.exit(run())
