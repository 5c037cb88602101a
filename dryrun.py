"""`--dry_run true`: everything a run or an evaluation needs, tried for real and left without a trace.

A few real updates, one batch of evaluation, save and reload, memory, speed and disk, in one table that comes line by
line. Exit code 0: all is well; 2: one sentence names what is wrong.
"""
import hashlib
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname

import torch

import engine
from common.errors import UserError
from common.log import logger
from common.outcome import ExitCode
from common.text import duration, file_size, plural
from config.options import Options
from config.parse import Resolved
from datasets.build import SampleCheck, check_sample
from datasets.dataset import ImageDataset
from datasets.device import EvalPrepare
from evaluation import SAMPLED, low_score, prepare_evaluation, score_sample
from launch.process import Process
from launch.stop import StopRequest, alive
from launch.watchdog import Watchdog
from optim.ema import half_life_warning
from optim.update import UpdateStats
from run.checkpoint import Checkpoints, Loaded, snapshot, state_bytes
from run.folder import RunFolder
from run.log import remedy
from run.start import (cpus_per_process, existing_folder, free_space, process_problems, shared_memory_needed,
                       shared_memory_problem)
from run.state import finished
from training import Planned, Trainer, build_model, code_version, find_checkpoint, plan_run

_UPDATES, _SECONDS, _WAIT_SHARE = 8, 20.0, 0.10
# On a CPU, networks above the first size are tried with one small update, and above the second not at all.
_ONE_UPDATE, _NO_UPDATE = 5_000_000, 30_000_000


def check(resolved: Resolved, process: Process, watchdog: Watchdog) -> ExitCode:
    """Try what `resolved` asks for. Raises UserError for what is wrong, on every rank."""
    options, device = resolved.options, process.device
    place = torch.get_device_module(device).get_device_name() if device.type in ("cuda", "xpu") else device
    table = Table(f"Trying out the {'evaluation' if options.eval else 'training'} of {options.model} on {place}")
    if options.output_dir:
        process.on_rank_zero(lambda: check_writable(options.output_dir))
    run = DryRun(process, table, Trial(process, watchdog))
    try:
        run.processes()
        run.evaluation(resolved) if options.eval else run.training(resolved)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory is too small for --batch_size {options.batch_size}: use --batch_size "
                        f"{max(1, options.batch_size // 2)} with --update_freq {2 * options.update_freq} (the same "
                        "global batch), --use_amp true or --grad_checkpointing true.", code="memory") from error
    process.on_rank_zero(table.end)
    return ExitCode.DONE


class Table:
    """Aligned lines on the console as they are found, so that the one where something hangs is seen too."""

    def __init__(self, title: str):
        self.problems: list[str] = []
        self._width = min(shutil.get_terminal_size((110, 24)).columns, 120)
        logger.info(title)

    def row(self, label: str, *sentences: str, problem: bool = False) -> None:
        """What was found. A problem would spoil the run; the dry run ends with exit code 2."""
        self.problems += sentences if problem else ()
        head = f"{'! ' if problem else '  '}{label:16s}"
        for sentence in sentences:
            for line in textwrap.wrap(sentence, max(self._width - len(head), 40), break_long_words=False,
                                      break_on_hyphens=False):
                logger.info(head + line)
                head = " " * len(head)

    def end(self) -> None:
        """Raise UserError with the first problem, or report that all is well."""
        if self.problems:
            more = len(self.problems) - 1
            raise UserError(self.problems[0] + (f" ({more} more above, marked with !)" if more else ""), code="dry_run")
        logger.info("All is well; the same command without --dry_run starts it.")


class Trial(engine.Observer):
    """Stops the engine after a few updates, and keeps their times; the watchdog gets its heartbeats."""

    def __init__(self, process: Process, watchdog: Watchdog):
        self.process, self.watchdog, self.updates = process, watchdog, _UPDATES
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.losses: list[float] = []
        self.nonfinite: list[dict] = []
        self.start = self._asked = time.perf_counter()

    def on_phase(self, phase: str, update: int) -> None:
        """Count the time from asking for data to the forward pass as waiting."""
        self.watchdog.phase(phase, update)
        if phase == "data":
            self._asked = time.perf_counter()
            self.waits += [0.0] * (len(self.ends) + 1 - len(self.waits))
        elif phase == "forward":
            self.waits[-1] += time.perf_counter() - self._asked

    def after_update(self, update: int, stats: UpdateStats, sums: engine.SumsOverRanks) -> bool:
        """Enough updates, or enough time, on any rank."""
        self.losses.append(stats.loss.item())  # waits for the device, so that the time is that of the whole update
        self.ends.append(time.perf_counter())
        return self.process.any(len(self.ends) >= self.updates or self.ends[-1] - self.start > _SECONDS)

    def on_nonfinite(self, record: dict) -> None:
        self.nonfinite.append(record)

    def pace(self, images: int) -> tuple[float, float]:
        """(images per second computed without waiting, share of waiting) at `images` per update of this process.

        The first update, which fills caches and starts workers, counts only where it is the only one.
        """
        first = 1 if len(self.ends) > 1 else 0
        seconds = self.ends[-1] - (self.ends[0] if first else self.start)
        waited = min(sum(self.waits[first:]), seconds)
        return (len(self.ends) - first) * images / max(seconds - waited, 1e-9), waited / max(seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What the updates showed. evaluation: images per second of all processes, None without evaluation."""
    state_size: int
    memory: tuple[int, int]
    evaluation: float | None


class DryRun:
    """The parts of a dry run; each writes its rows into the table."""

    def __init__(self, process: Process, table: Table, observer: Trial):
        self.process, self.table, self.observer = process, table, observer
        self.on_cpu = process.device.type == "cpu"

    def processes(self) -> None:
        """Whether the processes agree and add up."""
        process, started, problems = self.process, time.perf_counter(), process_problems(self.process, code_version())
        nodes = len(set(process.all_gather_object(process.node_name)))
        if problems:
            self.table.row("processes", *problems, problem=True)
        elif process.world_size == 1:
            self.table.row("processes", f"one, on {process.node_name}")
        else:
            devices = "they share the CPU" if self.on_cpu else "each with a device of its own"
            self.table.row("processes", f"{process.world_size} on {plural(nodes, 'node')}, {devices}; versions and clocks "
                           f"agree, all-reduce adds up ({1000 * (time.perf_counter() - started):.0f} ms for all of it)")

    def training(self, resolved: Resolved) -> None:
        """Everything that a training does, in small."""
        options, table = resolved.options, self.table
        loaded = self.process.on_rank_zero(lambda: self._checkpoint(resolved))
        planned = plan_run(resolved, self.process, loaded.state if loaded else None)
        table.row("data", *planned.data.notes)
        table.row("batch", planned.batch.equation, *planned.batch.notices)
        sample = self._images({"train": planned.data.train, "val": planned.data.val}, options)
        self._shared_memory(options)
        with torch.device("meta"):
            size = sum(p.numel() for p in build_model(planned.options, planned.data.num_classes).parameters())
        if self.on_cpu and size > _NO_UPDATE:
            table.row("model", f"{size / 1e6:.1f} M parameters, built without memory for them: above "
                      f"{_NO_UPDATE / 1e6:.0f} M a CPU tries no update and no checkpoint")
            self._disk(options, 4 * size * (4 if options.model_ema else 3))
            return
        table.row("model", f"{size / 1e6:.2f} M parameters, {planned.data.num_classes} classes")
        small = planned
        if self.on_cpu and size > _ONE_UPDATE:
            self.observer.updates, loaded = 1, None
            few = replace(options, batch_size=2, update_freq=1, global_batch=None)
            small = plan_run(replace(resolved, options=few), self.process, None, planned.data)
        tried = self._updates(small, loaded)
        self._speed(planned, small, tried, sample)
        self._disk(options, tried.state_size)

    def evaluation(self, resolved: Resolved) -> None:
        """Load the weights and score a sample of the images."""
        prepared = prepare_evaluation(resolved, self.process, self.observer)
        options, data, world, seconds = prepared.options, prepared.data, self.process.world_size, 0.0
        self.table.row("data", *data.notes)
        self._images({"val": data.val}, options)
        self._shared_memory(options)
        size = sum(p.numel() for p in prepared.candidates[0].network.parameters())
        quick = not self.on_cpu or size <= _ONE_UPDATE
        few, count = (options, SAMPLED) if quick else (replace(options, batch_size=2), 2 * world)
        for candidate in prepared.candidates:
            found = score_sample([("", candidate.network)], data, few, prepared.evaluation, count)[0]
            seconds += found.seconds * (prepared.evaluation.expected or 0) / found.images
            self.table.row("weights", f"{candidate.path} ({candidate.weights}): {found.hits1} of {found.images} sampled "
                           f"images correct, mean loss {found.loss:.3f}")
            strange = low_score(found.hits1, found.images - found.bad, data.num_classes, candidate.weights)
            if strange and not prepared.evaluation.columns:
                self.table.row("", f"warning: {strange}")
        self._memory(max(self.process.all_gather_object(peak_memory(self.process.device))))
        self.table.row("whole set", f"{prepared.evaluation.expected} images would take {duration(seconds)}")

    # ---------------------------------------------------------------------------------------------- single rows

    def _checkpoint(self, resolved: Resolved) -> Loaded | None:
        """The checkpoint a start would resume; its folder is only read."""
        options = resolved.options
        loaded = find_checkpoint(resolved, RunFolder(options.output_dir) if options.output_dir else None)
        ends = loaded is not None and finished(loaded.state, options.epochs)
        if loaded is not None:
            self.table.row("checkpoint", f"{loaded.path} ends a run of {plural(options.epochs, 'epoch')}: a start would "
                           "only evaluate it" if ends else f"a start would resume {loaded.path}")
        return None if ends else loaded

    def _images(self, parts: Mapping[str, ImageDataset | None], options: Options) -> SampleCheck:
        """Look at a sample of each part on rank 0; returns that of the first part there is."""
        found: list[SampleCheck] = []
        for name, dataset in parts.items():
            if dataset is not None and self.process.is_main:
                found.append(check_sample(dataset))
                self.table.row(f"{name} images", *found[-1].sentences())
                if found[-1].unreadable and options.eval and not options.allow_bad_images:
                    path, reason = found[-1].unreadable[0]
                    self.table.row(f"{name} images", f"{path} cannot be read ({reason}), which ends an evaluation: fix "
                                   "it, or count unreadable images as incorrect with --allow_bad_images true.",
                                   problem=True)
        return self.process.broadcast_object(found[0] if self.process.is_main else None)

    def _shared_memory(self, options: Options) -> None:
        local = self.process.local_world_size
        problems = list(filter(None, self.process.all_gather_object(shared_memory_problem(options, local))))
        if problems:
            self.table.row("shared memory", problems[0], problem=True)
        elif options.num_workers:
            self.table.row("shared memory", f"{plural(options.num_workers, 'worker')} x {plural(local, 'process')} need "
                           f"up to {file_size(shared_memory_needed(options, local))}, which is available")

    def _updates(self, planned: Planned, loaded: Loaded | None) -> Tried:
        """Real updates, evaluation, save, reload and comparison, in a temporary folder on the run's disk."""
        process, observer, options = self.process, self.observer, planned.options
        with trial_folder(options.output_dir) if process.is_main else nullcontext("") as folder:
            checkpoints = Checkpoints(folder, background=False) if process.is_main else None
            aside = replace(planned, options=replace(options, log_dir=None, enable_wandb=False))
            trainer = Trainer(aside, process, stop=StopRequest(), watchdog=observer.watchdog, checkpoints=checkpoints,
                              state=loaded.state if loaded else None)
            try:
                at, observer.start = trainer.position, time.perf_counter()
                progress = engine.train_one_epoch(trainer.loop, observer, epoch=at.begun, sums=at.sums,
                                                  first_update=at.update_in_epoch)
                at.update, at.sums = progress.next_update, None
                at.epoch = progress.next_update // planned.updates_per_epoch - 1
                self._figures(planned, progress)
                digests = process.all_gather_object(digest(trainer.model))
                if strange := [rank for rank, other in enumerate(digests) if other != digests[0]]:
                    self.table.row("updates", f"the weights of ranks {strange} differ from those of rank 0 after the same "
                                   "updates: the network or a device is at fault.", problem=True)
                memory = max(process.all_gather_object(peak_memory(process.device)))
                rate = None if options.disable_eval else self._evaluate_some(planned, trainer)
                observer.on_phase("saving", at.update)
                size = state_bytes(trainer.state_dict())
                if checkpoints is not None:
                    self._save_and_reload(trainer, checkpoints)
                process.barrier()
            finally:
                trainer.close()
        return Tried(state_size=size, memory=memory, evaluation=rate)

    def _figures(self, planned: Planned, progress: engine.Progress) -> None:
        losses, count = self.observer.losses, len(self.observer.ends)
        words = " to ".join(f"{loss:.4g}" for loss in losses[:1] + losses[1:][-1:])
        self.table.row("updates", f"{plural(count, 'update')} of {planned.batch.global_batch} images: loss {words}, "
                       f"gradient norm {progress.grad_norm:.3g}, lr {progress.lr:.3g}")
        for record in self.observer.nonfinite[:1]:
            where = f", first in {record['first_module']}" if record.get("first_module") else ""
            self.table.row("updates", f"the loss or gradient of update {record['update']} is not finite{where}: lower "
                           "--lr, lengthen --warmup_epochs, or train without --use_amp.", problem=True)

    def _evaluate_some(self, planned: Planned, trainer: Trainer) -> float:
        """Evaluate one batch per process; images per second of all of them."""
        options, process = planned.options, self.process
        evaluation = engine.Evaluation(EvalPrepare(options, process.device), process.device, observer=self.observer,
                                       process=process)
        networks = [("", trainer.model), *([("_ema", trainer.ema.module)] if trainer.ema and options.model_ema_eval else [])]
        count = max(1, int(1.5 * options.batch_size)) * process.world_size
        found = score_sample(networks, planned.data, options, evaluation, count)[0]
        return found.images / found.seconds

    def _save_and_reload(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        """Save, read the file, spoil the weights and restore them: all must come back bit for bit."""
        before, started = snapshot(trainer.state_dict()), time.perf_counter()
        checkpoints.save(before, epoch=trainer.position.begun, update=trainer.position.update, wait=True)
        saved = time.perf_counter() - started
        loaded = checkpoints.newest_valid()
        if loaded is None:
            self.table.row("save, reload", *checkpoints.failures(), problem=True)
            return
        difference = first_difference(before, {name: loaded.state[name] for name in before})
        if difference is None:
            with torch.no_grad():
                for part in filter(None, (trainer.model, trainer.ema)):
                    for tensor in part.state_dict().values():
                        tensor.zero_()
                trainer.loop.update.optimizer.state.clear()
            trainer.load_state_dict(loaded.state)
            difference = first_difference(before, snapshot(trainer.state_dict()))
        if difference:
            self.table.row("save, reload", f"{difference} differs after saving and loading: please report this.",
                           problem=True)
        else:
            self.table.row("save, reload", f"{file_size(state_bytes(before))} in {saved:.2f} s; read again and restored "
                           "bit for bit")

    def _memory(self, found: tuple[int, int]) -> None:
        self.table.row("memory", f"at most {file_size(found[0])} of {file_size(found[1])} "
                       + ("of main memory per process" if self.on_cpu else "on a device"))

    def _speed(self, planned: Planned, small: Planned, tried: Tried, sample: SampleCheck) -> None:
        """Memory, speed, waiting for data with the change that would help most, and the time of the whole recipe."""
        options, process, table = planned.options, self.process, self.table
        self._memory(tried.memory)
        compute, waited = self.observer.pace(small.batch.batch_size * small.batch.update_freq)
        slowest = process.all_reduce_(torch.tensor([compute, -waited], dtype=torch.float64), "min").tolist()
        cpus = cpus_per_process(process.local_world_size)
        waits = waiting(slowest[0], -slowest[1], sample.seconds, options.num_workers, cpus)
        network, roughly = slowest[0] * process.world_size, "roughly, from so little: " * (len(self.observer.ends) < 3)
        rate, share = network * (1 - waits), None if self.on_cpu else tried.memory[0] / tried.memory[1]
        table.row("speed", f"{roughly}{rate:,.1f} img/s, the network alone {network:,.1f}")
        table.row("data waiting", f"{100 * waits:.0f} % of the time; {advice(waits, options, cpus, share)}")
        training = options.epochs * planned.updates_per_epoch * planned.batch.global_batch / rate
        evaluated = len(planned.data.val) if planned.data.val else 0
        evaluation = options.epochs * evaluated / tried.evaluation if tried.evaluation else 0.0
        table.row("whole recipe", f"{roughly}{plural(options.epochs, 'epoch')} would take "
                  f"{duration(training + evaluation)}, {duration(evaluation)} of it evaluating")
        warning = half_life_warning(options.model_ema_decay, options.epochs * planned.updates_per_epoch)
        if options.model_ema and warning:
            table.row("EMA", warning)

    def _disk(self, options: Options, state_size: int) -> None:
        if not options.output_dir or not options.save_ckpt:
            self.table.row("disk", "nothing would be saved: give --output_dir (and leave --save_ckpt true) to keep "
                           "checkpoints")
        elif self.process.is_main:
            needed = Checkpoints(options.output_dir, keep=options.save_ckpt_num).disk_needed(state_size, options.epochs)
            free = free_space(options.output_dir)
            text = (f"checkpoints take {file_size(state_size)} each, up to {file_size(needed)} in all; "
                    f"{file_size(free)} are available in {options.output_dir}")
            short = needed >= free
            self.table.row("disk", text + ": free some, or keep fewer with --save_ckpt_num." * short, problem=short)


# --------------------------------------------------------------------------------------------------------- pure pieces

def waiting(compute: float, waited: float, image_seconds: float, workers: int, cpus: int) -> float:
    """Share of the time that training will wait for data, 0 to 1, for one process.

    compute: images per second without waiting · waited: measured share, which a short trial that lives on what was
    loaded ahead puts too low · image_seconds: to load one image on one CPU.
    """
    loading = max(1, min(workers, cpus)) / max(image_seconds, 1e-9)
    return max(waited, 1 - loading / compute) if workers else waited


def advice(waits: float, options: Options, cpus: int, memory_share: float | None) -> str:
    """The one change that would help most; `memory_share` is that of the device's memory, None for a CPU."""
    change = ""
    if waits > _WAIT_SHARE:
        change = remedy(options.num_workers, cpus)
    elif memory_share is not None and not options.use_amp:
        change = "--use_amp true (mixed precision)"
    elif memory_share is not None and memory_share < 0.45 and options.update_freq > 1:
        change = "twice the --batch_size with half the --update_freq (it fits)"
    return f"the change that would help most: {change}" if change else "no option would change much"


def check_writable(output_dir: str) -> None:
    """Raise UserError when nothing can be written where `output_dir` is to be; a nameless file leaves no trace."""
    folder = existing_folder(output_dir)
    try:
        if not folder.is_dir():
            raise NotADirectoryError(0, "it is not a folder")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"hornet")
            file.flush()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used: nothing can be written in {folder} "
                        f"({error.strerror}); choose another.", code="unusable_folder") from error


@contextmanager
def trial_folder(output_dir: str) -> Iterator[str]:
    """A temporary folder for checkpoints on the run's disk: above the run's own folder, which a trial must not change,
    or in the system's place where that cannot be written. What a killed dry run has left there is removed first."""
    above = existing_folder(Path(output_dir).absolute().parent) if output_dir else Path(tempfile.gettempdir())
    above, mine = above if os.access(above, os.W_OK | os.X_OK) else Path(tempfile.gettempdir()), f".dry-run-{gethostname()}-"
    for left in above.glob(f"{mine}*"):
        pid = left.name.removeprefix(mine).partition("-")[0]
        if pid.isdigit() and not alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)  # it may be another person's
    with tempfile.TemporaryDirectory(prefix=f"{mine}{os.getpid()}-", dir=above) as folder:
        yield folder


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Bytes at the peak so far and in all: of the device, or for the CPU of this process and of the machine."""
    if device.type in ("cuda", "xpu"):
        backend = torch.get_device_module(device)
        return backend.max_memory_allocated(device), backend.get_device_properties(device).total_memory
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def first_difference(one: object, other: object, name: str = "state") -> str | None:
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


def digest(model: torch.nn.Module) -> str:
    """A hash of a network's weights, to compare them between processes."""
    found = hashlib.blake2b(digest_size=12)
    for tensor in model.state_dict().values():
        found.update(_bits(tensor).numpy())
    return found.hexdigest()
