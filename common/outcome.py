"""How an epoch, a run and a job end, and the exit code of each: the one list that every room uses."""
from enum import Enum, IntEnum


class Outcome(str, Enum):
    """How something ended. The value is what status.json and the ledger of attempts hold."""

    DONE = "DONE"                # complete
    PAUSED = "PAUSED"            # saved on request (signal, time limit); the same command resumes it
    ROLLED_BACK = "ROLLED_BACK"  # an epoch only: non-finite updates, back to the last checkpoint
    FAILED = "FAILED"            # anything else

    @classmethod
    def _missing_(cls, value: object) -> "Outcome | None":
        return cls.PAUSED if value == "PREEMPTED" else None  # what earlier versions wrote


class ExitCode(IntEnum):
    """Exit codes of `main.py` and the tools. Launchers turn all but 0 into 1: scripts read status.json."""

    DONE = 0
    FAILED = 1
    USAGE = 2         # a mistake in the command line or its data
    PAUSED = 75       # EX_TEMPFAIL: start the same command again
    INTERRUPTED = 130
