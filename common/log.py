"""One logger for the project: rank 0 speaks at INFO, the others only from WARNING on, with their rank."""
import logging
import sys

logger = logging.getLogger("hornet")


def setup_logging(rank: int = 0) -> None:
    """Log to standard error; ranks other than 0 only from WARNING on, prefixed `[rank N]`."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)
