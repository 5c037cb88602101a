"""A run's checkpoints: written so that a crash at any moment leaves a whole one, read so that damage is seen.

Beside each `NAME.pth` stands its manifest `NAME.pth.json` with sha256 and size. Order of a save: reserve the
disk, write a temporary file, fsync, manifest, rename, fsync the folder, and only then remove older files.
"""
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import TEMPORARY_SUFFIX, atomic_write, read_json, sha256_file, write_json
from common.log import logger
from common.safe_load import safe_torch_load
from run.preflight import free_space, size_words, sweep_trials
from run.state import BEST, BEST_EMA, Best, check_finite, snapshot, state_bytes, upgrade

_NUMBERED = re.compile(r"checkpoint-(?:e([0-9]{1,9})u([0-9]{1,15})|([0-9]{1,9}))\.pth")
_SCORED = {BEST: "model", BEST_EMA: "model_ema"}
_WRITTEN_BY_RANK_ZERO = ("checkpoint-", "log.txt", "status.json", "config.yaml", "environment.json")


@dataclass
class Loaded:
    """A checkpoint that was verified and read, with a sentence for each newer one that was passed over."""
    path: Path
    state: dict[str, Any]
    passed_over: list[str] = field(default_factory=list)


def position(name: str) -> tuple[int, float] | None:
    """(epoch, update) in a checkpoint's name, the update of an epoch's end being infinite; None for other names."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    return (int(match[3]), math.inf) if match[3] else (int(match[1]), int(match[2]))


def manifest_path(path: Path) -> Path:
    """Where the manifest of `path` stands."""
    return path.with_name(path.name + ".json")


def manifest(path: Path) -> dict[str, Any] | None:
    """The manifest's entry that is true of the file as it stands, None when there is no manifest.

    Raises UserError when the file is not the one that was written. A crash between writing the manifest and
    renaming the file leaves the new entry above that of the older file, which still stands and still counts.
    """
    try:
        entries = _entries(path)
        size = path.stat().st_size
        entries = [e for e in entries if e["size"] == size]
        digest = sha256_file(path) if entries else ""
        entry = next((e for e in entries if e["sha256"] == digest), None)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} or its manifest cannot be read ({error}).") from error
    if entry is None:
        raise UserError(f"{path} is not the file that was saved: its size or sha256 differs from its manifest.")
    return entry


def _entries(path: Path) -> list[dict[str, Any]]:
    entry = read_json(manifest_path(path), max_bytes=1 << 20)
    return [{k: v for k, v in e.items() if k != "previous"} for e in (entry, *entry.get("previous", []))]


def load(path: str | os.PathLike) -> Loaded:
    """Read one checkpoint after checking its manifest, or without one the CRCs inside. Raises UserError."""
    path = Path(path)
    if path.is_file():
        manifest(path)
    return Loaded(path, upgrade(safe_torch_load(path), path))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without PyTorch's handler of SIGCHLD, which raises in the middle of any line when a loader process has died.

    The death is told by the loader when the next batch is asked for. Nothing changes outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)


class Checkpoints:
    """The checkpoints of one run folder. Rank 0 saves; any number of others may read.

    Args:
        folder: the run folder (made by its owner).
        keep: how many epoch ends to keep; at least two files always stay, and every `every`-th epoch, and the best.
        background: write in a thread; training waits only while the state is copied to main memory.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3, every: int = 50, background: bool = True):
        self.folder, self.keep, self.every, self.background = Path(folder), max(keep, 1), every, background
        self.waited = 0.0
        self.last_saved = self._started = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []

    # Saving

    def save(self, state: Mapping[str, Any], *, epoch: int, update: int | None = None,
             best: Mapping[str, float] | None = None, wait: bool = False) -> None:
        """Save `checkpoint-{epoch}.pth`, or within an epoch (given `update`) `checkpoint-e{epoch}u{update}.pth`.

        Args:
            update: global updates done, for a save within an epoch.
            state: tensors and plain values; copied before this returns, so training may go on changing it.
            best: file name (`BEST`, `BEST_EMA`) -> its top-1 in percent, for each that this epoch improves.
            wait: return only when the files are on the disk (before stopping).

        A failure (full disk, read-only or vanished folder) is logged and kept for `failures()`; nothing is raised.
        """
        started = time.monotonic()
        self._join()
        work = (epoch, update), dict(best or {})
        with undisturbed():
            try:
                thread = threading.Thread(target=self._write_all, args=(snapshot(state), *work), name="saving")
                thread.start()
                self._thread = thread
            except (MemoryError, RuntimeError) as error:  # no memory for the copy, or no thread to be had
                self._fail(f"The state of epoch {epoch}", error, state_bytes(state))
        if wait or not self.background:
            self._join()
        self.last_saved = time.monotonic()
        self.waited += self.last_saved - started

    def due(self, minutes: float) -> bool:
        """Whether `minutes` have passed since the last save (0: never)."""
        return minutes > 0 and time.monotonic() - self.last_saved >= 60 * minutes

    def failures(self) -> list[str]:
        """Sentences of saves that failed since the last call; look at each update's or epoch's end."""
        sentences, self._failures = self._failures, []
        return sentences

    def close(self) -> list[str]:
        """Wait for the save under way and return what failed."""
        started = time.monotonic()
        self._join()
        self.waited += time.monotonic() - started
        return self.failures()

    @property
    def waited_share(self) -> float:
        """Share of the wall time since construction that training stood still for saving."""
        return self.waited / max(time.monotonic() - self._started, 1e-9)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_all(self, state: dict[str, Any], number: tuple[int, int | None], best: dict[str, float]) -> None:
        epoch, update = number
        name = f"checkpoint-{epoch}.pth" if update is None else f"checkpoint-e{epoch}u{update}.pth"
        # The best files come first: a numbered file that says "this epoch was the best" must not outlive a crash
        # that kept those weights from being written.
        for target in (*best, name):
            scored = {"scored": _SCORED[target]} if target in _SCORED else {}
            about = {"epoch": epoch, "update": state.get("update"), "score": best.get(target)}
            try:
                check_finite(state)
                self._write(self.folder / target, state | scored, about)
            except Exception as error:  # whatever went wrong, hours of training must not end because of it
                self._fail(target, error, state_bytes(state))
                continue
            if target == name:
                self._prune()

    def _write(self, path: Path, state: dict[str, Any], about: dict[str, Any]) -> None:
        def write_manifest(digest: str, size: int, previous: list[dict]) -> None:
            entry = {"file": path.name, "sha256": digest, "size": size, "format": state.get("format"), **about}
            write_json(manifest_path(path), entry | ({"previous": previous} if previous else {}))

        previous = self._standing_entries(path)
        # torch.save needs the table of names and up to 64 bytes per tensor beside the values.
        digest, size = atomic_write(path, lambda file: torch.save(state, file), reserve=state_bytes(state) + (64 << 10),
                                    before_rename=lambda digest, size: write_manifest(digest, size, previous))
        if previous:
            write_manifest(digest, size, [])

    @staticmethod
    def _standing_entries(path: Path) -> list[dict]:
        """The manifest entries one of which is true of the file about to be replaced."""
        try:
            return _entries(path) if path.exists() else []
        except (OSError, UserError, TypeError, AttributeError):
            return []

    def _fail(self, name: str, error: Exception, size: int) -> None:
        try:
            free = f"{size / 1e9:.2f} GB needed, {shutil.disk_usage(self.folder).free / 1e9:.2f} GB free"
        except OSError:
            free = "the folder is gone"
        cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
        numbered = self.numbered()
        whole = f"the newest one saved is {numbered[-1].name}" if numbered else "none is saved yet"
        free = "" if isinstance(error, UserError) else f" ({free})"  # the state itself is at fault, not the disk
        sentence = f"{name} was not saved in {self.folder}: {cause}{free}; training goes on, {whole}."
        self._failures.append(sentence)
        logger.error(sentence)

    def _prune(self) -> None:
        numbered = self.numbered()
        ends = [path for path in numbered if position(path.name)[1] == math.inf]
        keep = {*numbered[-2:], *ends[-self.keep:]}
        keep |= {path for path in ends if (position(path.name)[0] + 1) % self.every == 0}
        whole = [path for path in numbered if self._looks_whole(path)]
        keep |= {*whole[-2:]}
        for path in numbered:
            if path not in keep:
                try:
                    path.unlink(missing_ok=True)
                    manifest_path(path).unlink(missing_ok=True)
                except OSError as error:
                    logger.warning(f"{path} is no longer needed but cannot be removed ({error.strerror}).")

    @staticmethod
    def _looks_whole(path: Path) -> bool:
        try:
            return read_json(manifest_path(path), max_bytes=1 << 20)["size"] == path.stat().st_size
        except (OSError, UserError, KeyError, TypeError):
            return False

    def disk_needed(self, state_size: int, epochs: int) -> int:
        """Bytes that the checkpoints of `epochs` epochs take at most, for states of `state_size` bytes."""
        return state_size * (min(max(self.keep, 2), epochs) + epochs // self.every + len(_SCORED) + 2)

    def disk_estimate(self, state: Mapping[str, Any], epochs: int) -> str:
        """One sentence for the start: what the checkpoints of `epochs` epochs will take, and what is free."""
        size = state_bytes(state)
        if not (state.get("optimizer") or {"state": True}).get("state"):
            size += 2 * state_bytes(state["model"])  # AdamW's two moments come with the first update
        needed = self.disk_needed(size, epochs)
        free = free_space(self.folder)
        text = (f"Checkpoints take {size_words(size)} each and up to {size_words(needed)} in all; "
                f"{size_words(free)} can be had in {self.folder}.")
        return text if needed < free else f"{text} This will not be enough: free some, or keep fewer."

    # Finding

    def numbered(self) -> list[Path]:
        """The numbered checkpoints, oldest first by (epoch, update)."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        return [self.folder / name for name in sorted((n for n in names if position(n)), key=position)]

    def stands_at(self, epoch: int, update: int | None) -> bool:
        """Whether the newest file is that of this point: the start of `epoch`, or `update` within it."""
        numbered, wanted = self.numbered(), (epoch - 1, math.inf) if update is None else (epoch, update)
        return bool(numbered) and position(numbered[-1].name) == wanted

    def sweep(self) -> int:
        """Remove what a killed training or dry run left behind; only the owner of the folder's lock may.

        Returns how many files of this folder that were.
        """
        sweep_trials(self.folder)
        stale = [p for name in _WRITTEN_BY_RANK_ZERO for p in self.folder.glob(f".{name}*{TEMPORARY_SUFFIX}")]
        stale += [p for p in self.folder.glob("checkpoint-*.pth.json") if not p.with_suffix("").exists()]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)

    def newest_valid(self) -> Loaded | None:
        """The newest checkpoint that verifies; None when there is none at all.

        Raises UserError when there are some and none can be used: a run must never start afresh in silence.
        """
        passed: list[str] = []
        for path in reversed(self.numbered()):
            try:
                if manifest(path) is None:
                    raise UserError(f"{path.name} has no manifest; name it with --resume {path} if it is to be used.")
                loaded = load(path)
                check_finite(loaded.state)
                return Loaded(path, loaded.state, passed)
            except UserError as error:
                passed.append(str(error))
                logger.warning(f"Passed over {path.name}: {error}")
        if passed:
            raise UserError(f"None of the {len(passed)} checkpoints in {self.folder} can be used: {' '.join(passed)} "
                            "Name one with --resume, or start anew in another --output_dir.")
        return None

    def best(self) -> Path | None:
        """The best checkpoint by the scores in the manifests (the moving average wins a tie); None without one."""
        found = [(self.score(name) or -math.inf, index, self.folder / name)
                 for index, name in enumerate((BEST, BEST_EMA)) if (self.folder / name).is_file()]
        return max(found)[2] if found else None

    def score(self, name: str) -> float | None:
        """Top-1 of `BEST` or `BEST_EMA` as it stands on the disk, None when missing or damaged."""
        scored = self._scored(name)
        return None if scored is None else scored[0]

    def _scored(self, name: str) -> tuple[float, int | None] | None:
        """(top-1, epoch) of a best file."""
        try:
            entry = manifest(self.folder / name)
        except UserError as error:
            logger.warning(str(error))
            return None
        score, epoch = (entry or {}).get("score"), (entry or {}).get("epoch")
        if not isinstance(score, (int, float)):
            return None
        return float(score), epoch if isinstance(epoch, int) else None

    def resolve(self, resume: str) -> Loaded | None:
        """What `--resume` names: `latest`, `best`, a path, or '' (the newest valid one, None in a new folder)."""
        if resume not in ("", "latest", "best"):
            return load(resume)
        if resume == "best":
            path = self.best()
            if path is None:
                raise UserError(f"--resume best: {self.folder} holds neither {BEST} nor {BEST_EMA}; name a file.")
            return load(path)
        loaded = self.newest_valid()
        if loaded is None and resume:
            raise UserError(f"--resume latest: {self.folder} holds no checkpoint; name a file or leave the option out.")
        return loaded

    def set_aside_newer(self, loaded: Loaded) -> list[str]:
        """Rename this folder's numbered checkpoints after `loaded` to `superseded-…`; returns their former names.

        Going on from an older checkpoint would otherwise find them newest again after the next crash. Those of a
        run that goes on from another folder's checkpoint are all set aside.
        """
        at: tuple[int, float] = (-1, 0)
        if loaded.path.parent.resolve() == self.folder.resolve():
            at = position(loaded.path.name) or (loaded.state["epoch"] if loaded.state["epoch"] is not None else -1,
                                                math.inf)
        newer = [path for path in self.numbered() if position(path.name) > at]
        for path in newer:
            os.replace(path, path.with_name(f"superseded-{path.name}"))
            manifest_path(path).unlink(missing_ok=True)
        return [path.name for path in newer]

    def restore_best(self, loaded: Loaded | None) -> Best:
        """The best results so far, from a checkpoint and the best files, which a crash may have left newer."""
        return Best.restore(loaded.state["best"] if loaded else None, self._scored(BEST),
                            self._scored(BEST_EMA))
