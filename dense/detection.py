"""Train and evaluate detectors: `python -m dense.detection --help`."""
import sys

from config.options import Options
from dense.detection_options import DetectionOptions
from main import Work, main


def run(argv: list[str] | None = None) -> int:
    """Run a command line; returns an ExitCode."""
    return main(argv, DetectionOptions, _work)


def _work(options: Options) -> Work:
    from functools import partial

    from dense.detection_evaluation import evaluate_detectors
    from dense.detection_task import Detection, find_scenes
    from dryrun import check
    from training import train

    if options.dry_run:
        return partial(check, data=find_scenes, task=Detection)
    if options.eval:
        return evaluate_detectors
    return partial(train, data=find_scenes, task=Detection, evaluate=evaluate_detectors)


if __name__ == "__main__":
    sys.exit(run())
