"""What is looked at before a run beside its data and model: disk, shared memory, speed, and whether processes agree.

The whole of it is `--dry_run true` (see preflight.py at the top); `start_warnings` is the part every training does.
"""
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.log import logger
from common.text import duration, plural
from common.text import file_size as size_words
from run.folder import RunFolder, environment
from run.log import remedy

_CLOCKS_APART = 2.0  # seconds; file times and logs of several nodes cannot be compared beyond
_WAIT_SHARE = 0.10
_TRIAL = ".preflight-"


class Report:
    """Aligned lines on the console as they are found, so that the one where something hangs is seen too."""

    def __init__(self, title: str):
        self.problems: list[str] = []
        self._width = min(shutil.get_terminal_size((110, 24)).columns, 120)
        logger.info(title)

    def say(self, label: str, *sentences: str) -> None:
        """What was found, each sentence on lines of its own."""
        self._lines("  ", label, sentences)

    def problem(self, label: str, sentence: str) -> None:
        """What would spoil the run; the preflight ends with exit code 2."""
        self.problems.append(sentence)
        self._lines("! ", label, (sentence,))

    def _lines(self, mark: str, label: str, sentences: tuple[str, ...]) -> None:
        for number, sentence in enumerate(sentences):
            head = f"{mark}{'' if number else label:16s}"
            for line in textwrap.wrap(sentence, max(self._width - len(head), 40), break_long_words=False,
                                      break_on_hyphens=False):
                logger.info(head + line)
                head = " " * len(head)

    def end(self) -> None:
        """Raise UserError with the first problem, or say that all is well."""
        if self.problems:
            more = len(self.problems) - 1
            raise UserError(self.problems[0] + (f" ({more} more above, marked with !)" if more else ""))
        logger.info("All is well; the same command without --dry_run starts it.")


def memory_words(peak: int, total: int, on_cpu: bool) -> str:
    """What a process took at most, of which memory."""
    where = "of main memory per process" if on_cpu else "on a device"
    return f"at most {size_words(peak)} of {size_words(total)} {where}"


# ------------------------------------------------------------------------------------------------------------ disk

def existing_folder(output_dir: str | os.PathLike) -> Path:
    """The folder in which `output_dir` is, or would be made: itself or its nearest ancestor that exists."""
    path = Path(output_dir).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_writable(output_dir: str) -> None:
    """Raise UserError when nothing can be written where `output_dir` is to be; a nameless file leaves no trace."""
    folder = existing_folder(output_dir)
    try:
        if not folder.is_dir():
            raise NotADirectoryError(0, "it is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "Permission denied")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"hornet")
            file.flush()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used: nothing can be written in {folder} "
                        f"({error.strerror}); choose another.") from error


def free_space(output_dir: str | os.PathLike) -> int:
    """Bytes that a run can have for its checkpoints in `output_dir`, including those of its own there."""
    own = sum(path.stat().st_size for path in Path(output_dir).glob("*.pth"))
    return shutil.disk_usage(existing_folder(output_dir)).free + own


@contextmanager
def trial_folder(output_dir: str) -> Iterator[str]:
    """A temporary folder for checkpoints on the run's disk, locked while it is in use so that nobody sweeps it."""
    sweep_trials(output_dir)
    with tempfile.TemporaryDirectory(prefix=_TRIAL, dir=_trial_place(output_dir)) as folder:
        owned = RunFolder(folder)
        owned.lock()
        try:
            yield folder
        finally:
            owned.release()


def sweep_trials(output_dir: str | os.PathLike) -> None:
    """Remove the trial folders that killed dry runs have left where those for `output_dir` are made."""
    for folder in _trial_place(output_dir).glob(f"{_TRIAL}*"):
        try:
            with open(folder / "owner.json", "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except OSError:  # one under way holds the lock; others have been made just now, or are another person's
            continue


def _trial_place(output_dir: str | os.PathLike) -> Path:
    """Above the run's own folder, which a trial must not change, or the system's place where that cannot be written."""
    above = existing_folder(str(Path(output_dir).absolute().parent)) if output_dir else Path(tempfile.gettempdir())
    return above if os.access(above, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def shared_memory_problem(options: Any, local_world_size: int, folder: str = "/dev/shm") -> str | None:
    """A sentence when the batches that the loaders of one node hold ready do not fit into its shared memory."""
    if not options.num_workers or not os.path.isdir(folder):
        return None
    needed, free = shared_memory_needed(options, local_world_size), shutil.disk_usage(folder).free
    if needed <= free:
        return None
    fits = int(options.num_workers * free / needed)
    return (f"{plural(options.num_workers, 'worker')} x {plural(local_world_size, 'process')} hold up to "
            f"{size_words(needed)} of batches in shared memory, and {folder} has {size_words(free)} free: a bus error "
            f"would kill the loader; use --num_workers {fits}, or give the container more (docker run "
            f"--shm-size={needed // 10 ** 9 + 1}g).")


def shared_memory_needed(options: Any, local_world_size: int) -> int:
    """Bytes: each worker has two batches ready and one in the making, uint8, those of evaluation 1.5 times as large."""
    batch = int(1.5 * options.batch_size) * 3 * options.input_size ** 2
    return local_world_size * (3 * options.num_workers + 1) * batch


# ----------------------------------------------------------------------------------------------------------- speed

@dataclass(frozen=True)
class Pace:
    """Speeds of one process. compute: pictures per second without waiting for data · picture_seconds: to load one on
    one CPU · waited: measured share of waiting, 0 to 1 · memory_share: of the device's memory, None where unknown."""
    compute: float
    picture_seconds: float
    workers: int
    cpus: int
    waited: float = 0.0
    update_freq: int = 1
    memory_share: float | None = None
    could_use_amp: bool = False

    @property
    def loading(self) -> float:
        """Pictures per second that the loader gives; a short trial lives on what was loaded ahead and cannot see it."""
        return max(1, min(self.workers, self.cpus)) / max(self.picture_seconds, 1e-9)

    @property
    def waiting(self) -> float:
        """Share of the time that training will wait for data, 0 to 1."""
        if self.workers == 0:
            return self.waited
        return max(self.waited, 1 - self.loading / self.compute)

    @property
    def rate(self) -> float:
        """Pictures per second to expect."""
        return self.compute * (1 - self.waiting)

    def advice(self) -> str:
        """The one change that would help most."""
        if self.waiting > _WAIT_SHARE:
            return f"the change that would help most: {remedy(self.workers, self.cpus)}"
        if self.could_use_amp:
            return "the change that would help most: --use_amp true (mixed precision)"
        if self.memory_share is not None and self.memory_share < 0.45 and self.update_freq > 1:
            return "the change that would help most: twice the --batch_size with half the --update_freq (it fits)"
        return "loading keeps up; no option would change much"


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Bytes at the peak so far and in all: of the device, or for the CPU of this process and of the machine."""
    if device.type in ("cuda", "xpu"):
        backend = torch.get_device_module(device)
        return backend.max_memory_allocated(device), backend.get_device_properties(device).total_memory
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def cpus_per_process(local_world_size: int) -> int:
    """CPUs that each process of this node may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // local_world_size)


def recipe_hours(rate: float, pictures: int, evaluation_rate: float | None, evaluated: int, epochs: int) -> str:
    """Words for the time of `epochs` epochs of `pictures` training and `evaluated` validation pictures (per second)."""
    training = epochs * pictures / rate
    evaluation = epochs * evaluated / evaluation_rate if evaluation_rate else 0.0
    return f"{epochs} epochs would take {duration(training + evaluation)}, {duration(evaluation)} of it evaluating"


# ------------------------------------------------------------------------------------------------------- processes

def process_problems(process: Any, code_version: str) -> list[str]:
    """Sentences about versions that differ, clocks that differ, and an all-reduce that gives another sum."""
    if process.world_size == 1:
        return []
    found = environment()
    mine = {"code": code_version, "python": found["python"], "cuda": found["cuda"], **found["packages"]}
    process.barrier()
    gathered = process.all_gather_object((process.node_name, time.time(), mine))
    problems = []
    for name in mine:
        values = [versions.get(name) for _, _, versions in gathered]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            problems.append(f"{name} is {values[0]} on rank 0 ({gathered[0][0]}) and {values[other]} on rank {other} "
                            f"({gathered[other][0]}): use one environment on all nodes.")
    clocks = [clock for _, clock, _ in gathered]
    if max(clocks) - min(clocks) > _CLOCKS_APART:
        late, early = (gathered[clocks.index(pick(clocks))][0] for pick in (max, min))
        apart = max(clocks) - min(clocks)
        problems.append(f"the clocks of {late} and {early} are {apart:.0f} s apart: set them (NTP).")
    return problems + _all_reduce_problems(process)


def _all_reduce_problems(process: Any) -> list[str]:
    size = process.world_size
    ramp = torch.arange(4096, dtype=torch.float32, device=process.device)
    total = process.all_reduce_(ramp + process.rank, "sum")
    right = torch.equal(total, ramp * size + size * (size - 1) // 2)
    wrong = [rank for rank, fine in enumerate(process.all_gather_object(right)) if not fine]
    sentence = f"all-reduce gives a wrong sum on ranks {wrong}: the network or the devices' driver is at fault."
    return [sentence] if wrong else []


def start_warnings(options: Any, process: Any, code_version: str, sample: Any) -> list[str]:
    """The short form for every start: sentences about what is wrong, none when all is well; every rank must call it.

    sample: rank 0's `datasets.check.SampleCheck`, None on other ranks.
    """
    memory = process.all_gather_object(shared_memory_problem(options, process.local_world_size))
    said = [] if sample is None else sample.sentences()[1:]
    if sample is not None and 2 * len(sample.tiny) <= sample.looked:  # a few small pictures are in every data set
        said = [sentence for sentence in said if sentence.startswith("unreadable")]
    return said + [sentence for sentence in memory if sentence][:1] + process_problems(process, code_version)


# ------------------------------------------------------------------------------------------------ states and scores

def first_difference(one: Any, other: Any, name: str = "state") -> str | None:
    """The name of the first entry in which two states of tensors and plain values differ in a bit; None: equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bits(one), _bits(other))
        return None if same else name
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return name
        return next((d for key in one if (d := first_difference(one[key], other[key], f"{name}.{key}"))), None)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other))
        return next((d for i, pair in pairs if (d := first_difference(*pair, f"{name}.{i}"))), None)
    return None if repr(one) == repr(other) else name  # repr: not-a-number equals itself


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


LOW_SCORE, ENOUGH_PICTURES, ENOUGH_CLASSES = 0.02, 100, 100


def low_score(hits: int, pictures: int, classes: int, weights: str = "model") -> str | None:
    """A sentence when trained weights score below 2 % where even a poor network scores more; None otherwise.

    Nothing is said on less than 100 classes (chance is above 1 %) or 100 pictures.
    """
    if classes < ENOUGH_CLASSES or pictures < ENOUGH_PICTURES or hits >= LOW_SCORE * pictures:
        return None
    other = "model" if weights == "model_ema" else "ema"
    return (f"the loaded weights name only {hits} of {pictures} pictures rightly ({100 * hits / pictures:.1f} %, "
            f"chance is {100 / classes:.2g} %), though their head has these {classes} classes; likely causes: another "
            "order of the classes than the data's folders have, another normalisation "
            f"(--imagenet_default_mean_and_std), or the wrong entry of the file (try --weights {other}).")


def digest(model: torch.nn.Module) -> str:
    """A hash of a network's weights, to compare them between processes."""
    found = hashlib.blake2b(digest_size=12)
    for tensor in model.state_dict().values():
        found.update(_bits(tensor).numpy())
    return found.hexdigest()
