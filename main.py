"""Train or evaluate HorNet: options → processes → train | evaluate.

    python main.py --config recipes/quickstart.yaml
    torchrun --nproc_per_node=8 main.py --config recipes/hornet_tiny_7x7.yaml --output_dir RUN
    python main.py --eval true --model hornet_tiny_7x7 --resume checkpoint.pth --data_path IMAGENET
"""
import os
import sys
import warnings
from collections.abc import Callable

from common.errors import UserError, lacks_in_words
from common.log import logger, setup_logging
from common.outcome import ExitCode
from config.options import Options
from config.parse import check_model, parse

Work = Callable[..., ExitCode]  # of (Resolved, Process, Watchdog); to name these would import PyTorch

# Of torchrun, srun and mpirun.
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def main(argv: list[str] | None = None, kind: type[Options] = Options,
         work_of: Callable[[Options], Work] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns an ExitCode.

    Other commands have another `kind` of options, and say by these what is to be done (`work_of`).

    Launchers turn all codes but 0 into 1; status.json in the run folder then tells which it was.
    """
    # A variable that is no number is refused when the processes start.
    ranks = [os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal()]
    rank = int(ranks[0]) if ranks else 0
    setup_logging(rank)
    # C++ traces of a lost peer would stand around the sentence that says what happened.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", "This DataLoader will create")  # training logs it in one line
    try:
        with lacks_in_words():
            resolved = parse(sys.argv[1:] if argv is None else argv, kind)
            # Only now PyTorch, so that --help and a typing error answer at once.
            from launch.process import start
            from launch.watchdog import Watchdog
            from models import MODEL_NAMES

            options = resolved.options
            check_model(options.model, MODEL_NAMES)
            if options.print_config:
                sys.stdout.write(resolved.to_yaml())
                return ExitCode.DONE
            work = (work_of or classification)(options)
            with start(options.device, options.rendezvous_timeout) as process:
                setup_logging(process.rank)
                for notice in resolved.notices:
                    logger.info(notice)
                # The watchdog prints an error's sentence or traceback once, last, when there are several
                # processes.
                with Watchdog(process, hang_timeout=options.hang_timeout) as watchdog, lacks_in_words():
                    return work(resolved, process, watchdog)
    except UserError as error:
        if rank == 0:
            logger.error("error: %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted")
        return ExitCode.INTERRUPTED


def classification(options: Options) -> Work:
    """What `options` ask for."""
    from dryrun import check
    from evaluation import evaluate_checkpoints
    from training import train

    return check if options.dry_run else evaluate_checkpoints if options.eval else train


if __name__ == "__main__":
    sys.exit(main())
