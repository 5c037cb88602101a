"""Nobody waits for ever and in silence: heartbeats, words about who waits for whom, and an end for every process.

Every rank has a thread that writes a heartbeat to the process group's store once a second, over a connection of
its own, and asks whether a cause to end has been declared. The first cause wins: it is declared once, by the rank
that failed or by one that noticed, the others end with one line, and the cause is printed last.
"""
import dataclasses
import faulthandler
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from common.errors import UserError
from common.files import write_json
from common.log import logger
from launch.processes import alive, end_now

if TYPE_CHECKING:
    from launch.process import Process

BEAT_EVERY = 1.0
SILENT_AFTER = 4.0  # seconds without a heartbeat after which a rank whose peers lost it counts as gone
# The patience is hang_timeout times this: an index of a million pictures on a cold network disk takes its time, and the
# first update, which compiles and fills caches, has three times the patience too.
PATIENCE = {"start": 10, "saving": 3}
FIRST_UPDATE_PATIENCE = 3
WORDS = {"start": "start-up", "data": "data loading", "forward": "the forward pass", "backward": "the backward pass",
         "step": "the optimizer step", "evaluation": "evaluation", "saving": "saving"}
# What gloo and NCCL say when a peer is gone: never the first cause, that is what ended the peer.
LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Socket closed",
             "remote process exited", "Timed out waiting", "failed to recv", "Connection was likely closed",
             "Failed to send")
GONE = "killed by a signal, out of memory, or its node is down"
_instances = itertools.count()


@dataclasses.dataclass
class Beat:
    """One rank's heartbeat. `order` grows with the work done and is the same on all ranks at the same point."""

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


class Watchdog:
    """Context manager around everything after `distributed.start`; `phase` is called as work goes on.

    `folder` receives stacks-rank*.txt, failure.json and progress.json (None: stacks go to standard error).
    `hang_timeout` in seconds without progress, three times that for the first update and while saving, ten times at
    start-up; 0: never.
    When several processes run, leaving the block with an exception prints it (a UserError without traceback) after
    the other ranks have ended, and raises SystemExit with 1, or 2 for a UserError.
    """

    def __init__(self, process: "Process", folder: str | Path | None = None, hang_timeout: float = 180.0) -> None:
        self.process, self.hang_timeout = process, float(hang_timeout)
        self.record_in(folder)
        self.beat = Beat(process.rank, process.node_name, os.getpid())
        self._since = time.monotonic()
        self._first_update: int | None = None
        self._stop, self._settling = threading.Event(), threading.Event()
        self._ending = threading.Lock()  # taken once, by the thread that speaks this rank's last words
        self._prefix = f"watchdog{next(_instances)}/"
        self._seen: dict[int, tuple[int, float]] = {}
        self._visible: set[int] = set()
        self._progress_written = 0.0
        self._parent = os.getppid()
        self._asked = float("inf")  # when the store was asked what it hasn't answered yet
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def record_in(self, folder: str | Path | None) -> None:
        """Write to `folder` from now on."""
        self.folder = Path(folder) if folder else None

    def phase(self, name: str, update: int = -1) -> None:
        """Say what this rank does now: start, data, forward, backward, step, evaluation or saving, and at which update.

        Calling it again with the same name is a sign of progress within the phase (batches of an evaluation).
        """
        if (name, update) != (self.beat.phase, self.beat.update):
            self.beat.order += 1
        if self._first_update is None and update >= 0 and name == "data":
            self._first_update = update
        self.beat.first = self._first_update is None or update <= self._first_update
        self.beat.phase, self.beat.update = name, update
        self._since = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.process.store is not None:
            self._store = self.process.store.clone()
            self._store.set_timeout(timedelta(seconds=self.hang_timeout or 600))
            self._send(self._store)
            self.process.barrier()
            threading.Thread(target=self._watch_store, name="watchdog_store", daemon=True).start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        failed = kind is not None and not issubclass(kind, SystemExit)
        together = self.process.store is not None
        if together and not failed:
            try:
                self.process.barrier()
                self.beat.left = True
                self._send(self.process.store)
            except Exception as lost:  # a peer failed after this rank was done
                error, failed = lost, True
        if together and failed:
            self._settling.set()
            self._settle(error)
        elif failed and isinstance(error, Exception) and not isinstance(error, UserError):
            self._record(f"{kind.__name__}: {error}", self.beat)
        self._stop.set()
        self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()

    # ------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while not self._stop.wait(BEAT_EVERY):
            if self.hang_timeout:
                # Should something hold the interpreter's lock, this thread is mute; a C thread then ends the process.
                faulthandler.dump_traceback_later(self.hang_timeout + 30, exit=True)
            self._write_progress()
            if self.process.store is None:
                self._watch_alone()
                continue
            try:
                self._asked = time.monotonic()
                self._watch_together()
                self._asked = float("inf")
            except Exception as error:  # any failure of the store, whose exceptions differ between torch versions
                if self._stop.is_set() or os.getppid() != self._parent:  # end_with_launcher deals with it
                    return
                if not self._settling.wait(2) and self._ending.acquire(blocking=False):
                    self._end_without_store(str(error).splitlines()[0][:200])
                return

    def _watch_store(self) -> None:
        """A store whose owner was stopped never answers, whatever its timeout: a thread of its own must notice."""
        while self.hang_timeout and not self._stop.wait(BEAT_EVERY):
            waited = time.monotonic() - self._asked
            if waited > self.hang_timeout and self._ending.acquire(blocking=False):
                self._end_without_store(f"no answer for {waited:.0f} s")

    def _watch_alone(self) -> None:
        self.beat.age = time.monotonic() - self._since
        if self.hang_timeout and self.beat.age > self._patience(self.beat):
            cause = f"this process has been in {self.beat.where} for {self.beat.age:.0f} s (--hang_timeout)"
            self._dump_stacks()
            self._record(cause, self.beat)
            _say(f"{cause}; Python stacks: {self._stacks_name()}.")
            end_now(1)

    def _watch_together(self) -> None:
        self._send(self._store)
        if self._store.check([self._prefix + "cause"]):
            cause = json.loads(self._store.get(self._prefix + "cause"))
            if cause["hang"]:
                self._dump_stacks()
            if cause["rank"] != self.beat.rank and not self._settling.wait(2):
                self._end(self._follow, cause)
            return
        watcher = self.beat.rank < 2  # rank 1 watches too, because rank 0 may be the one that hangs
        beats = self._beats(self._store) if watcher else self._beats(self._store, local=True)
        cause = self._dead_neighbour(beats) or (self._hang(beats) if watcher and self.hang_timeout else None)
        if cause and self._declare(self._store, cause):
            if cause["hang"]:
                self._dump_stacks()
            if cause["hang"] or not self._settling.wait(2):
                self._end(self._tell, cause)

    def _send(self, store: Any) -> None:
        self.beat.age = time.monotonic() - self._since
        self.beat.waits_in = self.process.waits_in
        self.beat.count += 1
        store.set(f"{self._prefix}{self.beat.rank}", json.dumps(dataclasses.asdict(self.beat)))

    def _beats(self, store: Any, local: bool = False) -> list[Beat]:
        """Heartbeats with `age` brought up to now, of all ranks or of those on this node."""
        place = self.process.place
        ranks = range(place.world_size)
        if local:
            first = place.rank - place.local_rank
            ranks = range(first, min(first + place.local_world_size, place.world_size))
        now, beats = time.monotonic(), []
        for text in store.multi_get([f"{self._prefix}{rank}" for rank in ranks]):
            beat = Beat(**json.loads(text))
            count, seen = self._seen.get(beat.rank, (-1, 0.0))
            if beat.count != count:
                self._seen[beat.rank] = (beat.count, now)
            else:
                beat.age += now - seen
            beats.append(beat)
        return [beat for beat in beats if not beat.left]

    def _silence(self, beat: Beat) -> float:
        return time.monotonic() - self._seen[beat.rank][1]

    # ------------------------------------------------------------------------------------------- causes

    def _dead_neighbour(self, beats: list[Beat]) -> dict[str, Any] | None:
        """A rank on this node whose process is gone. Only processes seen alive once count: containers hide others."""
        for beat in beats:
            if beat.node != self.beat.node or beat.rank == self.beat.rank:
                continue
            if alive(beat.pid):
                self._visible.add(beat.rank)
            elif beat.rank in self._visible:
                return _cause(beat, f"{beat.name} is gone without a word, last in {beat.where}: {GONE}")
        return None

    def _hang(self, beats: list[Beat]) -> dict[str, Any] | None:
        """Who keeps the others waiting for too long: the least advanced rank that isn't in a collective."""
        silent = [beat for beat in beats if self._silence(beat) > self._patience(beat)]
        if silent:
            worst = max(silent, key=self._silence)
            return _cause(worst, f"{worst.name} has given no sign of life for {self._silence(worst):.0f} s, last in "
                                 f"{worst.where} (stopped, or its node is gone)", hang=True)
        busy = [beat for beat in beats if not beat.waits_in] or beats
        if not busy:
            return None
        least = min(beat.order for beat in busy)
        behind = [beat for beat in busy if beat.order == least]
        worst = min(behind, key=lambda beat: beat.age)
        if worst.age <= self._patience(worst):
            return None
        names = ", ".join(beat.name for beat in behind[:4]) + (" and others" if len(behind) > 4 else "")
        text = f"{names} {'has' if len(behind) == 1 else 'have'} been in {worst.where} for {worst.age:.0f} s"
        waiting = sorted({beat.waits_in or WORDS.get(beat.phase, beat.phase) for beat in beats if beat not in behind})
        if waiting:
            text += f"; the others wait in {', '.join(waiting)}"
        elif worst.waits_in:
            text += "; all wait for each other: " + ", ".join(f"rank {b.rank} in {b.waits_in}" for b in behind[:8])
        return _cause(worst, text + " (--hang_timeout)", hang=True)

    def _patience(self, beat: Beat) -> float:
        return self.hang_timeout * PATIENCE.get(beat.phase, FIRST_UPDATE_PATIENCE if beat.first else 1)

    def _declare(self, store: Any, cause: dict[str, Any]) -> bool:
        """Make `cause` the first one; False when another rank was first."""
        mine = json.dumps(dict(cause, rank=self.beat.rank, teller=[self.beat.node, self.beat.pid]))
        return store.compare_set(self._prefix + "cause", "", mine).decode() == mine

    # ------------------------------------------------------------------------------------------- the end

    def _end(self, last_words: Callable[[Any, dict[str, Any]], None], cause: dict[str, Any]) -> None:
        if self._ending.acquire(blocking=False):
            last_words(self._store, cause)
            end_now(cause["code"])

    def _settle(self, error: BaseException) -> None:
        """The main thread has failed: tell the cause last, or end with one line when it is another rank's."""
        self._ending.acquire()  # for ever when the other thread is about to end the process
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the peers of a dead rank; first the words
        store, name = self.process.store, type(error).__name__
        lost = not isinstance(error, UserError) and any(text.lower() in str(error).lower() for text in LOST_PEER)
        code = 2 if isinstance(error, UserError) else 1
        text = str(error) if code == 2 else "".join(traceback.format_exception(error)).rstrip()
        cause = _cause(self.beat, f"{self.beat.name} failed in {self.beat.where}: {name}: {error}", code=code)
        try:
            first = self._wait_for_cause(store) if lost else None
            if first is None and self._declare(store, cause):
                self._tell(store, cause, text, record=code != 2)
            else:
                first = first or json.loads(store.get(self._prefix + "cause"))
                code = first["code"]
                # This rank's own thread may have declared it just before and left the words to this one.
                (self._tell if first["teller"] == [self.beat.node, self.beat.pid] else self._follow)(store, first)
        except Exception as broken:  # the store died with rank 0
            if lost:
                self._say_store_is_gone(str(broken).splitlines()[0][:200])
            else:
                self._record(cause["text"], self.beat)
                _say(text)
        self._stop.set()
        raise SystemExit(code) from None

    def _wait_for_cause(self, store: Any) -> dict[str, Any] | None:
        """What ended the peer this rank has lost: its own words, or its silence."""
        deadline = time.monotonic() + 2 * SILENT_AFTER
        while time.monotonic() < deadline:
            if store.check([self._prefix + "cause"]):
                return json.loads(store.get(self._prefix + "cause"))
            gone = [beat for beat in self._beats(store) if self._silence(beat) > SILENT_AFTER]
            if gone:
                cause = _cause(gone[0], f"{gone[0].name} is gone without a word, last in {gone[0].where}: {GONE}")
                if self._declare(store, cause):
                    self._tell(store, cause)
                    raise SystemExit(1)
            time.sleep(0.2)
        return None

    def _tell(self, store: Any, cause: dict[str, Any], text: str = "", record: bool = True) -> None:
        """Say the cause once the other ranks have said their line, so that it stands last on the screen."""
        if record:
            self._record(cause["text"], Beat(**cause["beat"]))
        others = [r for r in range(self.process.world_size) if r not in (self.beat.rank, cause["beat"]["rank"])]
        deadline = time.monotonic() + 7
        while time.monotonic() < deadline and not all(store.check([f"{self._prefix}ended{r}"]) for r in others):
            time.sleep(0.1)
        stacks = f" Python stacks of the ranks: {self._stacks_name('*')}." if cause["hang"] else ""
        _say((text or cause["text"] + ".") + stacks)
        store.set(self._prefix + "told", "1")
        time.sleep(0.2)

    def _follow(self, store: Any, cause: dict[str, Any]) -> None:
        """End because of another rank's cause, after its teller: launchers blame the process that ends first."""
        logger.warning("%s ends because of rank %s.", self.beat.name, cause["beat"]["rank"])
        store.set(f"{self._prefix}ended{self.beat.rank}", "1")
        deadline = time.monotonic() + 9
        while time.monotonic() < deadline and not store.check([self._prefix + "told"]):
            time.sleep(0.1)
        node, pid = cause["teller"]
        while time.monotonic() < deadline and node == self.beat.node and alive(pid):
            time.sleep(0.1)
        time.sleep(0.5)

    def _end_without_store(self, detail: str) -> None:
        self._dump_stacks()
        self._say_store_is_gone(detail)
        end_now(1)

    def _say_store_is_gone(self, detail: str) -> None:
        cause = (f"{self.beat.name} in {self.beat.where}: rank 0 ({self.process.place.master_addr}) is gone or doesn't "
                 f"answer: killed, stopped, or its node is down ({detail})")
        self._record(cause, self.beat)
        _say(cause + ".")

    def _record(self, cause: str, beat: Beat) -> None:
        """failure.json, from which a requeued job sees whether it fails at the same update again."""
        if self.folder is None:
            return
        try:
            write_json(self.folder / "failure.json", {"rank": beat.rank, "node": beat.node, "phase": beat.phase,
                                                      "update": self.beat.update, "cause": cause, "time": time.time()})
        except OSError as error:
            logger.warning("failure.json was not written: %s", error)

    def _write_progress(self) -> None:
        if self.folder is None or not self.process.is_main or time.monotonic() - self._progress_written < 10:
            return
        self._progress_written = time.monotonic()
        try:
            write_json(self.folder / "progress.json", {"update": self.beat.update, "phase": self.beat.phase,
                                                       "world_size": self.process.world_size, "time": time.time()})
        except OSError:
            pass  # a full disk is the checkpoints' business to report

    def _stacks_name(self, rank: int | str | None = None) -> str:
        rank = self.beat.rank if rank is None else rank
        return str(self.folder / f"stacks-rank{rank}.txt") if self.folder else "above"

    def _dump_stacks(self) -> None:
        try:
            with open(self._stacks_name(), "a") if self.folder else os.fdopen(os.dup(2), "w") as file:
                file.write(f"{time.strftime('%F %T')} {self.beat.name} in {self.beat.where} {self.process.waits_in}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)


def _cause(beat: Beat, text: str, hang: bool = False, code: int = 1) -> dict[str, Any]:
    return {"text": text, "beat": dataclasses.asdict(beat), "hang": hang, "code": code}


def _say(text: str) -> None:
    logger.log(logging.ERROR, "%s", text)
    sys.stderr.flush()
