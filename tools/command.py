"""What all tools share: one way to parse arguments, to name a model, and to end."""
import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

from common.errors import UserError, lacks_in_words
from common.log import logger, setup_logging
from common.outcome import ExitCode
from models.trained import Trained, load


def new_parser(tool: str, what: str, example: str) -> argparse.ArgumentParser:
    """The parser of `python -m tools.<tool>`; abbreviated flags are not accepted."""
    return argparse.ArgumentParser(prog=f"python -m tools.{tool}", allow_abbrev=False, description=what,
                                   epilog=f"example: python -m tools.{tool} {example}")


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """--weights, which of a checkpoint's weights to take."""
    parser.add_argument("--weights", default="auto", choices=["auto", "model", "ema"],
                        help="which weights of the checkpoint; auto: those that scored (default)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `load_model` reads."""
    add = parser.add_argument
    add("--resume", help="run folder, checkpoint or https address (default: published weights of --model)")
    add("--model", help="name of the model; needed only where the checkpoint does not say it")
    add("--input_size", type=int, help="side of the images in pixels (default: the checkpoint's)")
    add_weights_argument(parser)


def load_model(args: argparse.Namespace, device: str | torch.device = "cpu") -> Trained:
    """What the flags name. Raises UserError."""
    if not (args.resume or args.model):
        raise UserError("name what to load: --resume CHECKPOINT, or --model NAME for published weights.",
                        code="missing_checkpoint")
    return load(args.resume or args.model, model=args.model, weights=args.weights, input_size=args.input_size,
                device=device)


def run_command(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int],
                argv: Sequence[str] | None) -> int:
    """Parse `argv`, do the work, and return the exit code; a mistake is one sentence and exit code 2.

    Flags that the parser does not know are refused, or kept in `others` where it has a default for that.
    """
    setup_logging()
    args, others = parser.parse_known_args(argv)
    if others and not hasattr(args, "others"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.others = others
    try:
        with lacks_in_words():
            return work(args)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except (UserError, OSError) as error:
        logger.error("error: %s", error)
        return ExitCode.USAGE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
