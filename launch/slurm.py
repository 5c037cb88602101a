"""What one task of a submitted job does: start main.py, pass signals on, and decide what its end means for the job.

main.py runs in a process of its own, so that any end of it, a kill for lack of memory included, is seen here,
and a requeue is decided in one place. submitit's own signal handler would act on rank 0 alone, between any two
lines of the training loop; it is replaced.
"""
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from common.files import append_json_line, read_json, read_json_lines
from common.log import logger, setup_logging
from launch import ExitCode
from launch.processes import end_now

# Seconds a requeued task waits for Slurm to end it; an exit would make the job "failed" or "completed". Longer than the
# task that decides may need to reach a busy controller.
HOLD = 480.0
PAUSE = 10.0  # seconds until Slurm's controller, which may be busy or restarting, is asked again


@dataclasses.dataclass
class Job:
    """`main.py argv` of the code in `code`, run in `cwd`; `folder` may hold %j. Pickled by reference, run in `code`."""

    argv: list[str]
    cwd: str
    code: str
    folder: str
    output_dir: str
    max_requeue: int

    def __call__(self) -> int:
        environment = submitit.JobEnvironment()
        # A rank that crashed in an earlier attempt left its error here, and submitit would take it for the job's end.
        environment.paths.result_pickle.unlink(missing_ok=True)
        setup_logging(environment.global_rank)
        task = Task(self, environment)
        code = task.run_main()
        if code == ExitCode.DONE:
            task.record("done")
            return 0
        if code == ExitCode.PAUSED:
            task.after_stop()
        elif code != ExitCode.USAGE:
            task.after_failure(code)
        raise SystemExit(code if code > 0 else 128 - code)

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook: the same job again; main.py finds its newest checkpoint by itself."""
        return DelayedSubmission(self)


class Task:
    """One task of one attempt of a job."""

    def __init__(self, job: Job, environment: submitit.JobEnvironment) -> None:
        self.environment, self.rank, self.id = environment, environment.global_rank, environment.job_id
        self.slurm = environment.cluster == "slurm"
        self.folder = Path(job.folder.replace("%j", self.id))
        self.output_dir = Path(job.output_dir.replace("%j", self.id))
        self.argv = [argument.replace("%j", self.id) for argument in job.argv]
        self.job, self.started, self.signalled = job, time.time(), ""
        self.child: subprocess.Popen | None = None
        self.attempt = self._attempt()

    def run_main(self) -> int:
        """Exit code of main.py; a stop before it could handle signals counts as one that lost nothing."""
        self.record("started", argv=self.argv)
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), self._forward)
        parent = os.getppid()
        command = [sys.executable, "-u", os.path.join(self.job.code, "main.py"), *self.argv]
        self.child = subprocess.Popen(command, cwd=self.job.cwd)
        if self.signalled:  # before there was a process to pass it on to
            self.child.terminate()
        while (code := self.child.poll()) is None:
            if os.getppid() != parent:  # slurmstepd or submitit's controller is gone
                self.child.terminate()
                try:
                    self.child.wait(20)
                finally:
                    end_now(1)
            time.sleep(0.2)
        if self.signalled and code < 0:
            return ExitCode.PAUSED
        return code

    def after_stop(self) -> None:
        """All ranks have stopped at one update and rank 0 has saved: rank 0 requeues the job, the others hold.

        Where Slurm is set up with KillOnBadExit, a task that ended now would take rank 0 with it.
        """
        if self.rank == 0 and self._decides():
            self._requeue("stopped: " + (self.signalled or "time limit"))
        else:
            self._hold()

    def after_failure(self, code: int) -> None:
        """Once more, unless the job failed at the same update before."""
        failure = self._failure(code)
        if not self._decides():
            self._hold()
            return
        before = [r for r in self._records() if r["what"] == "failed"]
        self.record("failed", **failure)
        if before and before[-1]["update"] == failure["update"]:
            sentence = f"it failed twice at update {failure['update']}: {failure['cause']}"
            logger.error("The job is not requeued, %s", sentence)
            self.record("not requeued", reason=sentence)
        else:
            self._requeue(f"failed at update {failure['update']}: {failure['cause']}")

    def record(self, what: str, **more: Any) -> None:
        """Append to job.jsonl in the job's folder; starts and ends are told by rank 0 alone."""
        if self.rank != 0 and what in ("started", "done"):
            return
        try:
            append_json_line(self.folder / "job.jsonl", {"what": what, "job": self.id, "attempt": self.attempt,
                                                         "rank": self.rank, "time": time.time(), **more})
        except OSError as error:  # such as a full disk, which must not cost the job its requeue
            logger.error("job.jsonl was not written: %s", error)

    def _records(self) -> list[dict[str, Any]]:
        return job_records(self.folder, self.id)

    def _requeue(self, reason: str) -> None:
        if self.attempt >= self.job.max_requeue:
            logger.error("Not requeued, this was attempt %d of %d (--max_requeue): %s", self.attempt + 1,
                         self.job.max_requeue + 1, reason)
            self.record("not requeued", reason=f"--max_requeue; {reason}")
            return
        state = self._state()
        if state not in ("RUNNING", "PREEMPTED", "UNKNOWN"):
            self.record("not requeued", reason=f"Slurm is ending the job by itself ({state}); {reason}")
            return
        logger.warning("Requeued (%s); attempt %d of at most %d follows.", reason, self.attempt + 2,
                       self.job.max_requeue + 1)
        self.record("requeued", reason=reason)
        for last in (False, False, False, True):
            try:
                self.environment._requeue(self.job.max_requeue - self.attempt)  # submitit's; ends this process if local
                break
            except subprocess.SubprocessError as error:
                logger.error("scontrol requeue failed: %s", error)
                if self._state() not in ("RUNNING", "PREEMPTED", "UNKNOWN"):
                    break  # it was heard all the same
                if last:
                    self.record("not requeued", reason=f"scontrol requeue failed: {error}")
                    return
                time.sleep(PAUSE)
        self._hold()

    def _decides(self) -> bool:
        """Whether this task is the first of its attempt to get here; it decides for all, once.

        The others may have failed too, or were told to stop because the first one has requeued the job.
        """
        try:
            os.close(os.open(self.folder / f"decision-{self.id}-{self.attempt}", os.O_CREAT | os.O_EXCL))
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
        while self.slurm and time.monotonic() < deadline:
            if any(r["what"] == "not requeued" and r["attempt"] == self.attempt for r in self._records()):
                return
            time.sleep(1)

    def _failure(self, code: int) -> dict[str, Any]:
        """The update and phase that failure.json, else the last progress, tells of this attempt, and the cause.

        A killed rank leaves no words; its peers need some seconds to miss it and to write down the exact update.
        """
        deadline = time.monotonic() + (12 if code < 0 and self.environment.num_tasks > 1 else 3)
        while not (found := self._of_this_attempt("failure.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        last = found or self._of_this_attempt("progress.json")
        if code == -signal.SIGKILL:  # the cause, at which its peers can only guess
            found = {"cause": f"rank {self.rank} was killed by SIGKILL (out of memory?)"}
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return {"update": last.get("update", -1), "phase": last.get("phase"), "failed_rank": found.get("rank", self.rank),
                "cause": found.get("cause", f"rank {self.rank} {end}")}

    def _of_this_attempt(self, name: str) -> dict[str, Any]:
        """A record in the run folder; {} when it is none or an earlier attempt's."""
        try:
            found = read_json(self.output_dir / name)
        except (OSError, ValueError):
            return {}
        return found if found.get("time", 0) >= self.started else {}

    def _attempt(self) -> int:
        if self.slurm:
            return int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return sum(record["what"] == "requeued" for record in self._records())

    def _state(self) -> str:
        """What Slurm says of the job; UNKNOWN where its controller doesn't answer."""
        if not self.slurm:
            return "RUNNING"
        command = ["squeue", "--noheader", f"--jobs={self.id}", "--format=%T"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        except subprocess.SubprocessError:
            answer = ""
        return answer.strip() or "UNKNOWN"

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signalled = signal.Signals(number).name
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


def job_records(folder: Path, job_id: str) -> list[dict[str, Any]]:
    """The lines of job.jsonl about one job; without %j in its name a folder serves several, one after the other."""
    return [record for record in read_json_lines(folder / "job.jsonl") if record.get("job") == job_id]
