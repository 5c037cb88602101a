"""What one task of a submitted job does: start main.py, pass signals on, and decide what its end means for the job.

main.py runs in a process of its own, so that any end of it, a kill for lack of memory included, is seen here, and
a requeue is decided in one place. submitit's own signal handler would act on rank 0 alone, between any two lines of
the training loop; it is replaced.
"""
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import submitit
from submitit.helpers import DelayedSubmission

from common.errors import UserError
from common.files import read_json
from common.ledger import Ledger, Record, job_id, restarts
from common.log import logger, setup_logging
from common.outcome import ExitCode, Outcome
from launch.stop import end_now

# Seconds a requeued task waits for Slurm to end it; an exit would make the job "failed" or "completed". Longer than
# the task that decides may need to reach a busy controller.
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
        # A rank that crashed in an earlier attempt left its error here; submitit would take it for the job's end.
        environment.paths.result_pickle.unlink(missing_ok=True)
        setup_logging(environment.global_rank)
        task = Task(self, environment)
        code = task.run_main()
        if code == ExitCode.PAUSED:
            task.after_stop()
        elif code not in (ExitCode.DONE, ExitCode.USAGE):
            task.after_failure(code)
        if code != ExitCode.DONE:
            raise SystemExit(code if code > 0 else 128 - code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook: the same job again; main.py finds its newest checkpoint by itself."""
        return DelayedSubmission(self)


class Task:
    """One task of one attempt of a job."""

    def __init__(self, job: Job, environment: submitit.JobEnvironment) -> None:
        self.environment, self.rank, self.id = environment, environment.global_rank, environment.job_id
        self.slurm = environment.cluster == "slurm"
        self.folder, self.output_dir = (Path(name.replace("%j", self.id)) for name in (job.folder, job.output_dir))
        self.argv = [argument.replace("%j", self.id) for argument in job.argv]
        self.job, self.started, self.signalled = job, time.time(), 0
        self.child: subprocess.Popen | None = None
        if not self.slurm:  # the ledger of main.py knows Slurm's word for it
            os.environ["SLURM_RESTART_COUNT"] = str(len(list(self.folder.glob(f"decision-{self.id}-*"))))

    def run_main(self) -> int:
        """Exit code of main.py; a stop before it could handle signals counts as one that lost nothing."""
        if self.slurm and self.rank == 0 and shutil.which("scontrol") is None:
            logger.warning("There is no scontrol on this node's PATH: a preempted job is saved, but not requeued.")
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), self._forward)
        parent = os.getppid()
        command = [sys.executable, "-u", os.path.join(self.job.code, "main.py"), *self.argv]
        self.child = subprocess.Popen(command, cwd=self.job.cwd)
        if self.signalled:  # before there was a process to pass it on to
            self.child.send_signal(self.signalled)
        while (code := self.child.poll()) is None:
            if os.getppid() != parent:  # slurmstepd or submitit's controller is gone
                self.child.terminate()
                try:
                    self.child.wait(20)
                finally:
                    end_now(ExitCode.FAILED)
            time.sleep(0.2)
        return ExitCode.PAUSED if self.signalled and code == -self.signalled else code

    def after_stop(self) -> None:
        """All ranks have stopped at one update and rank 0 has saved: rank 0 requeues the job, the others hold.

        Where Slurm is set up with KillOnBadExit, a task that ended now would take rank 0 with it.
        """
        if self.rank == 0 and self._decides():
            signalled = signal.Signals(self.signalled).name if self.signalled else "asked to stop"
            self._requeue(self._ledger(), self._recorded().get("cause") or signalled)
        else:
            self._hold()

    def after_failure(self, code: int) -> None:
        """Once more, unless the job failed at the same update before."""
        if not self._decides():
            self._hold()
            return
        ledger = self._ledger()
        failure = self._failure(ledger, code)
        before = [a for a in ledger.attempts() if a.get("job") == job_id() and a["state"] == Outcome.FAILED][:-1]
        cause = f"failed at update {failure['update']}: {failure['cause']}"
        if before and before[-1]["update"] == failure["update"]:
            self._refuse(ledger, f"it {cause.replace('failed', 'failed twice', 1)}")
        else:
            self._requeue(ledger, cause)

    def _failure(self, ledger: Ledger, code: int) -> Record:
        """What the ledger holds of this attempt's failure, or what a task can tell of it.

        A killed rank leaves no words; its peers need some seconds to miss it and to write down the exact update.
        """
        killed = f"rank {self.rank} was killed by {signal.Signals(-code).name}" if code < 0 else ""
        deadline = time.monotonic() + (12 if killed and self.environment.num_tasks > 1 else 3)
        while "rank" not in (found := self._recorded()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if "rank" not in found:
            update = self._progress().get("update", found.get("update", -1))
            ledger.fail(killed or f"rank {self.rank} ended with code {code}", pid=found.get("pid", 0), update=update,
                        rank=self.rank)
        if code == -signal.SIGKILL:  # the cause, at which its peers can only guess
            ledger.note(cause=killed + " (out of memory?)", rank=self.rank)
        return ledger.newest()

    def _progress(self) -> Record:
        try:
            found = read_json(self.output_dir / "progress.json")
        except (OSError, UserError):
            return {}
        return found if found.get("time", 0) >= self.started else {}

    def _recorded(self) -> Record:
        """What the ledgers hold of this attempt; {} when main.py has begun none."""
        found = (Ledger(folder).newest() for folder in (self.output_dir, self.folder))
        return next((a for a in found if (a.get("job"), a.get("restarts")) == (job_id(), restarts())), {})

    def _ledger(self) -> Ledger:
        """The run folder's, or the job folder's where main.py has begun nothing: an evaluation, an early failure."""
        ledger = Ledger(self.output_dir)
        if (ledger.newest().get("job"), ledger.newest().get("restarts")) != (job_id(), restarts()):
            ledger = Ledger(self.folder)
            if not self._recorded():
                ledger.begin(update=-1, pid=0)
        return ledger

    def _requeue(self, ledger: Ledger, reason: str) -> None:
        state = self._state()
        if restarts() >= self.job.max_requeue:
            return self._refuse(ledger, f"--max_requeue {self.job.max_requeue} is reached; {reason}")
        if state not in ("RUNNING", "PREEMPTED", "UNKNOWN"):
            return self._refuse(ledger, f"Slurm is ending the job by itself ({state}); {reason}")
        logger.warning("Requeued (%s); attempt %d of at most %d follows.", reason, restarts() + 2,
                       self.job.max_requeue + 1)
        ledger.note(requeued=True, reason=reason)
        for last in (False, False, False, True):
            try:
                self.environment._requeue(self.job.max_requeue - restarts())  # submitit's; ends this task if local
                break
            except (OSError, subprocess.SubprocessError) as error:
                logger.error("scontrol requeue failed: %s", error)
                if self._state() not in ("RUNNING", "PREEMPTED", "UNKNOWN"):
                    break  # it was heard all the same
                if last or isinstance(error, OSError):
                    return self._refuse(ledger, f"scontrol requeue failed: {error}")
                time.sleep(PAUSE)
        return self._hold()

    def _refuse(self, ledger: Ledger, reason: str) -> None:
        logger.error("The job is not requeued: %s.", reason)
        ledger.note(requeued=False, reason=reason)

    def _decides(self) -> bool:
        """Whether this task is the first of its attempt to get here; it decides for all, once.

        The others may have failed too, or were told to stop because the first one has requeued the job.
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

    def _state(self) -> str:
        """What Slurm says of the job; UNKNOWN where its controller doesn't answer."""
        if not self.slurm:
            return "RUNNING"
        command = ["squeue", "--noheader", f"--jobs={self.id}", "--format=%T"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            answer = ""
        return answer.strip() or "UNKNOWN"

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signalled = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)
