"""Nobody waits for ever and in silence: heartbeats, sentences about who waits for whom, an end for all.

Every rank has a thread that writes a heartbeat to the process group's store once a second, over a connection
of its own, and asks whether a cause to end has been declared. The first cause wins: it is declared once, by
the rank that failed or by one that noticed, and every rank ends with it. Collectives have no time-out
meanwhile, for that could not tell a peer that hangs from a job that was suspended.
"""
import dataclasses
import faulthandler
import json
import os
import re
import signal
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from common.errors import UserError
from common.ledger import Ledger
from common.log import logger
from common.outcome import ExitCode
from launch.process import Process
from launch.stop import alive

BEAT_EVERY = 1.0
LONGEST_STEP = 2.0  # seconds between two ticks of the clock beyond which the process did not run
SILENT_AFTER = 4.0  # seconds without a heartbeat after which a rank whose peers lost it counts as gone
LINGER = 2.5  # seconds in which the others read a cause; launchers blame the rank that ends first, its teller
GRACE_WITHOUT_LAUNCHER = 15.0
# The patience is hang_timeout times this: an index of a million images on a cold network disk takes its time,
# and the first update, which compiles and fills caches, has three times the patience too.
PATIENCE = {"start": 10, "saving": 3}
# What gloo and NCCL say when a peer is gone: never the first cause, that is what ended the peer.
LOST_PEER = re.compile("(closed|reset) by peer|broken pipe|connection (refused|was likely closed)|"
                       "socket closed|failed to (recv|send)|remote process exited|timed out waiting", re.I)


class RunningClock:
    """Seconds in which this process ran: it stands still while that is stopped (Ctrl-Z, scontrol suspend).

    `tick` is called once a second; whoever reads it first after a stop reads LONGEST_STEP more than before.
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
    """One rank's heartbeat.

    `order` grows with the work done, the same on all ranks; `age` is the time since the last progress,
    `patience` how long that may take, `silence` the time since the last heartbeat.
    """

    rank: int
    node: str
    pid: int
    phase: str = "start"
    update: int = -1
    order: int = 0
    age: float = 0.0
    patience: float = float("inf")
    waits_in: str = ""
    count: int = 0
    silence: float = 0.0
    left: bool = False
    name = property(lambda self: f"rank {self.rank} ({self.node})")
    where = property(lambda self: f"phase {self.phase}, update {max(self.update, 0)}")


@dataclasses.dataclass
class Cause(Beat):
    """The last heartbeat of the rank for which all end, and the reason in a sentence; `teller` saw it."""

    text: str = ""
    hang: bool = False
    code: int = ExitCode.FAILED
    teller: int = -1


class Watchdog:
    """Context manager around everything after `process.start`; `phase` is called as work proceeds.

    `hang_timeout` in seconds of its own running time without progress, three times that for the first update
    and while saving, ten times at start-up; 0: never. Stacks go to standard error until `record_in`.
    When several processes run, leaving the block with an exception prints it (a UserError without traceback)
    and ends the process, as do its peers, with the exit code of the first cause.
    """

    def __init__(self, process: Process, hang_timeout: float = 180.0):
        self.process, self.hang_timeout = process, hang_timeout or float("inf")
        self.beat = Beat(process.rank, process.node_name, os.getpid())
        self.ledger: Ledger | None = None
        self._store: dist.Store = dist.HashStore()
        self._clock, self._since = RunningClock(), 0.0
        self._asked = float("inf")  # when the store was asked what it has not answered yet
        self._error: BaseException | None = None  # with which the main thread has left the block
        self._first_update = float("inf")
        self._seen: dict[int, tuple[int, float]] = {}
        self._visible: set[int] = set()
        self._stop, self._ending = threading.Event(), threading.Lock()
        self._parent, self._main_pid = os.getppid(), os.getpid()

    def record_in(self, folder: Ledger | str) -> None:
        """Write to `folder` from now on ("": nowhere); rank 0 gives the one that it has locked.

        It receives stacks-rank*.txt, progress.json and, in its ledger, how a run failed.
        """
        self.ledger = folder if isinstance(folder, Ledger) else Ledger(folder) if folder else None

    def phase(self, name: str, update: int = -1) -> None:
        """Note what this rank does: start, data, forward, backward, step, evaluation or saving.

        Calling it again with the same name is a sign of progress within the phase (batches of an evaluation).
        """
        self.beat.order += (name, update) != (self.beat.phase, self.beat.update)
        if name == "data" and update >= 0:
            self._first_update = min(self._first_update, update)
        self.beat.phase, self.beat.update, self._since = name, update, self._clock()

    def __enter__(self) -> "Watchdog":
        if self.process.store is not None:
            self._store = self.process.store.clone()
            self._send()
            self.process.barrier()
            self._main_pid = self._beats()[0].pid
        for run in (self._tick, self._watch):
            threading.Thread(target=run, name=f"watchdog{run.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.process.store is not None:
            try:
                if error is None:
                    self.process.barrier()
                    self.beat.left = True
                    self._send()
            except Exception as lost:  # a peer failed after this rank was done
                error = lost
            if error is not None:
                for number in (signal.SIGTERM, signal.SIGINT):  # launchers end the peers: first the words
                    signal.signal(number, signal.SIG_IGN)
                self._since, self._error = self._clock(), error
                threading.Event().wait()  # the watching thread says why, and ends the process
        self._stop.set()
        if error is not None:
            self._record(self._cause(self.beat, _sentence(error)))

    # ------------------------------------------------------------------------------------- the two threads

    def _tick(self) -> None:
        """Keep the clock; end with the launcher, or when the store doesn't answer. It never waits itself."""
        while not self._stop.wait(BEAT_EVERY):
            self._clock.tick()
            if self.process.launcher != "none" and os.getppid() != self._parent:
                os.kill(os.getpid(), signal.SIGTERM)  # so that training saves
                if not self._stop.wait(GRACE_WITHOUT_LAUNCHER):
                    os._exit(ExitCode.FAILED)
                return
            if self._clock() - self._asked > self.hang_timeout:
                self._end(self._store_gone(f"no answer for {self.hang_timeout:.0f} s"))

    def _watch(self) -> None:
        """Beat and look; this thread may wait for a disk, or for a store whose owner was stopped."""
        while not self._stop.wait(BEAT_EVERY):
            if self.ledger is not None and self.process.is_main and self.beat.count % 10 == 1:
                self.ledger.progress(pid=self._main_pid, world_size=self.process.world_size,
                                     update=self.beat.update, phase=self.beat.phase)
            try:
                self._asked = self._clock()
                cause = self._look()
                self._asked = float("inf")
            except Exception as error:  # of the store; their kinds differ between torch versions
                if os.getppid() != self._parent or self._stop.wait(2):  # the launcher is gone, or all is done
                    return
                cause = self._store_gone(str(error).splitlines()[0][:200])
            if cause is not None:
                self._end(cause)

    def _look(self) -> Cause | None:
        """The cause that has been declared, or that this rank has or sees, and declares."""
        self._send()
        error = self._error
        lost = isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None
        if error is not None and (not lost or self._clock() - self._since > 2 * SILENT_AFTER):
            text = f"{self.beat.name} failed in {self.beat.where}: {_sentence(error)}"
            if lost:  # and nobody is: its own words, of sockets, would name no cause
                text = (f"{self.beat.name} lost its connection to ranks that run, in {self.beat.where}: "
                        "check the network between the nodes")
            cause = self._cause(self.beat, text, code=getattr(error, "exit_code", ExitCode.FAILED))
        else:  # two watch on each node, for one may be what hangs
            cause = self._judge(self._beats(), lost) if lost or self.process.local_rank < 2 else None
        mine = json.dumps(dataclasses.asdict(cause)) if cause is not None else ""
        declared = self._store.compare_set("watchdog/cause", "", mine)  # the first one stays
        return Cause(**json.loads(declared)) if declared else None

    def _send(self) -> None:
        beat = self.beat
        times = PATIENCE.get(beat.phase, 3 if beat.update <= self._first_update else 1)
        beat.patience = self.hang_timeout * times
        beat.age, beat.waits_in = self._clock() - self._since, self.process.waits_in
        beat.count += 1
        self._store.set(f"watchdog/{beat.rank}", json.dumps(dataclasses.asdict(beat)))

    def _beats(self) -> list[Beat]:
        """The heartbeats of all ranks that are still at work, with `age` brought up to now."""
        keys = [f"watchdog/{rank}" for rank in range(self.process.world_size)]
        beats = [Beat(**json.loads(text)) for text in self._store.multi_get(keys)]
        for beat in beats:
            if beat.count != self._seen.get(beat.rank, (-1, 0.0))[0]:
                self._seen[beat.rank] = beat.count, self._clock()
            beat.silence = self._clock() - self._seen[beat.rank][1]
            beat.age += beat.silence
        return [beat for beat in beats if not beat.left] or [self.beat]

    # ----------------------------------------------------------------------------------------------- causes

    def _judge(self, beats: list[Beat], lost: bool = False) -> Cause | None:
        """Who is gone, or keeps the others waiting for too long: the least advanced outside a collective.

        `lost` says that a connection to some rank broke: one that is silent now is the one. A process of this
        node that is missing is gone if it was seen alive once; containers hide others.
        """
        here = {beat.rank for beat in beats if beat.node == self.beat.node and alive(beat.pid)}
        self._visible |= here
        worst = max(beats, key=lambda beat: (beat.rank in self._visible - here, beat.silence))
        hang = worst.silence > worst.patience
        if hang or worst.rank in self._visible - here or lost and worst.silence > SILENT_AFTER:
            return self._cause(worst, f"{worst.name} is gone without a word, last in {worst.where}: killed, "
                               "stopped, out of memory, or its node is down", hang=hang)
        busy = [beat for beat in beats if not beat.waits_in] or beats
        worst = min(busy, key=lambda beat: (beat.order, beat.age))
        if worst.age <= worst.patience:
            return None
        where = ", ".join(f"rank {b.rank} in {b.waits_in or b.where}" for b in beats)[:500]
        return self._cause(worst, f"{worst.name} keeps the others waiting for {worst.age:.0f} s "
                           f"(--hang_timeout): {where}", hang=True)

    def _cause(self, beat: Beat, text: str, **more: str | int) -> Cause:
        return Cause(**{**dataclasses.asdict(beat), "text": text, "teller": self.beat.rank, **more})

    def _store_gone(self, detail: str) -> Cause:
        return self._cause(self.beat, f"rank 0 ({self.process.master_addr}) is gone or doesn't answer: "
                           f"killed, stopped, or its node is down ({detail}); {self.beat.name} was in "
                           f"{self.beat.where}", rank=0, hang=True)

    # ---------------------------------------------------------------------------------------------- the end

    def _end(self, cause: Cause) -> None:
        """Record and say the cause, and end this process."""
        self._ending.acquire()  # for ever when the other thread is at it
        mine, text = cause.teller == self.beat.rank, cause.text.rstrip(".")
        if cause.hang:
            stacks = self.ledger and self.ledger.path / f"stacks-rank{self.beat.rank}.txt"
            with suppress(OSError), open(stacks or os.dup(2), "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            text += f"; Python stacks: {stacks.with_name('stacks-rank*.txt') if stacks else 'above'}"
        if self.process.is_main or mine:
            self._record(cause)
        own = self._error if mine and cause.rank == self.beat.rank else None
        if isinstance(own, UserError):  # whose sentence says it all
            text, own = str(own), None
        logger.error("%s%s", "" if mine else f"{self.beat.name} ends: ", text, exc_info=own)
        time.sleep((LINGER + (not mine)) * (self.process.world_size > 1))
        os._exit(cause.code)  # without waiting for threads or collectives; loader workers end with it

    def _record(self, cause: Cause) -> None:
        if self.ledger is not None and self.ledger.path.is_dir():
            self.ledger.fail(cause.text, pid=self._main_pid, update=cause.update, rank=cause.rank,
                             node=cause.node, phase=cause.phase)


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
