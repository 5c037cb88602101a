"""How processes start, agree, stop and fail: process groups, signals, the watchdog and Slurm."""
from common.outcome import ExitCode

__all__ = ["ExitCode"]
