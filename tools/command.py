"""What all tools do around their work: log to standard error, and one sentence with exit code 2 for a mistake."""
import argparse
import os
import sys
from collections.abc import Callable, Sequence

from common.errors import UserError
from common.log import logger, setup_logging


def run_command(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int],
                argv: Sequence[str] | None) -> int:
    """Parse `argv`, do the work, and return the exit code."""
    setup_logging()
    args = parser.parse_args(argv)
    try:
        return work(args)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        logger.error(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
