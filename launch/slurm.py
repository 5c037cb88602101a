"""What one task of a submitted job does: start main.py, pass signals on, decide what its end means.

main.py runs in a process of its own, so that any end of it, a kill for lack of memory included, is seen here,
and a requeue is decided in one place. submitit's own signal handler would act on rank 0 alone, between any
two lines of the training loop; it is replaced.
"""
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

import submitit

from common.ledger import Ledger, Record, restarts
from common.log import logger, setup_logging
from common.outcome import ExitCode, Outcome
from launch.stop import job_end_time, squeue

# Seconds a requeued task waits for Slurm to end it; an exit would make the job "failed" or "completed".
# Longer than the task that decides may need to reach a busy controller.
HOLD = 480.0
PAUSE = 10.0  # seconds until Slurm's controller, which may be busy or restarting, is asked again


@dataclasses.dataclass
class Job:
    """`main.py argv` of the code in `code`, run in `cwd`; `folder` may hold %j. Pickled by reference."""

    argv: list[str]
    cwd: str
    code: str
    folder: str
    output_dir: str
    max_requeue: int
    module: str = ""  # in place of main.py

    def __call__(self) -> int:
        environment = submitit.JobEnvironment()
        # A rank that crashed in an earlier attempt left its error here; submitit would take it for the end.
        environment.paths.result_pickle.unlink(missing_ok=True)
        setup_logging(environment.global_rank)
        task = Task(self, environment)
        if (code := task.run_main()) != ExitCode.DONE:
            code = task.after(code)
            raise SystemExit(code if code > 0 else 128 - code)
        return code


def program(code: str, module: str) -> list[str]:
    """The command without its options: main.py, or another module, of the code in `code` and of no other."""
    return [sys.executable, "-u", *(["-P", "-m", module] if module else [os.path.join(code, "main.py")])]


class Task:
    """One task of one attempt of a job."""

    def __init__(self, job: Job, environment: submitit.JobEnvironment) -> None:
        self.job, self.environment, self.rank = job, environment, environment.global_rank
        self.id = environment.job_id
        self.folder = Path(job.folder.replace("%j", self.id))
        self.output_dir = Path(job.output_dir.replace("%j", self.id))
        self.signals: dict[int, float] = {}  # and when each came last
        self.began = time.time()

    def run_main(self) -> int:
        """Exit code of main.py; a stop before it could handle signals counts as one that lost nothing."""
        if self.rank == 0 and shutil.which("scontrol") is None:
            logger.warning("No scontrol on this node's PATH: at its time limit the job is not requeued; "
                           "after a preemption Slurm itself must requeue it.")
        parent = os.getppid()
        command = program(self.job.code, self.job.module) + self.job.argv
        self.child = subprocess.Popen([argument.replace("%j", self.id) for argument in command],
                                      cwd=self.job.cwd, env={**os.environ, "PYTHONPATH": self.job.code})
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):  # submitit's before
            signal.signal(number, self._forward)
        while (code := self.child.poll()) is None:
            if os.getppid() != parent:  # slurmstepd is gone
                self.child.terminate()  # main.py saves
                self.child.wait()
                os._exit(ExitCode.FAILED)
            time.sleep(0.2)
        return ExitCode.PAUSED if -code in self.signals else code

    def after(self, code: int) -> int:
        """What the end of main.py means for the job. One task decides for all; returns this task's exit code.

        After a stop it is rank 0, which has saved. The others hold until Slurm ends them with the job that is
        requeued: where it is set up with KillOnBadExit, one that ended now would take rank 0 with it.
        """
        refusal = ""
        if (code != ExitCode.PAUSED or self.rank == 0) and self._decides():
            ledger, begun = self._own()
            if not begun:
                ledger.begin(update=-1, pid=0)
            self._complete(ledger, code)
            own = [a for a in ledger.attempts() if a.get("job") == self.id]
            cause = own[-1].get("cause", "") if own else "no attempt could be recorded"
            refusal = self._refusal(own, code, cause) or self._requeue(ledger, cause)
            if refusal:
                logger.error("The job is not requeued: %s.", refusal)
                ledger.note(requeued=False, reason=refusal)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to be saved
        deadline = time.monotonic() + HOLD
        while not refusal and time.monotonic() < deadline and self._own()[1].get("requeued") is not False:
            time.sleep(1)
        churned = code == ExitCode.PAUSED and self._own()[1].get("state") == Outcome.FAILED
        return ExitCode.FAILED if churned else code

    def _complete(self, ledger: Ledger, code: int) -> None:
        """Record the end of this attempt, where its ranks could not, and whether it was worth its start.

        A killed rank leaves no words; its peers need some seconds to miss it and to record the exact update.
        """
        if code == ExitCode.PAUSED:
            return self._complete_stop(ledger)
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if code > 0 and (words := last_lines(self.folder / f"{self.id}_{self.rank}_log.err", 1)):
            end += f": {words[0]}"
        deadline = time.monotonic() + (12 if code < 0 and self.environment.num_tasks > 1 else 3)
        while "rank" not in (found := self._own()[1]) and time.monotonic() < deadline:
            time.sleep(0.2)
        if "rank" not in found:
            update = ledger.reached(self.id).get("update", found.get("update", -1))
            ledger.fail(f"rank {self.rank} {end}", pid=found.get("pid", 0), update=update, rank=self.rank)
        if code == -signal.SIGKILL:  # the cause, at which its peers can only guess
            ledger.note(cause=f"rank {self.rank} {end} (out of memory?)", rank=self.rank)
        return None

    def _complete_stop(self, ledger: Ledger) -> None:
        """Near the time limit (who is preempted may have more luck next time) two attempts in a row that
        trained for less time than they lost to start and stop are a failure."""
        if "ended" not in self._own()[1]:
            ledger.end(Outcome.PAUSED, update=-1, cause="asked to stop before the first update")
        last, left = ledger.newest(), job_end_time(os.environ) - time.time()
        if left > 4 * 60 or "started" not in last:
            return
        started, ended = (datetime.fromisoformat(last[name]).timestamp() for name in ("started", "ended"))
        ledger.note(short=ended - started < started - self.began + max(left, 0))
        short = [a.get("short") for a in ledger.attempts() if a.get("job") == self.id]
        if short[-2:] == [True, True]:
            ledger.end(Outcome.FAILED, update=last["update"], cause="twice in a row the time limit left "
                       "fewer updates than starting again costs: submit with a longer --timeout")

    def _refusal(self, own: list[Record], code: int, cause: str) -> str:
        """Why the job whose attempts `own` are isn't requeued; "" when it is."""
        failed = [a for a in own if a["state"] == Outcome.FAILED]
        # What an earlier attempt accepted may pass: a GPU that is missing, a folder that is mounted late.
        mistake = code == ExitCode.USAGE and restarts() == 0
        if mistake or code == ExitCode.PAUSED and own[-1:] == failed[-1:] != []:
            return cause
        if code != ExitCode.PAUSED and len({a["update"] for a in failed[-2:]}) < len(failed[-2:]):
            return f"it failed twice at update {failed[-1]['update']}: {cause}"
        if restarts() >= self.job.max_requeue:
            return f"--max_requeue {self.job.max_requeue} is reached; {cause}"
        return f"Slurm is ending the job by itself; {cause}" if self._ending() else ""

    def _own(self) -> tuple[Ledger, Record]:
        """The ledger that has this attempt, with what it holds of it: the run folder's, or the job folder's
        where main.py has begun nothing there, as in an evaluation; {} where neither has it."""
        for ledger in (Ledger(self.output_dir), Ledger(self.folder)):
            newest = ledger.newest()
            if (newest.get("job"), newest.get("restarts")) == (self.id, restarts()):
                return ledger, newest
        return Ledger(self.folder), {}

    def _requeue(self, ledger: Ledger, reason: str) -> str:
        """Ask Slurm to start the job again; returns why it can't be done, or ""."""
        logger.warning("Requeued (%s); attempt %d of at most %d follows.", reason, restarts() + 2,
                       self.job.max_requeue + 1)
        ledger.note(requeued=True, reason=reason)
        for trial in range(4):
            try:
                self.environment._requeue(self.job.max_requeue - restarts())
                break
            except (OSError, subprocess.SubprocessError) as error:
                missing = isinstance(error, OSError)
                if self._ending() or missing and self._preempted():
                    break  # it was heard all the same, or Slurm requeues it by itself
                if trial == 3 or missing:
                    return f"scontrol requeue failed: {error}"
                time.sleep(PAUSE)
        return ""

    def _decides(self) -> bool:
        """Whether this task is the first of its attempt to get here; it decides for all, once.

        The others may have failed too, or were asked to stop because the first one has requeued the job.
        """
        try:
            (self.folder / f"decision-{self.id}-{restarts()}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError as error:  # such as a full disk, which must not cost the job its requeue
            logger.error("the decision was not written: %s", error)
            return self.rank == 0
        return True

    def _ending(self) -> bool:
        """Whether Slurm says that the job does not run any more; a silent controller says nothing."""
        return squeue(self.id, "%T") not in ("RUNNING", "PREEMPTED", "")

    def _preempted(self) -> bool:
        """Whether Slurm is about to requeue this job by itself, if its tasks do not end before that.

        It sends SIGTERM then, or the job's own signal, and with either SIGCONT, in any order.
        """
        at = self.signals.get
        return signal.SIGTERM in self.signals or abs(at(signal.SIGCONT, 0) - at(signal.SIGUSR2, -60)) < 5

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signals[number] = time.monotonic()
        self.child.send_signal(number)


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log; [] where there is none."""
    with suppress(OSError), open(log, errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, count)]
    return []
