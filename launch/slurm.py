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
from datetime import datetime
from pathlib import Path
from types import FrameType

import submitit

from common.ledger import Ledger, Record, job_id, restarts
from common.log import logger, setup_logging
from common.outcome import ExitCode, Outcome
from launch.stop import end_now, job_end_time, squeue

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

    def __call__(self) -> int:
        environment = submitit.JobEnvironment()
        # A rank that crashed in an earlier attempt left its error here; submitit would take it for the end.
        environment.paths.result_pickle.unlink(missing_ok=True)
        setup_logging(environment.global_rank)
        task = Task(self, environment)
        code = task.run_main()
        if code == ExitCode.PAUSED:
            code = task.after_stop()
        elif code != ExitCode.DONE:
            task.after_failure(code)
        if code != ExitCode.DONE:
            raise SystemExit(code if code > 0 else 128 - code)
        return code


class Task:
    """One task of one attempt of a job."""

    def __init__(self, job: Job, environment: submitit.JobEnvironment) -> None:
        self.job, self.environment, self.rank = job, environment, environment.global_rank
        self.slurm, self.id = environment.cluster == "slurm", environment.job_id
        self.folder = Path(job.folder.replace("%j", self.id))
        self.output_dir = Path(job.output_dir.replace("%j", self.id))
        self.signals: list[int] = []
        self.began = time.time()
        if not self.slurm:  # which counts the attempts itself
            os.environ["SLURM_RESTART_COUNT"] = str(len(list(self.folder.glob(f"decision-{self.id}-*"))))

    def run_main(self) -> int:
        """Exit code of main.py; a stop before it could handle signals counts as one that lost nothing."""
        if self.slurm and self.rank == 0 and shutil.which("scontrol") is None:
            logger.warning("No scontrol on this node's PATH: at its time limit the job is not requeued; "
                           "after a preemption Slurm itself must requeue it.")
        parent = os.getppid()
        command = [sys.executable, "-u", os.path.join(self.job.code, "main.py"), *self.job.argv]
        self.child = subprocess.Popen([argument.replace("%j", self.id) for argument in command],
                                      cwd=self.job.cwd)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # till now they are submitit's
            signal.signal(number, self._forward)
        while (code := self.child.poll()) is None:
            if os.getppid() != parent:  # slurmstepd or submitit's controller is gone
                self.child.terminate()  # main.py saves
                self.child.wait()
                end_now(ExitCode.FAILED)
            time.sleep(0.2)
        return ExitCode.PAUSED if -code in self.signals else code

    def after_stop(self) -> int:
        """All ranks have stopped at one update and rank 0 has saved: rank 0 requeues it, the others hold.

        Where Slurm is set up with KillOnBadExit, a task that ended now would take rank 0 with it. Returns the
        exit code of this task, for a job that is not requeued.
        """
        if self.rank == 0 and self._decides():
            ledger = self._ledger()
            if self._churns(ledger):
                cause = ("twice in a row the time limit left fewer updates than starting again costs: submit "
                         "with a longer --timeout")
                ledger.end(Outcome.FAILED, update=ledger.newest().get("update", -1), cause=cause)
                self._refuse(ledger, cause)
            else:
                self._requeue(ledger, self._recorded().get("cause") or "asked to stop")
        else:
            self._hold()
        return ExitCode.FAILED if self._recorded().get("state") == Outcome.FAILED else ExitCode.PAUSED

    def _churns(self, ledger: Ledger) -> bool:
        """Whether this attempt and the one before trained for less time than they lost to start and stop.

        Only at a time limit: who is preempted early may have more luck next time.
        """
        left, attempt = job_end_time(os.environ) - time.time(), self._recorded()
        if left > 4 * 60:
            return False
        started, ended = (datetime.fromisoformat(attempt.get(name, attempt["started"])).timestamp()
                          for name in ("started", "ended"))
        ledger.note(short=ended - started < started - self.began + max(left, 0))
        own = [a for a in ledger.attempts() if a.get("job") == job_id()]
        return len(own) > 1 and all(a.get("short") for a in own[-2:])

    def after_failure(self, code: int) -> None:
        """Once more, unless it is the user's mistake or the job failed at the same update before."""
        if not self._decides():
            return None if code == ExitCode.USAGE else self._hold()
        ledger = self._ledger()
        self._complete(ledger, code)
        if code == ExitCode.USAGE:
            return None
        ended = [a for a in ledger.attempts() if a.get("job") == job_id() and a["state"] == Outcome.FAILED]
        reason = f"at update {ended[-1]['update']}: {ended[-1]['cause']}"
        if len(ended) > 1 and ended[-2]["update"] == ended[-1]["update"]:
            return self._refuse(ledger, f"it failed twice {reason}")
        return self._requeue(ledger, f"failed {reason}")

    def _complete(self, ledger: Ledger, code: int) -> None:
        """Record this attempt's failure, where its ranks could not.

        A killed rank leaves no words; its peers need some seconds to miss it and to record the exact update.
        """
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if code > 0 and (words := last_lines(self.folder / f"{self.id}_{self.rank}_log.err", 1)):
            end += f": {words[0]}"
        deadline = time.monotonic() + (12 if code < 0 and self.environment.num_tasks > 1 else 3)
        while "rank" not in (found := self._recorded()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if "rank" not in found:
            update = ledger.reached(job_id()).get("update", found.get("update", -1))
            ledger.fail(f"rank {self.rank} {end}", pid=found.get("pid", 0), update=update, rank=self.rank)
        if code == -signal.SIGKILL:  # the cause, at which its peers can only guess
            ledger.note(cause=f"rank {self.rank} {end} (out of memory?)", rank=self.rank)

    def _recorded(self) -> Record:
        """What the ledgers hold of this attempt; {} when main.py has begun none."""
        found = (Ledger(folder).newest() for folder in (self.output_dir, self.folder))
        return next((a for a in found if (a.get("job"), a.get("restarts")) == (job_id(), restarts())), {})

    def _ledger(self) -> Ledger:
        """The run folder's; the job folder's where main.py has begun nothing there, as in an evaluation."""
        ledger, recorded = Ledger(self.output_dir), self._recorded()
        if not recorded or ledger.newest() != recorded:
            ledger = Ledger(self.folder)
        if not recorded:
            ledger.begin(update=-1, pid=0)
        return ledger

    def _requeue(self, ledger: Ledger, reason: str) -> None:
        if restarts() >= self.job.max_requeue:
            return self._refuse(ledger, f"--max_requeue {self.job.max_requeue} is reached; {reason}")
        if self._ending():
            return self._refuse(ledger, f"Slurm is ending the job by itself; {reason}")
        logger.warning("Requeued (%s); attempt %d of at most %d follows.", reason, restarts() + 2,
                       self.job.max_requeue + 1)
        ledger.note(requeued=True, reason=reason)
        for trial in range(4):
            try:
                self.environment._requeue(self.job.max_requeue - restarts())  # submitit's; ends a local task
                break
            except (OSError, subprocess.SubprocessError) as error:
                if self._ending():
                    break  # it was heard all the same
                if isinstance(error, OSError) and signal.SIGTERM in self.signals:
                    break  # preempted: Slurm requeues the job, if its task does not end before that
                if trial == 3 or isinstance(error, OSError):
                    return self._refuse(ledger, f"scontrol requeue failed: {error}")
                time.sleep(PAUSE)
        return self._hold()

    def _refuse(self, ledger: Ledger, reason: str) -> None:
        logger.error("The job is not requeued: %s.", reason)
        ledger.note(requeued=False, reason=reason)

    def _decides(self) -> bool:
        """Whether this task is the first of its attempt to get here; it decides for all, once.

        The others may have failed too, or were asked to stop because the first one has requeued the job.
        """
        try:
            os.close(os.open(self.folder / f"decision-{self.id}-{restarts()}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError as error:  # such as a full disk, which must not cost the job its requeue
            logger.error("the decision was not written: %s", error)
            return self.rank == 0
        return True

    def _hold(self) -> None:
        """Let Slurm end this task with the job that is requeued; return if it is not going to be."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to be saved
        deadline = time.monotonic() + HOLD
        while self.slurm and time.monotonic() < deadline and self._recorded().get("requeued") is not False:
            time.sleep(1)

    def _ending(self) -> bool:
        """Whether Slurm says that the job does not run any more; a silent controller says nothing."""
        return self.slurm and squeue(self.id, "%T") not in ("RUNNING", "PREEMPTED", "")

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        self.child.send_signal(number)


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log; [] where there is none."""
    answer = subprocess.run(["tail", "-n", str(count), log], capture_output=True, text=True, errors="replace")
    return answer.stdout.splitlines()
