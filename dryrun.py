"""`--dry_run true`: everything a run or an evaluation needs, tried for real and left without a trace.

A few real updates, one batch of evaluation, save and reload, memory, speed and disk, in one table that comes
line by line. Exit code 0: all is well; 2: one sentence names what is wrong.
"""
import hashlib
import os
import resource
import shutil
import sys
import tempfile
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

import engine
from common.errors import UserError
from common.log import logger
from common.outcome import ExitCode
from common.text import duration, file_size, plural
from config.options import Options
from config.parse import Resolved
from datasets.build import check_sample
from datasets.dataset import ImageDataset
from datasets.device import EvalPrepare
from evaluation import SAMPLED, low_score, prepare_evaluation, score_sample
from launch.process import Process
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from optim.ema import half_life_warning
from optim.update import UpdateStats
from plan import Plan, build_model, plan_run
from run.checkpoint import Checkpoints, Loaded, find_checkpoint, snapshot, state_bytes
from run.folder import RunFolder
from run.log import remedy
from run.start import (
    check_writable,
    code_version,
    cpus_per_process,
    existing_folder,
    memory_problems,
    process_problems,
)
from run.state import finished
from training import Trainer

_UPDATES, _SECONDS, _WAIT_SHARE = 8, 20.0, 0.10
_FOR_A_CPU = 5_000_000  # parameters; no update of a larger network is tried on a CPU, where it takes minutes


def check(resolved: Resolved, process: Process, watchdog: Watchdog) -> ExitCode:
    """Try what `resolved` asks for. Raises UserError for what is wrong, on every rank."""
    options = resolved.options
    run = DryRun(process, Trial(process, watchdog))
    try:
        if options.output_dir:
            process.on_rank_zero(lambda: check_writable("--output_dir", options.output_dir))
        run.row("processes", f"{process.world_size} on {process.device.type}, code {code_version()}")
        run.problems("processes", process_problems(process))
        run.evaluation(resolved) if options.eval else run.training(resolved)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory is too small for --batch_size {options.batch_size}: use "
                        f"--batch_size {max(1, options.batch_size // 2)} with --update_freq "
                        f"{2 * options.update_freq} (the same global batch), --use_amp true or "
                        "--grad_checkpointing true.", code="memory") from error
    process.on_rank_zero(run.end)
    return ExitCode.DONE


class Trial(engine.Observer):
    """Stops the engine after a few updates and keeps its figures; the watchdog gets its heartbeats."""

    def __init__(self, process: Process, watchdog: Watchdog):
        self.process, self.watchdog = process, watchdog
        self.start, self.updates = time.perf_counter(), 0
        self.seen: list[tuple[float, float, float]] = []  # seconds, those of them waiting for data, loss
        self.nonfinite: list[dict] = []

    def on_phase(self, phase: str, update: int) -> None:
        self.watchdog.phase(phase, update)

    def after_update(self, update: int, stats: UpdateStats, sums: engine.SumsOverRanks) -> bool:
        """Enough updates, or enough time, on any rank."""
        self.updates += 1
        return self.process.any(self.updates >= _UPDATES or time.perf_counter() - self.start > _SECONDS)

    def on_progress(self, progress: engine.Progress) -> None:
        self.seen.append((progress.seconds, progress.data_wait * progress.seconds, progress.recent_loss))

    def on_nonfinite(self, record: dict) -> None:
        self.nonfinite.append(record)

    def pace(self, images: int) -> tuple[float, float]:
        """(images per second computed without waiting, share of waiting) at `images` per update of a process.

        The first update, which fills caches and starts workers, counts only where it is the only one.
        """
        first = self.seen[0] if len(self.seen) > 1 else (0.0, 0.0, 0.0)
        seconds, waited = (self.seen[-1][i] - first[i] for i in (0, 1))
        images *= max(len(self.seen) - 1, 1)
        return images / max(seconds - waited, 1e-9), waited / max(seconds, 1e-9)


class DryRun:
    """The parts of a dry run; each logs aligned rows as it goes: one where something hangs is seen."""

    def __init__(self, process: Process, trial: Trial):
        self.process, self.trial, self.found = process, trial, []
        self.on_cpu = process.device.type == "cpu"

    def row(self, label: str, *sentences: str, mark: str = "  ") -> None:
        """What was found, each sentence on lines of its own."""
        width = min(shutil.get_terminal_size((110, 24)).columns, 120) - 18
        for number, line in enumerate(line for text in sentences for line in textwrap.wrap(
                text, max(width, 40), break_long_words=False, break_on_hyphens=False)):
            logger.info("%s%-16s%s", "  " if number else mark, "" if number else label, line)

    def problems(self, label: str, sentences: list[str]) -> None:
        """What would spoil the run; the dry run ends with exit code 2."""
        self.found += sentences
        self.row(label, *sentences, mark="! ")

    def end(self) -> None:
        """Raise UserError with the first problem, or report that all is well."""
        if self.found:
            more = len(self.found) - 1
            more = f" ({more} more above, marked with !)" if more else ""
            raise UserError(self.found[0] + more, code="dry_run")
        logger.info("All is well; the same command without --dry_run starts it.")

    def training(self, resolved: Resolved) -> None:
        """Everything that a training does, in small."""
        options = resolved.options
        loaded = self.process.on_rank_zero(lambda: self._checkpoint(resolved))
        planned = plan_run(resolved, self.process, loaded.state if loaded else None)
        data = planned.data
        self.row("data", *data.notes)
        self.row("batch", planned.batch.equation, *planned.batch.notices)
        loading = self._images("train", data.train, options)
        self._images("val", data.val, options)
        self.problems("shared memory", memory_problems(options, self.process))
        with torch.device("meta"):
            size = sum(p.numel() for p in build_model(planned.options, data.num_classes).parameters())
        self.row("model", f"{size / 1e6:.2f} M parameters, {data.num_classes} classes")
        if self.on_cpu and size > _FOR_A_CPU:
            self.row("updates", f"none: nothing more is tried on a CPU above {_FOR_A_CPU / 1e6:g} M of them")
            self._disk(options, 4 * size * (4 if options.model_ema else 3))
        else:
            self._disk(options, self._updates(planned, loaded, loading))

    def evaluation(self, resolved: Resolved) -> None:
        """Load the weights and score a sample of the images."""
        prepared, seconds = prepare_evaluation(resolved, self.process, self.trial), 0.0
        data, images = prepared.data, prepared.evaluation.expected or 0
        self.row("data", *data.notes)
        self._images("val", data.val, prepared.options)
        self.problems("shared memory", memory_problems(prepared.options, self.process))
        for candidate in prepared.candidates:
            size = sum(p.numel() for p in candidate.network.parameters())
            count = 2 * self.process.world_size if self.on_cpu and size > _FOR_A_CPU else SAMPLED
            networks = [("", candidate.network)]
            found = score_sample(networks, data, prepared.options, prepared.evaluation, count)[0]
            seconds += found.seconds * images / found.images
            strange = low_score(found.hits1, found.images - found.bad, data.num_classes, candidate.weights)
            self.row("weights", f"{candidate.path} ({candidate.weights}): {found.hits1} of {found.images} "
                     f"sampled images correct, mean loss {found.loss:.3f}",
                     *([f"warning: {strange}"] if strange else []))
        self._memory()
        self.row("whole set", f"{images} images would take {duration(seconds)}")

    # ----------------------------------------------------------------------------------------- single rows

    def _checkpoint(self, resolved: Resolved) -> Loaded | None:
        """The checkpoint a start would resume; its folder is only read."""
        options = resolved.options
        loaded = find_checkpoint(resolved, RunFolder(options.output_dir) if options.output_dir else None)
        if loaded is None:
            return None
        ends = finished(loaded.state, options.epochs)
        self.row("checkpoint", f"a start would {'only evaluate' if ends else 'resume'} {loaded.path}")
        return None if ends else loaded

    def _images(self, part: str, dataset: ImageDataset | None, options: Options) -> float:
        """Load some images on rank 0; every rank gets the seconds that one takes there."""
        found = check_sample(dataset) if dataset is not None and self.process.is_main else None
        if found is not None:
            seconds, unreadable = found
            self.row(f"{part} images", f"{1000 * seconds:.1f} ms to load one, {len(unreadable)} of a sample "
                     "unreadable", *unreadable[:1])
            refused = unreadable[:1] if options.eval and not options.allow_bad_images else []
            self.problems(f"{part} images", [
                f"{sentence}, which ends an evaluation: fix it, or count unreadable images as incorrect with "
                "--allow_bad_images true." for sentence in refused])
        return self.process.broadcast_object(found[0] if found else 0.0)

    def _updates(self, planned: Plan, loaded: Loaded | None, loading: float) -> int:
        """Real updates, evaluation, save and reload; returns the bytes of a checkpoint.

        The temporary folder is on the run's disk, but above its own folder, which a trial must not change.
        """
        process, trial, options = self.process, self.trial, planned.options
        above = existing_folder(Path(options.output_dir).absolute().parent) if options.output_dir else None
        above = above if above and os.access(above, os.W_OK) else None
        temporary = tempfile.TemporaryDirectory(prefix=".dry-run-", dir=above) if process.is_main else None
        with temporary or nullcontext() as folder:
            checkpoints = Checkpoints(folder, background=False) if folder else None
            aside = replace(planned, options=replace(options, log_dir=None, enable_wandb=False, print_freq=1))
            trainer = Trainer(aside, process, stop=StopRequest(), watchdog=trial.watchdog,
                              checkpoints=checkpoints, state=loaded.state if loaded else None)
            try:
                at, trial.start = trainer.position, time.perf_counter()
                progress = engine.train_one_epoch(trainer.loop, trial, epoch=at.begun, sums=at.sums,
                                                  first_update=at.update_in_epoch)
                at.update, at.sums = progress.next_update, None
                at.epoch = progress.next_update // planned.updates_per_epoch - 1
                self._figures(planned, progress)
                digests = process.all_gather_object(digest(trainer.model.state_dict()))
                self.problems("updates", [
                    f"the weights of rank {rank} differ from those of rank 0: the network or a device fails."
                    for rank, other in enumerate(digests) if other != digests[0]])
                evaluated = 0.0 if options.disable_eval else self._evaluate_some(planned, trainer)
                self._speed(planned, loading, evaluated)
                trial.on_phase("saving", at.update)
                process.on_rank_zero(lambda: self._save_and_reload(trainer, checkpoints))
                return state_bytes(trainer.state_dict())
            finally:
                trainer.close()

    def _figures(self, planned: Plan, progress: engine.Progress) -> None:
        losses = " to ".join(f"{loss:.4g}" for _, _, loss in self.trial.seen[:1] + self.trial.seen[1:][-1:])
        self.row("updates", f"{plural(self.trial.updates, 'update')} of {planned.batch.global_batch} images: "
                 f"loss {losses}, gradient norm {progress.grad_norm:.3g}, lr {progress.lr:.3g}")
        self.problems("updates", [f"the loss or gradient of update {record['update']} is not finite: lower "
                                  "--lr, lengthen --warmup_epochs, or train without --use_amp."
                                  for record in self.trial.nonfinite[:1]])

    def _evaluate_some(self, planned: Plan, trainer: Trainer) -> float:
        """Evaluate one batch per process; images per second of all of them."""
        evaluation = engine.Evaluation(EvalPrepare(planned.options, self.process.device), self.process.device,
                                       observer=self.trial, process=self.process)
        count = max(1, int(1.5 * planned.options.batch_size)) * self.process.world_size
        found = score_sample([("", trainer.model)], planned.data, planned.options, evaluation, count)[0]
        return found.images / found.seconds

    def _save_and_reload(self, trainer: Trainer, checkpoints: Checkpoints | None) -> None:
        """Save, read the file, spoil the weights and restore them: all must come back bit for bit."""
        assert checkpoints is not None
        before, started = snapshot(trainer.state_dict()), time.perf_counter()
        checkpoints.save(before, epoch=trainer.position.begun, update=trainer.position.update, wait=True)
        saved, loaded = time.perf_counter() - started, checkpoints.newest_valid()
        if loaded is None:
            self.problems("save, reload", checkpoints.failures())
            return
        with torch.no_grad():
            for part in filter(None, (trainer.model, trainer.ema)):
                for tensor in part.state_dict().values():
                    tensor.zero_()
            trainer.loop.update.optimizer.state.clear()
        trainer.load_state_dict(loaded.state)
        after = snapshot(trainer.state_dict())
        self.row("save, reload", f"{file_size(state_bytes(before))} in {saved:.2f} s; read and restored")
        self.problems("save, reload", [f"{name} differs after saving and loading: please report this."
                                       for name in before if digest(before[name]) != digest(after[name])])

    def _memory(self) -> None:
        peak, total = max(self.process.all_gather_object(peak_memory(self.process.device)))
        where = "main memory per process" if self.on_cpu else "a device's memory"
        self.row("memory", f"at most {file_size(peak)} of {file_size(total)} of {where}")

    def _speed(self, planned: Plan, loading: float, evaluated: float) -> None:
        """Memory, speed, waiting for data with the change that would help most, the time of the whole recipe.

        evaluated: images per second, 0 without evaluation.
        """
        options, process, world = planned.options, self.process, self.process.world_size
        self._memory()
        compute, waited = self.trial.pace(options.batch_size * options.update_freq)
        slowest = process.all_reduce_(torch.tensor([compute, -waited], dtype=torch.float64), "min").tolist()
        cpus, compute, waits = cpus_per_process(process.local_world_size), slowest[0], -slowest[1]
        if options.num_workers:  # a short trial lives on what was loaded ahead
            loaded = max(1, min(options.num_workers, cpus)) / max(loading, 1e-9)
            waits = max(waits, 1 - loaded / compute)
        rate, roughly = compute * (1 - waits) * world, "roughly, from so little: " * (self.trial.updates < 3)
        self.row("speed", f"{roughly}{rate:,.1f} img/s, the network alone {compute * world:,.1f}")
        help_most = remedy(options.num_workers, cpus) if waits > _WAIT_SHARE else (
            "--use_amp true (mixed precision)" if not self.on_cpu and not options.use_amp else "none")
        self.row("data waiting", f"{100 * waits:.0f} % of the time; what would help most: {help_most}")
        training = options.epochs * planned.updates_per_epoch * planned.batch.global_batch / rate
        images = len(planned.data.val) if planned.data.val and evaluated else 0
        evaluation = options.epochs * images / (evaluated or 1)
        self.row("whole recipe", f"{roughly}{plural(options.epochs, 'epoch')} would take "
                 f"{duration(training + evaluation)}, {duration(evaluation)} of it evaluating")
        warning = half_life_warning(options.model_ema_decay, options.epochs * planned.updates_per_epoch)
        if options.model_ema and warning:
            self.row("EMA", warning)

    def _disk(self, options: Options, state_size: int) -> None:
        if not options.output_dir or not options.save_ckpt:
            self.row("disk", "nothing would be saved: give --output_dir (and leave --save_ckpt true)")
        elif self.process.is_main:
            checkpoints = Checkpoints(options.output_dir, keep=options.save_ckpt_num)
            text, enough = checkpoints.disk_estimate(state_size, options.epochs)
            self.row("disk", text)
            more = f"{text}: free some, or keep fewer with --save_ckpt_num."
            self.problems("disk", [] if enough else [more])


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Bytes at the peak and in all: of the device, or for the CPU of this process and of the machine."""
    if device.type in ("cuda", "xpu"):
        backend = torch.get_device_module(device)
        return backend.max_memory_allocated(device), backend.get_device_properties(device).total_memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def digest(state: object) -> str:
    """A hash of every bit of a state of tensors and plain values."""
    found = hashlib.blake2b(digest_size=12)
    for leaf in tree_leaves(state):
        found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                     if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return found.hexdigest()
