"""How a process ends when it is asked to: at a point that all processes agree on."""
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING

from common.log import logger

if TYPE_CHECKING:
    from launch.process import Process

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SAME_CTRL_C = 1.0  # seconds; torchrun passes on the SIGINT that a terminal has sent to every process already
OTHERS = "another process was asked to stop"


class StopRequest:
    """Signal handlers that only set a flag, and the agreement of all processes on it.

    Use as a context manager around training; must be entered in the main thread. SIGTERM, SIGUSR1, SIGUSR2,
    SIGHUP (unless nohup has it ignored) and the first SIGINT ask for a stop; a SIGINT after it, but not
    within the same second, interrupts at once. `stop_before_end` is in seconds before the time limit of the
    Slurm job this process runs in (0: none).
    """

    def __init__(self, stop_before_end: float = 0.0) -> None:
        self.reason = ""
        self.stop_before_end = stop_before_end
        self._stop_at = self._interrupted = float("inf")
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        if self.stop_before_end:
            end = job_end_time(os.environ)
            self.stop_before_end = margin(end - time.time(), self.stop_before_end)
            self._stop_at = end - self.stop_before_end
        if self._stop_at < float("inf"):
            logger.info("Training stops in %.0f min, %.0f s before the job's time limit, and can be resumed.",
                        (self._stop_at - time.time()) / 60, self.stop_before_end)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # After a stop a second SIGTERM, while the process ends, changes no exit code. Ignored, because
            # handlers written in Python are removed before the interpreter has quite ended.
            after = signal.SIG_IGN if self.reason and number != signal.SIGINT else handler or signal.SIG_DFL
            signal.signal(number, after)  # pyright: ignore[reportArgumentType]
        self._previous.clear()

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop; others may not know yet."""
        if time.time() >= self._stop_at:
            self.request(f"{self.stop_before_end:.0f} s before the job's time limit")
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self.reason = self.reason or reason

    def agreed(self, process: "Process") -> bool:
        """Whether any process has been asked to stop. All must call it at the same point of the run.

        The same answer everywhere, hence a checkpoint of the same update. It does not wait for the device.
        """
        if not process.any(self.requested):
            return False  # even if a signal has come meanwhile: the others do not know of it yet
        self.request(OTHERS)
        return True

    def heard(self, process: "Process") -> bool:
        """Whether any process has been asked to stop, as far as this one knows; it waits for none.

        For work that processes leave at different points, such as an evaluation of unequal shares.
        """
        if process.store is not None:
            if self.requested:
                process.store.set("stop", "")
            elif process.store.check(["stop"]):
                self.request(OTHERS)
        return self.requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Schedulers signal every process of a job. In a loader worker just forked, which will ignore signals
        # in a moment, this only changes a copy of the flag.
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted > SAME_CTRL_C:
                raise KeyboardInterrupt
            self._interrupted = min(self._interrupted, time.monotonic())
        self.request(signal.Signals(number).name)


def margin(seconds: float, most: float = 120.0) -> float:
    """Seconds before its end at which a job that still has `seconds` stops: more than an update and a save.

    Slurm sends its signal then. A preemption sends it too where the cluster has preempt_send_user_signal,
    otherwise SIGTERM.
    """
    return min(most, max(30.0, seconds / 4))


def job_end_time(env: Mapping[str, str]) -> float:
    """When the Slurm job around this process will be ended, in seconds since 1970; infinity if unknown.

    Only rank 0 asks the controller, which thousands should not: one process is enough for the agreement.
    """
    if env.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(env["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" in env and env.get("SLURM_PROCID", "0") == "0":
        with suppress(ValueError):  # of N/A, and of no answer
            return datetime.fromisoformat(squeue(env["SLURM_JOB_ID"], "%e")).timestamp()
    return float("inf")


def squeue(job: str, what: str) -> str:
    """What Slurm says of a job, past ones included, in squeue's format; "" where nobody answers."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={what}"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    return ""


def alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended but wasn't collected by its parent doesn't."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"
    return False
