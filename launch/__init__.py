"""How processes start, agree, stop and fail: process groups, signals, the watchdog and Slurm."""
import enum


class ExitCode(enum.IntEnum):
    """What a single process ends with; launchers turn all but 0 into 1, hence also the records in the run folder."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    STOPPED = 75  # EX_TEMPFAIL: stopped by a signal or a time limit, saved, goes on when started again
