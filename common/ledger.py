"""`attempts.jsonl` and `status.json`: the one ledger of a run, which training, watchdog and launcher keep.

`status.json` tells how the run stands where exit codes cannot (launchers turn any code into 1).
`attempts.jsonl` has a line for the beginning and the end of each attempt; a beginning without an end is an
attempt that was killed.
`progress.json` has every ten seconds how far it is, and at the end how far it came.
"""
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import append_json_line, read_json, read_json_lines, write_json
from common.log import logger
from common.outcome import Outcome

RUNNING = "RUNNING"  # an attempt under way, or one that was killed
Record = dict[str, Any]


class Ledger:
    """The ledger in the folder `path`. Writing raises nothing: what a disk refuses is logged.

    `attempt` is the number of the attempt this object has begun, 0 before.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.attempt = 0

    def own(self) -> Path:
        """The folder to write to now. Raises OSError."""
        return self.path

    def begin(self, *, update: int, epoch: int | None = None, pid: int | None = None, **more: object) -> None:
        """Begin an attempt at `update`; `pid` is rank 0's process, by default this one."""
        self.attempt = int(self.newest().get("attempt", 0)) + 1
        pid = pid or os.getpid()
        self._append(started=now(), from_update=update, host=socket.gethostname(), pid=pid, job=job_id(),
                     restarts=restarts(), command=sys.argv, **more)
        self._write_status(RUNNING, update=update, epoch=epoch, pid=pid)

    def end(self, outcome: Outcome, *, update: int, epoch: int | None = None, cause: str = "",
            **more: object) -> None:
        """End the attempt in both files; a failure whose rank is known already keeps its first cause."""
        if outcome == Outcome.FAILED and "rank" not in more and "rank" in self.newest():
            return
        self._append(ended=now(), state=outcome.value, update=update, epoch=epoch, cause=cause, **more)
        self._write_status(outcome.value, update=update, epoch=epoch, cause=cause, **more)
        self._write_progress(outcome.value, update=update, phase="ended")

    def progress(self, *, pid: int, **more: object) -> None:
        """progress.json while rank 0's process `pid` works; once its attempt has ended, `end` wrote it."""
        newest = self.newest()
        if newest.get("pid") != pid or newest["state"] == RUNNING:
            self._write_progress(RUNNING, **more)

    def fail(self, cause: str, *, pid: int, update: int, **where: object) -> None:
        """Record the first cause of the failure of the attempt of rank 0's process `pid`, begun or not.

        `where` has the rank. Rank 0's own words are replaced: mostly it only knows that it has lost a peer.
        """
        newest = self.newest()
        if self.read("owner.json").get("pid", pid) != pid:
            return  # another run's folder by now
        if newest.get("pid") != pid:
            self.begin(update=update, pid=pid)
        elif "rank" in newest:
            return
        else:
            self.attempt = newest["attempt"]
        self.end(Outcome.FAILED, update=update, epoch=None, cause=cause, **where)

    def note(self, **more: object) -> None:
        """Add to what is recorded of the newest attempt."""
        self.attempt = int(self.newest().get("attempt", 0)) or 1
        self._append(**more)

    def attempts(self) -> list[Record]:
        """One dict per attempt, oldest first: what its lines say, later over earlier, and its `state`."""
        found: dict[int, Record] = {}
        with suppress(OSError, UserError):
            for line in read_json_lines(self.own() / "attempts.jsonl"):
                if isinstance(line.get("attempt"), int):
                    found.setdefault(line["attempt"], {"state": RUNNING}).update(line)
        for attempt in found.values():
            with suppress(ValueError):  # RUNNING is no outcome
                attempt["state"] = Outcome(attempt["state"]).value  # as this version calls it
        return [found[number] for number in sorted(found)]

    def newest(self) -> Record:
        """The newest attempt; {} before the first."""
        return (self.attempts() or [{}])[-1]

    def reached(self, job: str | None) -> Record:
        """progress.json, where it is that of the scheduler's `job`; else {}."""
        found = self.read("progress.json")
        return found if found.get("job") == job else {}

    def read(self, name: str) -> Record:
        """The record in the file `name`; {} when there is none, or none that can be read."""
        found = None
        with suppress(OSError, UserError):
            found = read_json(self.own() / name, max_bytes=1 << 20)
        return found if isinstance(found, dict) else {}

    def _append(self, **line: object) -> None:
        self._guard("attempts.jsonl", lambda path: append_json_line(path, {"attempt": self.attempt, **line}))

    def _write_status(self, state: str, **more: object) -> None:
        status = {"state": state, "cause": "", "attempt": self.attempt, "time": now(),
                  "host": socket.gethostname(), "job": job_id(), **more}
        status = {name: value for name, value in status.items() if value is not None}
        self._guard("status.json", lambda path: _write_even_if_full(path, status))

    def _write_progress(self, state: str, **more: object) -> None:
        record = self.read("progress.json") | {"state": state, "time": time.time(), "job": job_id(), **more}
        with suppress(OSError):  # a full disk is the checkpoints' business to report
            write_json(self.own() / "progress.json", record)

    def _guard(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            write(self.own() / name)
        except OSError as error:
            logger.error("%s was not written in %s: %s; the run continues.", name, self.path, error.strerror)


def _write_even_if_full(path: Path, record: Record) -> None:
    """`write_json`; in place where the disk has no room for a second file: no state may stay RUNNING."""
    try:
        write_json(path, record)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.is_file():
            raise
        with open(path, "r+", encoding="utf-8", errors="surrogateescape") as file:
            file.write(json.dumps(record, ensure_ascii=False, default=str))
            file.truncate()


def job_id() -> str | None:
    """Slurm's job id, None outside a job."""
    return os.environ.get("SLURM_JOB_ID") or None


def restarts() -> int:
    """How often a scheduler, not a person, has started this job again."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdigit() else 0


def now() -> str:
    """The time as the ledger has it."""
    return time.strftime("%Y-%m-%d %H:%M:%S%z")
