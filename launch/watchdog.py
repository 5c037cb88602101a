"""Nobody waits for ever and in silence: heartbeats, sentences about who waits for whom, an end for every process.

Every rank has a thread that writes a heartbeat to the process group's store once a second, over a connection of
its own, and asks whether a cause to end has been declared. The first cause wins: it is declared once, by the rank
that failed or by one that noticed, and every rank ends with it. Collectives have no time-out meanwhile, for that
could not tell a peer that hangs from a job that was suspended.
"""
import dataclasses
import faulthandler
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import write_json
from common.ledger import Ledger, job_id
from common.log import logger
from common.outcome import ExitCode
from launch.stop import alive, end_now

if TYPE_CHECKING:
    import torch.distributed as dist

    from launch.process import Process

BEAT_EVERY = 1.0
LONGEST_STEP = 3.0  # seconds between two ticks of the clock beyond which the process did not run
SILENT_AFTER = 4.0  # seconds without a heartbeat after which a rank whose peers lost it counts as gone
GRACE_WITHOUT_LAUNCHER = 15.0
LINGER = 2.5  # seconds in which the others read a cause; launchers blame the rank that ends first, its teller
# The patience is hang_timeout times this: an index of a million images on a cold network disk takes its time, and
# the first update, which compiles and fills caches, has three times the patience too.
PATIENCE = {"start": 10, "saving": 3}
FIRST_UPDATE_PATIENCE = 3
WORDS = {"start": "start-up", "data": "data loading", "forward": "the forward pass", "backward": "the backward pass",
         "step": "the optimizer step"}
# What gloo and NCCL say when a peer is gone: never the first cause, that is what ended the peer.
LOST_PEER = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "socket closed",
             "remote process exited", "timed out waiting", "failed to recv", "connection was likely closed",
             "failed to send")
_instances = itertools.count()


class RunningClock:
    """Seconds in which this process ran: while it is stopped (SIGSTOP, Ctrl-Z, scontrol suspend) it stands still.

    Whoever reads it first after a stop reads at most LONGEST_STEP more than before; `tick` is called once a second.
    """

    def __init__(self) -> None:
        self._read = 0.0, time.monotonic()

    def __call__(self) -> float:
        ran, at = self._read
        return ran + min(time.monotonic() - at, LONGEST_STEP)

    def tick(self) -> None:
        self._read = self(), time.monotonic()


@dataclasses.dataclass
class Beat:
    """One rank's heartbeat. `order` grows with the work done, the same on all ranks; `age` is since progress."""

    rank: int
    node: str
    pid: int
    phase: str = "start"
    update: int = -1
    order: int = 0
    first: bool = True
    age: float = 0.0
    waits_in: str = ""
    count: int = 0
    left: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.node})"

    @property
    def where(self) -> str:
        at = f" at update {self.update}" if self.update >= 0 else ""
        return f"{WORDS.get(self.phase, self.phase)}{at}"


@dataclasses.dataclass
class Cause(Beat):
    """The last heartbeat of the rank for which all end, with the reason in one sentence; `teller` declared it."""

    text: str = ""
    hang: str = ""  # "slow", or "silent" where not even its watchdog answers
    code: int = ExitCode.FAILED
    teller: int = -1


class Watchdog:
    """Context manager around everything after `process.start`; `phase` is called as work proceeds.

    `folder` receives stacks-rank*.txt, progress.json and, in its ledger, how a run failed (None: stacks go to
    standard error). `hang_timeout` in seconds of its own running time without progress, three times that for the
    first update and while saving, ten times at start-up; 0: never.
    When several processes run, leaving the block with an exception prints it (a UserError without traceback) and
    ends the process, as do its peers, with the exit code of the first cause.
    """

    def __init__(self, process: "Process", folder: str | Path | None = None, hang_timeout: float = 180.0) -> None:
        self.process, self.hang_timeout = process, float(hang_timeout)
        self.beat = Beat(process.rank, process.node_name, os.getpid())
        self.record_in(folder)
        self._clock, self._prefix = RunningClock(), f"watchdog{next(_instances)}/"
        self._since = self._orphaned = 0.0
        self._asked: float | None = None  # when the store was asked what it has not answered yet
        self._written, self._first_update = float("-inf"), None
        self._stop, self._ending = threading.Event(), threading.Lock()
        self._error: BaseException | None = None  # why the main thread has left the block, and since when
        self._seen: dict[int, tuple[int, float]] = {}
        self._visible: set[int] = set()
        self._parent, self._main_pid = os.getppid(), os.getpid()

    def record_in(self, folder: str | Path | None) -> None:
        """Write to `folder` from now on."""
        self.folder = Path(folder) if folder else None

    def phase(self, name: str, update: int = -1) -> None:
        """Note what this rank does: start, data, forward, backward, step, evaluation or saving, at which update.

        Calling it again with the same name is a sign of progress within the phase (batches of an evaluation).
        """
        if (name, update) != (self.beat.phase, self.beat.update):
            self.beat.order += 1
        if self._first_update is None and update >= 0 and name == "data":
            self._first_update = update
        self.beat.first = self._first_update is None or update <= self._first_update
        self.beat.phase, self.beat.update = name, update
        self._since = self._clock()

    def __enter__(self) -> "Watchdog":
        with suppress(AttributeError, ValueError, RuntimeError):  # stacks even of a rank whose interpreter is locked
            faulthandler.register(signal.SIGQUIT, all_threads=True, chain=True)
        if self.process.store is not None:
            self._store = self.process.store.clone()
            self._send(self._store)
            self.process.barrier()
            self._main_pid = self._beats(range(1))[0].pid
            if self.hang_timeout:
                self.process.set_timeout(timedelta(days=365))
        for run in (self._tick, self._watch):
            threading.Thread(target=run, name=f"watchdog{run.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        failed, together = not isinstance(error, SystemExit | None), self.process.store is not None
        if together and not failed:
            try:
                self.process.barrier()
                self.beat.left = True
                self._send(self.process.store)  # pyright: ignore[reportArgumentType]
            except Exception as lost:  # a peer failed after this rank was done
                error, failed = lost, True
        if together and failed:
            for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends the peers of a dead rank; first the words
                signal.signal(number, signal.SIG_IGN)
            self._since, self._error = self._clock(), error
            threading.Event().wait()  # the watching thread says why, and ends the process
        self._stop.set()
        if failed:
            self._record(self._cause(self.beat, _sentence(error)))

    # ------------------------------------------------------------------------------------- the two threads

    def _tick(self) -> None:
        """Keep the clock; end with the launcher, or when the store does not answer. This thread never waits."""
        while not self._stop.wait(BEAT_EVERY):
            self._clock.tick()
            if self.process.place.launcher != "none" and os.getppid() != self._parent:
                if not self._orphaned:  # first let training save
                    self._orphaned = self._clock()
                    os.kill(os.getpid(), signal.SIGTERM)
                elif self._clock() - self._orphaned > GRACE_WITHOUT_LAUNCHER:
                    end_now(ExitCode.FAILED)
            asked = self._asked
            if self.hang_timeout and asked is not None and self._clock() - asked > self.hang_timeout:
                self._end(self._store_gone(f"no answer for {self._clock() - asked:.0f} s"))

    def _watch(self) -> None:
        """Beat and look; this thread may wait for a disk, or for a store whose owner was stopped."""
        while not self._stop.wait(BEAT_EVERY):
            self._write_progress()
            try:
                self._asked = self._clock()
                cause = self._look_alone() if self.process.store is None else self._look()
                self._asked = None
            except Exception as error:  # any failure of the store, whose exceptions differ between torch versions
                if os.getppid() != self._parent or self._stop.wait(2):  # the launcher is gone, or all are done
                    return
                cause = self._store_gone(str(error).splitlines()[0][:200])
            if cause is not None:
                self._end(cause)

    def _look_alone(self) -> Cause | None:
        self.beat.age = self._clock() - self._since
        if not self.hang_timeout or self.beat.age <= self._patience(self.beat):
            return None
        return self._cause(self.beat, f"this process has been in {self.beat.where} for {self.beat.age:.0f} s "
                           "(--hang_timeout)", hang="slow")

    def _look(self) -> Cause | None:
        """The cause that has been declared, or that this rank has or sees, and declares."""
        self._send(self._store)
        if self._store.check([self._prefix + "cause"]):
            return Cause(**json.loads(self._store.get(self._prefix + "cause")))
        place, cause = self.process.place, None
        lost = isinstance(self._error, RuntimeError) and any(text in str(self._error).lower() for text in LOST_PEER)
        if self._error is not None and (not lost or self._clock() - self._since > 2 * SILENT_AFTER):
            cause = self._cause(self.beat, f"{self.beat.name} failed in {self.beat.where}: {_sentence(self._error)}",
                                code=_exit_code(self._error))
        elif lost or place.rank < 2:  # rank 1 watches too, for rank 0 may be the one that hangs
            cause = self._silent_or_slow(self._beats(range(place.world_size)), lost)
        else:
            first = place.rank - place.local_rank
            cause = self._dead_neighbour(self._beats(range(first, min(first + place.local_world_size, place.world_size))))
        if cause is None:
            return None
        return Cause(**json.loads(self._store.compare_set(self._prefix + "cause", "", json.dumps(dataclasses.asdict(cause)))))

    def _send(self, store: "dist.Store") -> None:
        self.beat.age, self.beat.waits_in = self._clock() - self._since, self.process.waits_in
        self.beat.count += 1
        store.set(f"{self._prefix}{self.beat.rank}", json.dumps(dataclasses.asdict(self.beat)))

    def _beats(self, ranks: range) -> list[Beat]:
        """The heartbeats of `ranks` that are still at work, with `age` brought up to now."""
        beats = [Beat(**json.loads(text)) for text in self._store.multi_get([f"{self._prefix}{r}" for r in ranks])]
        for beat in beats:
            if beat.count != self._seen.get(beat.rank, (-1, 0.0))[0]:
                self._seen[beat.rank] = beat.count, self._clock()
            beat.age += self._silence(beat)
        return [beat for beat in beats if not beat.left]

    def _silence(self, beat: Beat) -> float:
        return self._clock() - self._seen[beat.rank][1]

    # ----------------------------------------------------------------------------------------------- causes

    def _dead_neighbour(self, beats: list[Beat]) -> Cause | None:
        """A rank of this node whose process is gone. Only one seen alive once counts: containers hide others."""
        for beat in beats:
            if beat.node == self.beat.node and alive(beat.pid):
                self._visible.add(beat.rank)
            elif beat.rank in self._visible:
                return self._gone(beat)
        return None

    def _silent_or_slow(self, beats: list[Beat], lost: bool = False) -> Cause | None:
        """Who is gone, or keeps the others waiting for too long: the least advanced rank outside a collective.

        `lost` says that a connection to some rank broke: one that is silent now is the one.
        """
        worst = max(beats, key=self._silence, default=None)
        if worst is None or (dead := self._dead_neighbour(beats)):
            return worst and dead
        if lost and self._silence(worst) > SILENT_AFTER:
            return self._gone(worst)
        if not self.hang_timeout:
            return None
        if self._silence(worst) > self._patience(worst):
            return self._cause(worst, f"{worst.name} has given no sign of life for {self._silence(worst):.0f} s, last in "
                               f"{worst.where} (stopped, or its node is gone)", hang="silent")
        busy = [beat for beat in beats if not beat.waits_in] or beats
        worst = min(busy, key=lambda beat: (beat.order, beat.age))
        if worst.age <= self._patience(worst):
            return None
        others = [f"rank {b.rank} in {b.waits_in or b.where}" for b in beats if b is not worst]
        return self._cause(worst, f"{worst.name} has been in {worst.where}{worst.waits_in and ', ' + worst.waits_in} for "
                           f"{worst.age:.0f} s (--hang_timeout); the others: {', '.join(others[:8])}", hang="slow")

    def _patience(self, beat: Beat) -> float:
        return self.hang_timeout * PATIENCE.get(beat.phase, FIRST_UPDATE_PATIENCE if beat.first else 1)

    def _cause(self, beat: Beat, text: str, hang: str = "", code: int = ExitCode.FAILED) -> Cause:
        return Cause(**dataclasses.asdict(beat), text=text, hang=hang, code=code, teller=self.beat.rank)

    def _gone(self, beat: Beat) -> Cause:
        return self._cause(beat, f"{beat.name} is gone without a word, last in {beat.where}: killed by a signal, out of "
                           "memory, or its node is down")

    def _store_gone(self, detail: str) -> Cause:
        cause = self._cause(self.beat, f"{self.beat.name} in {self.beat.where}: rank 0 ({self.process.place.master_addr}) "
                            f"is gone or doesn't answer: killed, stopped, or its node is down ({detail})", hang="slow")
        return dataclasses.replace(cause, rank=0)

    # ---------------------------------------------------------------------------------------------- the end

    def _end(self, cause: Cause) -> None:
        """Record and say the cause, and end this process."""
        self._ending.acquire()  # for ever when the other thread is at it
        if cause.hang:
            self._dump_stacks()
        if cause.hang == "silent" and cause.node == self.beat.node:
            with suppress(OSError):  # should its interpreter be locked, a signal still reaches it
                os.kill(cause.pid, signal.SIGQUIT)
        if self.process.is_main or cause.teller == self.beat.rank:
            self._record(cause)
        text = cause.text.rstrip(".") + (f"; Python stacks: {self._stacks('*')}" if cause.hang else "")
        if cause.teller != self.beat.rank:
            logger.error("%s ends: %s.", self.beat.name, text)
        elif cause.rank != self.beat.rank or self._error is None:
            logger.error("%s.", text)
        else:
            logger.error("%s", self._error if isinstance(self._error, UserError)
                         else "".join(traceback.format_exception(self._error)).rstrip())
        sys.stderr.flush()
        time.sleep(LINGER + (cause.teller != self.beat.rank) if self.process.store is not None else 0)
        end_now(cause.code)

    def _record(self, cause: Cause) -> None:
        if self.folder is not None and self.folder.is_dir():
            Ledger(self.folder).fail(cause.text, pid=self._main_pid, update=cause.update, rank=cause.rank,
                                     node=cause.node, phase=cause.phase)

    def _write_progress(self) -> None:
        if self.folder is None or not self.process.is_main or time.monotonic() - self._written < 10:
            return
        self._written, beat = time.monotonic(), self.beat
        with suppress(OSError):  # a full disk is the checkpoints' business to report
            write_json(self.folder / "progress.json", dict(
                update=beat.update, phase=beat.phase, world_size=self.process.world_size, time=time.time(), job=job_id()))

    def _stacks(self, rank: int | str) -> str:
        return str(self.folder / f"stacks-rank{rank}.txt") if self.folder else "above"

    def _dump_stacks(self) -> None:
        with suppress(OSError), open(self._stacks(self.beat.rank) if self.folder else os.dup(2), "a") as file:
            file.write(f"{time.strftime('%F %T')} {self.beat.name} in {self.beat.where} {self.process.waits_in}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _sentence(error: BaseException | None) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.FAILED
