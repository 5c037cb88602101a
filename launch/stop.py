"""Stopping in order: a signal or a time limit becomes one decision of all processes, between two updates."""
import os
import re
import signal
import subprocess
import time
from types import FrameType
from typing import Mapping

import torch

from common.log import logger
from launch.process import Process

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


class StopRequest:
    """Signal handlers that only set a flag, and the agreement of all processes on it.

    Use as a context manager around training; must be entered in the main thread. SIGTERM, SIGUSR1, SIGUSR2 and the
    first SIGINT ask for a stop; a second SIGINT interrupts at once. `stop_before_end` is in seconds before the time
    limit of the Slurm job this process runs in (0: none).
    """

    def __init__(self, stop_before_end: float = 0.0) -> None:
        self.reason = ""
        self.stop_before_end = float(stop_before_end or 0)
        self._stop_at = float("inf")
        self._pid = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None:
                self._previous[number] = signal.signal(number, self._on_signal)
        if self.stop_before_end:
            end = job_end_time(os.environ)
            self._stop_at = end - self.stop_before_end
            if end < float("inf"):
                logger.info("This job ends in %.0f min; training stops %.0f s before that and can be resumed.",
                            (end - time.time()) / 60, self.stop_before_end)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop; others may not know yet."""
        if not self.reason and time.time() >= self._stop_at:
            self.reason = f"{self.stop_before_end:.0f} s before the job's time limit"
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Ask for a stop from the program itself."""
        self.reason = self.reason or reason

    def agreed(self, process: Process) -> bool:
        """Whether any process has been asked to stop. All processes must call it at the same point of the run.

        The same answer everywhere, hence a checkpoint of the same update. One small reduction between the hosts; the
        device's queue is not waited for.
        """
        flag = process.all_reduce_(torch.tensor([int(self.requested)], dtype=torch.int32), "max")
        if not int(flag):
            return False
        self.reason = self.reason or "another process was asked to stop"
        return True

    def heard(self, process: Process) -> bool:
        """Whether any process has been asked to stop, as far as this one knows. It tells the others and waits for none.

        For work that processes leave at different points, such as an evaluation of unequal shares.
        """
        if process.store is not None:
            if self.requested:
                process.store.set("stop", "")
            elif process.store.check(["stop"]):
                self.request("another process was asked to stop")
        return self.requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked loader worker. Schedulers signal every process of a job; a worker that ended now would take the
            # batch, and so the save, with it. SIGTERM is also how its owner ends it, hence an end after two minutes.
            if number == signal.SIGTERM:
                signal.alarm(120)
            return
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def job_end_time(env: Mapping[str, str]) -> float:
    """When the Slurm job around this process will be ended, in seconds since 1970; infinity if never or unknown.

    Only rank 0 asks the controller: it need not be asked by thousands, and one process is enough for the agreement.
    """
    if env.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(env["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" not in env or env.get("SLURM_PROCID", "0") != "0":
        return float("inf")
    command = ["squeue", "--noheader", f"--jobs={env['SLURM_JOB_ID']}", "--format=%L"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("The job's time limit is unknown (%s): --stop_before_end has no effect.", error)
        return float("inf")
    return time.time() + time_left(answer.strip())


def time_left(text: str) -> float:
    """Slurm's "1-02:03:04", "02:03:04" or "3:04" in seconds; infinity for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if not match:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
