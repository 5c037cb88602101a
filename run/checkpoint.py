"""A run's checkpoints: written so that a crash at any moment leaves a whole one, read so that damage is seen.

Beside each `NAME.pth` stands its manifest `NAME.pth.json` with sha256 and size. Order of a save: reserve the
disk, write a temporary file, fsync, manifest, rename, fsync the folder, and only then remove older files. All
of it only while the folder is the one that the run has locked.
"""
import errno
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from common.errors import Failure, UserError, kind_of
from common.files import TEMPORARY_SUFFIX, atomic_write, read_json, sha256_file, write_json
from common.ledger import Ledger
from common.log import logger
from common.safe_load import safe_torch_load
from common.text import file_size
from config.parse import Resolved
from datasets.images import retried
from models.download import local_file
from models.trained import best_checkpoint
from run.folder import RunFolder
from run.start import existing_folder
from run.state import BEST, BEST_EMA, State, check_resumable, check_same_run, upgrade

_NUMBERED = re.compile(r"checkpoint-(?:e([0-9]{1,9})u([0-9]{1,15})|([0-9]{1,9}))\.pth")
_SCORED = {BEST: "model", BEST_EMA: "model_ema"}
# A manifest may hold anything, or be a folder.
_UNREADABLE = (OSError, KeyError, TypeError, AttributeError, UserError)
_RECORDS = ("checkpoint-", "log.txt", "status.json", "config.yaml", "environment.json")


class Loaded(NamedTuple):
    """A checkpoint that was verified and read."""
    path: Path
    state: State


def position(path: Path) -> tuple[int, float]:
    """(epoch, update) in a checkpoint's name, the update of an epoch's end being infinite; (-1, -1) in other
    names."""
    match = _NUMBERED.fullmatch(path.name)
    if match is None:
        return -1, -1
    return (int(match[3]), math.inf) if match[3] else (int(match[1]), int(match[2]))


def manifest_path(path: Path) -> Path:
    """Where the manifest of `path` stands."""
    return path.with_name(path.name + ".json")


def manifest(path: Path) -> State | None:
    """The manifest's entry that is true of the file as it stands, None when there is no manifest.

    Raises UserError when the file is not the one that was written, Failure when the disk does not answer. A
    crash between writing the manifest and renaming the file leaves the new entry above that of the older
    file, which still stands and still counts.
    """
    try:
        entries = _entries(path)
        found = retried(lambda: {"size": path.stat().st_size, "sha256": sha256_file(path)}, str(path.parent))
        return next(entry for entry in entries if found.items() <= entry.items())
    except FileNotFoundError:
        return None
    except Failure:
        raise
    except (StopIteration, *_UNREADABLE) as error:
        reason = str(error) or "size or sha256 differ"
        raise kind_of(error)(f"{path} cannot be verified by its manifest ({reason}).",
                             code="damaged_checkpoint") from error


def _entries(path: Path) -> list[State]:
    entry = read_json(manifest_path(path), max_bytes=1 << 20)
    return [{k: v for k, v in e.items() if k != "previous"} for e in (entry, *entry.get("previous", []))]


def _has_its_size(path: Path) -> bool:
    try:
        return any(entry["size"] == path.stat().st_size for entry in _entries(path))
    except _UNREADABLE:
        return False


def _noted(path: Path, what: str) -> float:
    """A number in a checkpoint's manifest, such as its score; -inf where the file is damaged or has none.
    Raises Failure when the disk does not answer."""
    try:
        found = (manifest(path) or {}).get(what)
    except Failure:
        raise
    except UserError:
        found = None
    return found if isinstance(found, (int, float)) else -math.inf


def load(path: str | os.PathLike, needs_manifest: bool = False) -> Loaded:
    """Read one checkpoint after checking its manifest, or without one the CRCs inside. Raises UserError."""
    path = Path(path)
    if path.is_file() and manifest(path) is None and needs_manifest:
        raise UserError(f"{path.name} has no manifest; name it with --resume {path} if it is to be used.",
                        code="damaged_checkpoint")
    return Loaded(path, upgrade(safe_torch_load(path), path))


def snapshot(value: Any) -> Any:
    """A copy of a state on the CPU that shares no memory with it: tensors and plain values, nothing else.

    Views are copied at their own size (torch.save would write the whole storage behind them).
    """
    def copy(leaf: object) -> object:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().to("cpu", copy=True)
        if isinstance(leaf, np.generic):
            return leaf.item()
        return leaf if leaf is None or type(leaf) in (bool, int, float, str, bytes) else str(leaf)
    return tree_map(copy, value)


def state_bytes(state: object) -> int:
    """Bytes that a state takes on the disk: its tensors, and up to 160 for the name of each value."""
    return sum(160 + (leaf.nbytes if isinstance(leaf, torch.Tensor) else 0) for leaf in tree_leaves(state))


def check_finite(state: State) -> None:
    """Raise UserError naming the first tensor of the weights or their average that is not finite."""
    for part in _SCORED.values():
        for name, tensor in dict(state.get(part) or {}).items():
            if torch.is_tensor(tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"the tensor {name} of {part} holds infinite or undefined values",
                                code="nonfinite_weights")


class Checkpoints:
    """The checkpoints of one run folder. Rank 0 saves; any number of others may read.

    Args:
        folder: the run folder: its path to read there, its `RunFolder` to save there.
        keep: how many epoch ends to keep; at least two files always stay, and every `every`-th epoch, and the
        best.
        failed: gets a sentence for each save that failed (full disk, read-only or vanished folder), in the
        thread that writes; nothing is raised.

    `unsaved` says that the last save failed.
    """

    def __init__(self, folder: str | os.PathLike | Ledger, *, keep: int = 3, every: int = 50,
                 failed: Callable[[str], object] = logger.error):
        self._owner = folder if isinstance(folder, Ledger) else Ledger(folder)
        self.keep, self.every, self.failed = max(keep, 1), every, failed
        self.last_saved, self.unsaved = time.monotonic(), False
        self._thread: threading.Thread | None = None
        self._scores: dict[str, float] = {}  # of the best files on the disk, once they were looked at

    @property
    def folder(self) -> Path:
        """Where they are, and where this run may write now (see `RunFolder.own`)."""
        return self._owner.own()

    # Saving

    def save(self, state: State, best: Mapping[str, float] | None = None, wait: bool = False) -> None:
        """Save `checkpoint-{epoch}.pth`, or where `state` stands within an epoch (it has sums)
        `checkpoint-e{epoch}u{update}.pth`. Training waits only while the state is copied to main memory.

        Args:
            state: tensors and plain values; copied before this returns, so training may go on changing it.
            best: file name (`BEST`, `BEST_EMA`) -> its top-1 in percent, for each that this epoch improves.
            wait: return only when the files are on the disk (before stopping).
        """
        epoch, update = state["epoch"], state.get("update")
        name = f"checkpoint-{epoch if state.get('sums') is None else f'e{epoch + 1}u{update}'}.pth"
        self.close()
        try:
            thread = threading.Thread(target=self._write_all, args=(snapshot(state), name, dict(best or {})))
            thread.start()
            self._thread = thread
        except (MemoryError, RuntimeError) as error:  # no memory for the copy, or no thread
            self._fail(name, error, state_bytes(state))
        if wait:
            self.close()
        self.last_saved = time.monotonic()

    def due(self, minutes: float) -> bool:
        """Whether `minutes` have passed since the last save (0: never)."""
        return minutes > 0 and time.monotonic() - self.last_saved >= 60 * minutes

    def close(self) -> None:
        """Wait for the save under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_all(self, state: State, name: str, best: dict[str, float]) -> None:
        # The best files come first: a numbered file that says "this epoch was the best" must not outlive a
        # crash that kept those weights from being written.
        for target in (*best, name):
            try:
                check_finite(state)
                scored = {"scored": _SCORED[target]} if target in best else {}
                self._write(self.folder / target, state | scored, best.get(target))
                if target in best:
                    self._scores[target] = best[target]
                else:
                    self.unsaved = False
                    self._prune()
            except Exception as error:  # whatever went wrong, hours of training must not end because of it
                self._fail(target, error, state_bytes(state))

    def _write(self, path: Path, state: State, score: float | None) -> None:
        def write_manifest(digest: str, size: int) -> None:
            if self.folder != path.parent:
                raise OSError(errno.ESTALE, "the folder was moved or replaced meanwhile")
            about = {name: state.get(name) for name in ("format", "epoch", "update")}
            write_json(manifest_path(path), {"file": path.name, "sha256": digest, "size": size, **about,
                                             "score": score, "previous": [before] if before else []})

        before = None
        with suppress(UserError):
            before = manifest(path)
        # timm.create_model(checkpoint_path=...) takes `state_dict_ema` before `model_ema`: here it finds what
        # scored, the same tensors, which are written once.
        content = state | {"state_dict_ema": state.get(state.get("scored") or "model")}
        # torch.save needs the table of names and up to 64 bytes per tensor beside the values.
        atomic_write(path, lambda file: torch.save(content, file), before_rename=write_manifest,
                     reserve=state_bytes(state) + (64 << 10))

    def _fail(self, name: str, error: Exception, size: int) -> None:
        there: list[str] = []
        try:
            free = f"{size / 1e9:.2f} GB needed, {shutil.disk_usage(self.folder).free / 1e9:.2f} GB free"
            disk = os.statvfs(self.folder)
            if disk.f_files and not disk.f_favail:  # some file systems have no fixed number: 0 of 0
                free = f"all {disk.f_files} inodes of this disk are used: remove some files, of any size"
            there = [path.name for path in (*self.numbered()[-1:], *self.best_files())]
        except OSError:
            free = "the folder is gone"
        cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
        self.unsaved |= name not in _SCORED
        self.failed(f"{name} was not saved in {self._owner.path}: {cause} ({free}); training continues, "
                    f"saved so far: {', '.join(there) or 'nothing'}.")

    def _prune(self) -> None:
        numbered = self.numbered()
        ends = [path for path in numbered if position(path)[1] == math.inf]
        # Those within an epoch that has ended since are kept only where there would be fewer than two.
        useful = [*ends, *numbered[numbered.index(ends[-1]) + 1 if ends else 0:]]
        by_use = sorted(numbered, key=useful.__contains__)
        whole = [path for path in by_use if _has_its_size(path)]  # others were damaged meanwhile
        keep = {*by_use[-2:], *whole[-2:], *ends[-self.keep:]}
        keep |= {path for path in ends if (position(path)[0] + 1) % self.every == 0}
        for path in numbered:
            if path not in keep and path.parent == self.folder:
                try:
                    path.unlink(missing_ok=True)
                    manifest_path(path).unlink(missing_ok=True)
                except OSError as error:
                    logger.warning(f"{path} is no longer needed but cannot be removed ({error.strerror}).")

    def disk_estimate(self, size: int, epochs: int) -> tuple[str, bool]:
        """What the checkpoints of `epochs` epochs take at most for states of `size` bytes, and whether it
        fits."""
        needed = size * (min(max(self.keep, 2), epochs) + epochs // self.every + len(_SCORED) + 2)
        own = sum(path.stat().st_size for path in self.folder.glob("*.pth") if path.is_file())
        free = shutil.disk_usage(existing_folder(self.folder)).free + own
        return (f"checkpoints take {file_size(size)} each and up to {file_size(needed)} in all; "
                f"{file_size(free)} are available in {self.folder}"), needed < free

    # Finding

    def numbered(self) -> list[Path]:
        """The numbered checkpoints, oldest first by (epoch, update). Raises OSError where the disk does not
        answer (Path.glob of newer Pythons would find nothing there)."""
        folder, names = self.folder, []
        with suppress(FileNotFoundError):
            names = os.listdir(folder)
        return sorted((folder / name for name in names if _NUMBERED.fullmatch(name)), key=position)

    def best_files(self) -> list[Path]:
        """The files of the best epochs that there are."""
        return [self.folder / name for name in _SCORED if (self.folder / name).is_file()]

    def sweep(self) -> None:
        """Remove what a killed training left behind; only the owner of the folder's lock may."""
        stale = [p for name in _RECORDS for p in self.folder.glob(f".{name}*{TEMPORARY_SUFFIX}")]
        stale += [p for p in self.folder.glob("checkpoint-*.pth.json")
                  if p.is_file() and not os.path.lexists(p.with_suffix(""))]
        for path in stale:
            path.unlink(missing_ok=True)

    def newest_valid(self) -> Loaded | None:
        """The newest checkpoint that verifies, the best ones where no numbered one is; None when there is
        none at all.

        Raises UserError when there are some and none can be used: a run must never start from scratch in
        silence. Raises Failure when the disk does not answer.
        """
        passed: list[str] = []
        try:
            numbered, best = retried(lambda: (self.numbered(), self.best_files()), str(self._owner.path))
        except OSError as error:
            raise kind_of(error)(f"{self._owner.path} cannot be read ({error}).",
                                 code="unusable_folder") from error
        for path in reversed(numbered or sorted(best, key=lambda path: _noted(path, "epoch"))):
            try:
                loaded = load(path, needs_manifest=True)
                check_finite(loaded.state)
                return loaded
            except Failure:  # it may be read by the next start: nothing older is to take its place
                raise
            except UserError as error:
                passed.append(str(error))
                logger.warning(f"Skipped {path.name}: {error}")
        if passed:
            raise UserError(f"None of the {len(passed)} checkpoints in {self.folder} can be used: "
                            f"{passed[0]} Name one with --resume, or start from scratch in another "
                            "--output_dir.", code="no_valid_checkpoint")
        return None

    def better(self, scores: Mapping[str, float | None]) -> dict[str, float]:
        """Those of an epoch's `scores` (best file → top-1 in percent) that are to be saved, for `save`.

        What they must exceed is that of the file on the disk, which a crash may have left newer than the last
        numbered checkpoint, and a full disk older: its failed save is made good by the next that is better.
        """
        self.close()
        try:
            self._scores = {name: _noted(self.folder / name, "score")
                            for name in scores.keys() - self._scores.keys()} | self._scores
        except (OSError, Failure):  # a disk that does not answer, which `save` will report
            return {}
        return {name: new for name, new in scores.items()
                if new is not None and new > self._scores.get(name, -math.inf)}

    def resolve(self, resume: str) -> Loaded | None:
        """What `--resume` names: `latest`, `best`, a file, another run's folder (its newest valid one), or ''
        (the newest valid one here, None in a new folder)."""
        if resume == "best":
            path = best_checkpoint(self.folder)
            loaded = load(path) if path else None
        elif resume in ("", "latest"):
            loaded = self.newest_valid()
        else:
            loaded = Checkpoints(resume).newest_valid() if os.path.isdir(resume) else load(resume)
        if loaded is None and resume:
            raise UserError(f"--resume {resume}: no such checkpoint (run folder: {self.folder}); name a "
                            "file, leave the option out, or start from weights alone with --finetune.",
                            code="no_valid_checkpoint")
        return loaded

    def set_aside_newer(self, loaded: Loaded) -> list[str]:
        """Rename this folder's numbered checkpoints after `loaded` to `superseded-…`; returns their former
        names.

        Resuming from an older checkpoint would otherwise find them newest again after the next crash. Those
        of a run that resumes another folder's checkpoint are all set aside.
        """
        at: tuple[int, float] = (-1, 0)
        if loaded.path.parent.resolve() == self.folder.resolve():
            at = max(position(loaded.path), (loaded.state["epoch"], math.inf))
        newer = [path for path in self.numbered() if position(path) > at]
        for path in (each for found in newer for each in (found, manifest_path(found))):
            try:
                os.replace(path, path.with_name(f"superseded-{path.name}"))
            except FileNotFoundError:  # it has no manifest, or somebody removed it meanwhile
                continue
            except OSError as error:
                raise UserError(f"{path} is newer than {loaded.path.name}, which is resumed, and cannot be "
                                f"renamed ({error.strerror}): move it away.",
                                code="unwritable_folder") from error
        return [path.name for path in newer]


def open_folder(resolved: Resolved, folder: RunFolder | None) -> Loaded | None:
    """Own the run folder (rank 0) and find the checkpoint to resume, if any."""
    if folder is None:
        return find_checkpoint(resolved, None)
    if sentence := folder.lock():
        logger.info(sentence)
    checkpoints = Checkpoints(folder)
    checkpoints.sweep()
    loaded = find_checkpoint(resolved, folder)
    for name in checkpoints.set_aside_newer(loaded) if loaded else ():
        logger.warning("%s is newer than the checkpoint that is resumed: it is now superseded-%s", name, name)
    return loaded


def find_checkpoint(resolved: Resolved, folder: RunFolder | None) -> Loaded | None:
    """The checkpoint to resume, None for a new run; nothing in the folder is changed."""
    options = resolved.options
    asked = options.resume[0] if options.resume else ""
    by_word = asked in ("", "latest", "best")
    if folder is None and not asked:
        return None
    checkpoints = Checkpoints(folder or ".")
    if not asked and not options.auto_resume:
        if checkpoints.numbered() or checkpoints.best_files():  # weights of the Hub's layout are no run's
            raise UserError(f"--auto_resume false, but {checkpoints.folder} holds the checkpoints of an "
                            "earlier run; choose another --output_dir.", code="other_run")
        return None
    # A requeued job repeats its command: what it began from then lies behind what it has saved here since.
    own = by_word or folder is not None and folder.has_resumed(asked)
    loaded = checkpoints.resolve(asked if by_word else "") if own else None
    if loaded is None and not by_word:
        loaded = checkpoints.resolve(local_file(asked))
    if loaded is not None:
        check_resumable(loaded.state, loaded.path)
        for difference in check_same_run(loaded.state, resolved.to_dict(), loaded.path, explicit=not own,
                                         kind=type(options)):
            logger.warning("Resuming with another option: %s", difference)
    return loaded
