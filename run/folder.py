"""A run folder and who owns it; the ledger of its attempts is `common.ledger`."""
import errno
import fcntl
import json
import os
import platform
import socket
import sys
import time
import uuid
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import UserError
from common.ledger import Ledger, Record, job_id, now
from common.log import logger


class RunFolder(Ledger):
    """One run's folder. Rank 0 of a training locks and records; evaluating and reporting need neither."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._lock: int | None = None
        self._made = False
        self._beside: Path | None = None

    # Ownership

    def lock(self, wait: float = 2.0) -> str | None:
        """Make the folder and own it for a training until `release` or the end of the process, even kill -9.

        Args:
            wait: seconds to wait for a process that is just ending.

        Returns a sentence when the last owner ended without releasing it. Raises UserError naming the owner
        when another training has it (code "folder_in_use"), or why it cannot be used ("unusable_folder").
        """
        try:
            self._lock = self._take(wait)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be used: {error.strerror}; choose another.",
                            code="unusable_folder") from error
        last = self.read("owner.json")  # host, pid, job and start; {} when it was released
        # Loader workers are forks and would hold the lock on after this process was killed.
        os.register_at_fork(after_in_child=self._forget)
        self._write_owner({"host": socket.gethostname(), "pid": os.getpid(), "job": job_id(), "since": now()})
        return f"The last training in {self.path} ({_describe(last)}) ended without a word." if last else None

    def _take(self, wait: float) -> int:
        """The descriptor of owner.json, locked; made again where an owner removed it meanwhile."""
        deadline = time.monotonic() + wait
        while True:
            self._made = self._made or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "owner.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    owner = _describe(self.read("owner.json"))
                    raise UserError(f"{self.path} is in use by another training ({owner}); wait for it, stop "
                                    "it, or choose another --output_dir.", code="folder_in_use") from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                logger.warning("This file system has no locks: let no second training use the folder.")
                return descriptor
            os.close(descriptor)

    def _write_owner(self, owner: Record) -> None:
        assert self._lock is not None
        # In place, not by renaming: the lock belongs to this very file.
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps(owner).encode(), 0)
        except OSError as error:
            logger.warning("The owner of %s could not be recorded (%s).", self.path, error.strerror)

    def _forget(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def release(self) -> None:
        """Give the folder back; a start that was refused before it made anything leaves none behind."""
        if self._lock is not None:
            self._write_owner({})
            with suppress(OSError):  # gone, read-only, or filled by somebody else meanwhile: it stays
                if self._made and self.is_ours() and os.listdir(self.path) == ["owner.json"]:
                    (self.path / "owner.json").unlink()
                    self.path.rmdir()
            self._forget()

    def is_ours(self) -> bool:
        """Whether the folder at `path` is the one that was locked: it may have been moved or replaced.

        Raises OSError where the disk doesn't answer.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            return self._lock is None or os.path.samestat(os.stat(self.path / "owner.json"),
                                                          os.fstat(self._lock))
        return False

    def own(self) -> Path:
        """Where this run may write now: `path`, or a folder beside it while `path` isn't the one it locked.

        Whoever writes or removes a file of a run asks for it each time. Raises OSError.
        """
        if self.is_ours():
            return self.path
        if self._beside is None:
            self._beside = self.path.with_name(f"{self.path.name}-{uuid.uuid4().hex[:6]}")
            logger.error("%s was moved, removed or replaced, and is not this run's folder any more: nothing "
                         "more is written there, and the run is saved in %s.", self.path, self._beside)
        self._beside.mkdir(exist_ok=True)
        return self._beside

    def has_resumed(self, resume: str) -> bool:
        """Whether an attempt here began from this --resume.

        A requeued job repeats its command, and must resume the folder's own newest checkpoint then.
        """
        return bool(resume) and any(a.get("resume") == resume for a in self.attempts())


def _describe(owner: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in owner.items() if value) or "owner not recorded"


def environment() -> Record:
    """Versions and machine, for environment.json and the report (plain values)."""
    import torch
    packages = {}
    for name in ("torch", "torchvision", "timm", "pillow", "numpy", "safetensors", "submitit", "triton"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages,
            "cuda": torch.version.cuda, "devices": devices, "threads": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "host": socket.gethostname(), "command": sys.argv}
