"""Train or evaluate HorNet: options → processes → train | evaluate.

    python main.py --config recipes/quickstart.yaml
    torchrun --nproc_per_node=8 main.py --config recipes/hornet_tiny_7x7.yaml --data_path IMAGENET --output_dir runs/tiny
    python main.py --eval true --model hornet_tiny_7x7 --resume checkpoint.pth --data_path IMAGENET
"""
import os
import sys
import warnings

from common.errors import UserError
from common.log import logger, setup_logging
from config.parse import parse

# Of torchrun, submitit's local executor, srun and mpirun.
RANK_VARIABLES = ("RANK", "SUBMITIT_LOCAL_GLOBALID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name).

    Returns the exit code: 0 done, 75 stopped by a signal or time limit and ready to go on, 2 a mistake of the user,
    1 any other end. Launchers turn all but 0 into 1; status.json in the run folder then tells which it was.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    rank = next((os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()), "0")
    setup_logging(int(rank))
    # C++ traces of a lost peer would stand around the sentence that says what happened.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", "This DataLoader will create")  # training says it in one line
    try:
        parse(argv)  # before PyTorch is imported, so that --help and a typing error answer at once
        return _run(argv)
    except UserError as error:
        if int(rank) == 0:
            logger.error("error: %s", error)
        return error.exit_code
    except RuntimeError as error:
        sentence = _in_words(error)
        if sentence is None:
            raise
        logger.error("error: %s", sentence)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130


def _in_words(error: RuntimeError) -> str | None:
    """What PyTorch's own error means for a person, where no traceback would help; else None."""
    text = str(error)
    if "DataLoader worker" in text and ("killed" in text or "exited unexpectedly" in text):
        return (f"a loader process was killed, mostly for lack of memory or shared memory ({text.splitlines()[0]}): "
                "lower --num_workers or free memory; a training goes on with the same command.")
    if "out of memory" in text and type(error).__name__ == "OutOfMemoryError":
        return (f"the device has too little memory ({text.splitlines()[0]}): lower --batch_size and raise --update_freq "
                "by the same factor, or use --grad_checkpointing true.")
    return None


def _run(argv: list[str]) -> int:
    from evaluation import evaluate_checkpoints
    from launch.process import start
    from launch.watchdog import Watchdog
    from models import MODEL_NAMES
    from dryrun import check
    from training import train

    resolved = parse(argv, MODEL_NAMES)
    options = resolved.options
    if options.print_config:
        sys.stdout.write(resolved.describe() + "\n")
        return 0
    with start(options.device, options.rendezvous_timeout) as process:
        setup_logging(process.rank)
        for notice in resolved.notices:
            logger.info(notice)
        # The watchdog prints an error's sentence or traceback once, last, when there are several processes.
        with Watchdog(process, hang_timeout=options.hang_timeout) as watchdog:
            if options.dry_run:
                return check(resolved, process, watchdog)
            if options.eval:
                return evaluate_checkpoints(resolved, process, watchdog)
            return train(resolved, process, watchdog)


if __name__ == "__main__":
    sys.exit(main())
