"""A run folder: who owns it, how its run stands, and the attempts that made it.

`status.json` tells the truth where exit codes cannot (launchers turn any code into 1); `attempts.jsonl` has a
line for the start and the end of each attempt, and a start without an end is an attempt that was killed.
"""
import errno
import fcntl
import json
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import append_json_line, read_json, read_json_lines, write_json
from common.log import logger

RUNNING, PREEMPTED, DONE, FAILED = "RUNNING", "PREEMPTED", "DONE", "FAILED"


def job_id() -> str | None:
    """The scheduler's job id, None outside a job."""
    return next((os.environ[name] for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID") if os.environ.get(name)), None)


class RunFolder:
    """One run's folder. Rank 0 of a training locks and records; evaluating and reporting need neither."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.attempt = 0
        self._lock: int | None = None
        self._made = False

    # Ownership

    def lock(self, wait: float = 2.0) -> str | None:
        """Make the folder and own it for a training until `release` or the end of the process, kill -9 included.

        Args:
            wait: seconds to wait for a process that is just ending.

        Returns a sentence when the last owner ended without releasing it. Raises UserError naming the owner when
        another training has it, or the cause when the folder cannot be made.
        """
        try:
            descriptor, locked = self._take(wait)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be used: {error.strerror}; choose another.") from error
        last = self.owner()
        if not locked:
            os.close(descriptor)
            raise UserError(f"{self.path} is in use by another training ({_describe(last)}); wait for it, stop it, or "
                            "choose another --output_dir.")
        self._lock = descriptor
        # Loader workers are forks and would hold the lock on after this process was killed.
        os.register_at_fork(after_in_child=self._forget)
        self._write_owner({"host": socket.gethostname(), "pid": os.getpid(), "job": job_id(), "since": _now()})
        return f"The last training in {self.path} ({_describe(last)}) ended without a word." if last else None

    def _take(self, wait: float) -> tuple[int, bool]:
        """(descriptor of owner.json, whether it is locked); taken anew where an owner removed it while this one waited."""
        while True:
            self._made = self._made or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "owner.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            locked = self._try_lock(descriptor, wait)
            if not locked or os.fstat(descriptor).st_nlink:
                return descriptor, locked
            os.close(descriptor)

    @staticmethod
    def _try_lock(descriptor: int, wait: float) -> bool:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    logger.warning("This file system has no locks: take care that no second training uses the folder.")
                    return True
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)

    def owner(self) -> dict[str, Any]:
        """Host, pid, job and start of the training that owns, or last owned, the folder; {} when released."""
        try:
            owner = read_json(self.path / "owner.json", max_bytes=1 << 16)
        except (OSError, UserError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _write_owner(self, owner: dict[str, Any]) -> None:
        # In place, not by renaming: the lock belongs to this very file.
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps(owner).encode(), 0)
        except OSError as error:
            logger.warning(f"The owner of {self.path} could not be written down ({error.strerror}).")

    def _forget(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def release(self) -> None:
        """Give the folder back; a start that was refused before it made anything leaves none behind."""
        if self._lock is not None:
            self._write_owner({})
            self._remove_unused()
            self._forget()

    def _remove_unused(self) -> None:
        try:
            if self._made and os.listdir(self.path) == ["owner.json"]:
                (self.path / "owner.json").unlink()
                self.path.rmdir()
        except OSError:
            pass  # gone, read-only, or filled by somebody else meanwhile: it stays as it is

    # Records

    def status(self) -> dict[str, Any]:
        """The last record: state, update, epoch, cause, attempt, time; {} for a folder without one."""
        try:
            status = read_json(self.path / "status.json", max_bytes=1 << 20)
        except (OSError, UserError):
            return {}
        return status if isinstance(status, dict) else {}

    def record(self, state: str, *, update: int, epoch: int, cause: str = "", **more: Any) -> None:
        """Write status.json. A disk that cannot take it is said in the log and stops nothing."""
        status = {"state": state, "update": update, "epoch": epoch, "cause": cause, "attempt": self.attempt,
                  "time": _now(), "host": socket.gethostname(), "pid": os.getpid(), "job": job_id(), **more}
        self._guard("status.json", lambda: write_json(self.path / "status.json", status))

    def _guard(self, name: str, write) -> None:
        try:
            write()
        except OSError as error:
            logger.error(f"{name} was not written in {self.path}: {error.strerror}; the run goes on.")

    def attempts(self) -> list[dict[str, Any]]:
        """One dict per attempt, oldest first: what its start said, updated by what its end said (`state`: RUNNING
        for one that was killed, or is under way)."""
        found: dict[int, dict[str, Any]] = {}
        for line in read_json_lines(self.path / "attempts.jsonl"):
            number = line.get("attempt")
            if isinstance(number, int):
                found.setdefault(number, {"state": RUNNING}).update(line)
        return [found[number] for number in sorted(found)]

    def begin(self, *, update: int, epoch: int, resume: str = "", automatic: bool = False, **more: Any) -> None:
        """Start an attempt at `update`; `resume` is the --resume asked for, `automatic` says a scheduler started it."""
        earlier = self.attempts()
        self.attempt = (earlier[-1]["attempt"] if earlier else 0) + 1
        line = {"attempt": self.attempt, "started": _now(), "from_update": update, "resume": resume,
                "automatic": automatic, "host": socket.gethostname(), "job": job_id(), "command": sys.argv, **more}
        self._guard("attempts.jsonl", lambda: append_json_line(self.path / "attempts.jsonl", line))
        self.record(RUNNING, update=update, epoch=epoch)

    def end(self, state: str, *, update: int, epoch: int, cause: str = "", **more: Any) -> None:
        """End the attempt as DONE, PREEMPTED or FAILED, in both files."""
        line = {"attempt": self.attempt, "ended": _now(), "state": state, "update": update, "epoch": epoch,
                "cause": cause, **more}
        self._guard("attempts.jsonl", lambda: append_json_line(self.path / "attempts.jsonl", line))
        self.record(state, update=update, epoch=epoch, cause=cause, **more)

    def reason_to_stop(self, max_attempts: int = 100) -> str | None:
        """Why an automatic restart must not happen (twice failed at one update, or too many attempts), else None.

        A person who starts the run by hand has perhaps mended the cause, so only requeued jobs ask this.
        """
        attempts = self.attempts()
        last = [a for a in attempts if a["attempt"] != self.attempt or a["state"] != RUNNING][-2:]
        failed = [a.get("update") for a in last if a["state"] == FAILED]
        if len(failed) == 2 and failed[0] == failed[1]:
            return (f"The run in {self.path} failed twice at update {last[1].get('update')} and is not started again; "
                    f"the cause was: {last[1].get('cause') or 'not recorded'}.")
        automatic = sum(bool(a.get("automatic")) for a in attempts)
        if automatic >= max_attempts:
            return (f"The run in {self.path} was requeued {automatic} times, the most allowed; start it by hand to go "
                    f"on from update {attempts[-1].get('update', attempts[-1].get('from_update'))}.")
        return None

    def already_went_on_from(self, resume: str) -> bool:
        """Whether an attempt here began from this --resume: a requeued job repeats its command, and must then go on
        from the folder's own newest checkpoint, not from the beginning again."""
        return bool(resume) and any(a.get("resume") == resume for a in self.attempts())


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "its owner is not recorded"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"host {owner.get('host')}, process {owner.get('pid')}{job}, since {owner.get('since')}"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S%z")


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json and the report (plain values)."""
    from importlib.metadata import PackageNotFoundError, version

    import torch
    packages = {}
    for name in ("torch", "torchvision", "timm", "pillow", "numpy", "safetensors", "submitit", "triton"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages,
            "cuda": torch.version.cuda, "devices": devices, "threads": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "host": socket.gethostname(), "command": sys.argv}
