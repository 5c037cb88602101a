"""`--dry_run true`: everything a run or an evaluation needs, tried for real and left without a trace.

A few real updates, one batch of evaluation, save and reload, memory, speed and disk, in one table that comes
line by line. Exit code 0: all is well; 2: one sentence names what is wrong.
"""
import hashlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np
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
from datasets.dataset import ImageDataset, make_loader
from evaluation import Heartbeats, amp_dtype, prepare_evaluation
from launch.process import Process
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from optim.update import UpdateStats
from plan import Classification, Plan, find_data, plan_run
from run.checkpoint import Checkpoints, find_checkpoint, snapshot, state_bytes
from run.folder import RunFolder
from run.start import check_writable, code_version, cpus_per_process, existing_folder, process_problems
from run.state import State, finished
from training import FindData, MakeTask, Trainer

_UPDATES, _SECONDS, _WAIT_SHARE, _SAMPLED = 8, 20.0, 0.10, 500
_FOR_A_CPU = 5_000_000  # parameters; no update of a larger network is tried on a CPU, where it takes minutes


def check(resolved: Resolved, process: Process, watchdog: Watchdog, *, data: FindData = find_data,
          task: MakeTask = Classification) -> ExitCode:
    """Try what `resolved` asks for; `data` and `task` as in `training.train`. Raises UserError for what is
    wrong, on every rank."""
    run, folder = DryRun(process, watchdog), resolved.options.output_dir
    if resolved.options.eval and task is not Classification:
        raise UserError("--dry_run true tries trainings of this kind alone: leave --eval out, or evaluate.",
                        code="contradiction")
    if folder:
        process.on_rank_zero(lambda: check_writable("--output_dir", folder))
    run.row("processes", f"{process.world_size} on {process.device.type}, code {code_version()}")
    run.problems("processes", process_problems(process))
    run.evaluation(resolved) if resolved.options.eval else run.training(resolved, data, task)
    process.on_rank_zero(run.end)
    return ExitCode.DONE


class DryRun(Heartbeats):
    """The parts of a dry run; each logs aligned rows as it goes: one where something hangs is seen.

    As the engine's observer it ends a training after a few updates and keeps their figures.
    """

    def __init__(self, process: Process, watchdog: Watchdog):
        super().__init__(watchdog)
        self.process, self.on_cpu = process, process.device.type == "cpu"
        self.found: list[str] = []
        self.start, self.updates = time.perf_counter(), 0
        self.seen: list[tuple[float, float, float]] = []  # seconds, those of them waiting for data, loss
        self.nonfinite: list[dict] = []
        self.one_batch, self.evaluated = False, 0

    def after_update(self, update: int, stats: UpdateStats, sums: engine.SumsOverRanks) -> bool:
        """Enough updates, or enough time, on any rank."""
        self.updates += 1
        return self.process.any(self.updates >= _UPDATES or time.perf_counter() - self.start > _SECONDS)

    def on_progress(self, progress: engine.Progress) -> None:
        self.seen.append((progress.seconds, progress.figures["data_wait"] * progress.seconds,
                          progress.recent_loss))

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

    def row(self, label: str, *sentences: str, mark: str = "  ") -> None:
        """What was found, each sentence on a line of its own."""
        for text in sentences:
            logger.info("%s%-16s%s", mark, label, text)

    def problems(self, label: str, sentences: list[str]) -> None:
        """What would spoil the run; the dry run ends with exit code 2."""
        self.found += sentences
        self.row(label, *sentences, mark="! ")

    def end(self) -> None:
        """Raise UserError with the first problem, or report that all is well."""
        if self.found:
            more = f" ({len(self.found) - 1} more above, marked with !)" if self.found[1:] else ""
            raise UserError(self.found[0] + more, code="dry_run")
        logger.info("All is well; the same command without --dry_run starts it.")

    def training(self, resolved: Resolved, find: FindData, make: MakeTask) -> None:
        """Everything that a training does, in small."""
        options, state = resolved.options, None
        folder = RunFolder(options.output_dir) if options.output_dir else None
        loaded = self.process.on_rank_zero(lambda: find_checkpoint(resolved, folder))
        if loaded is not None:
            ends = finished(loaded.state, options.epochs)
            self.row("checkpoint", f"a start would {'find finished' if ends else 'resume'} {loaded.path}")
            state = None if ends else loaded.state
        planned = plan_run(resolved, self.process, state, data=find)
        options = replace(planned.options, log_dir=None, enable_wandb=False, track=None, print_freq=1)
        planned = replace(planned, options=options)
        data = planned.data
        self.row("data", *data.notes)
        self.row("batch", planned.batch.equation, *planned.batch.notices)
        loading = self._images("train", planned.train)[0]
        if data.val is not None:
            self._images("val", data.val)
        task = make(planned, self.process, state)
        size = sum(p.numel() for p in task.model.parameters())
        self.row("model", f"{size / 1e6:.2f} M parameters, {data.num_classes} classes")
        if self.on_cpu and size > _FOR_A_CPU:
            self.row("updates", f"none: nothing more is tried on a CPU above {_FOR_A_CPU / 1e6:g} M of them")
            self._disk(options, 4 * size * (4 if options.model_ema else 3))
        else:
            self._disk(options, self._updates(planned, task, state, loading))

    def evaluation(self, resolved: Resolved) -> None:
        """Load the weights and score a sample of each set of images."""
        for prepared in prepare_evaluation(resolved, self.process, self):
            candidates, data, options = prepared.candidates, prepared.data, prepared.options
            assert data.val is not None
            self.row("data", *data.notes)
            _, bad = self._images("val", data.val)
            self.problems("val images", [
                f"{sentence}, which ends an evaluation: fix it, or count unreadable images as incorrect with "
                "--allow_bad_images true." for sentence in bad[:0 if options.allow_bad_images else 1]])
            large = sum(p.numel() for p in candidates[0].network.parameters()) > _FOR_A_CPU
            count = 2 * self.process.world_size if self.on_cpu and large else _SAMPLED
            chosen = np.unique(np.linspace(0, len(data.val) - 1, count).astype(int)).tolist()
            own = chosen[self.process.rank::self.process.world_size]
            size = max(1, int(1.5 * options.batch_size))
            batches = [own[i:i + size] for i in range(0, len(own), size)]
            with closing(make_loader(data.val, options, batches)) as loader:
                found = engine.evaluate([(c.weights, c.network) for c in candidates], loader,
                                        replace(prepared.evaluation, expected=None, outputs=False))
            for candidate, each in zip(candidates, found):
                self.row("weights", f"{candidate.path} ({candidate.weights}): {each.hits1} of {each.images} "
                         f"sampled images correct, mean loss {each.loss:.3f}")
            whole = found[0].seconds * len(data.val) / found[0].images
            self.row("whole set", f"{len(data.val)} images would take {duration(whole)}")
        self._memory()

    # ----------------------------------------------------------------------------------------- single rows

    def _images(self, part: str, dataset: ImageDataset) -> tuple[float, list[str]]:
        """Seconds to load one image, and a sentence for each unreadable one of a sample."""
        seconds, bad = self.process.on_rank_zero(lambda: check_sample(dataset))
        self.row(f"{part} images", f"{1000 * seconds:.1f} ms to load one, {len(bad)} of a sample unreadable",
                 *bad[:1])
        return seconds, bad

    def leaves_evaluation(self) -> bool:
        """After the first batch, where only that is tried."""
        self.evaluated += 1
        return self.one_batch and self.evaluated > 1

    def _updates(self, planned: Plan, task: engine.Task, state: State | None, loading: float) -> int:
        """Real updates, evaluation, save and reload; returns the bytes of a checkpoint."""
        process = self.process
        with closing(Trainer(task, planned, process, stop=StopRequest(), watchdog=self.watchdog,
                             state=state)) as trainer:
            at, self.start = trainer.position, time.perf_counter()
            progress = engine.train_one_epoch(trainer.loop, self, epoch=at.begun, sums=at.sums,
                                              first_update=at.update_in_epoch)
            at.update = progress.next_update
            ended, within = divmod(at.update, planned.batch.updates_per_epoch)
            at.epoch, at.sums = ended - 1, progress.sums if within else None
            self.row("updates", f"{plural(self.updates, 'update')} of {planned.batch.global_batch} images: "
                     f"loss {self.seen[0][2]:.4g} to {self.seen[-1][2]:.4g}, gradient norm "
                     f"{progress.figures['grad_norm']:.3g}, lr {progress.figures['lr']:.3g}")
            digests = process.all_gather_object(digest(trainer.model.state_dict()))
            self.problems("updates", [
                f"the loss or gradient of update {record['update']} is not finite: lower --lr, lengthen "
                "--warmup_epochs, or train without --use_amp." for record in self.nonfinite[:1]] + [
                f"the weights of rank {rank} differ from those of rank 0: the network or a device fails."
                for rank, other in enumerate(digests) if other != digests[0]])
            evaluated = 0.0
            if not planned.options.disable_eval:
                self.one_batch, start = True, time.perf_counter()
                task.evaluate([("", trainer.model)], self, at.update)
                batch = next(iter(task.loaders[1].batch_sampler or ()), ())
                evaluated = len(batch) * process.world_size / (time.perf_counter() - start)
            self._speed(planned, loading, evaluated)
            if not self.on_cpu:
                most = process.on_rank_zero(lambda: largest(lambda count: _fits(trainer, count)))
                self.row("largest batch", f"{most} images per forward pass fit into a device's memory")
            self.on_phase("saving", at.update)
            process.on_rank_zero(lambda: self._save_and_reload(trainer))
            return state_bytes(trainer.state_dict())

    def _save_and_reload(self, trainer: Trainer) -> None:
        """Save, read the file, spoil the weights and restore them: all must come back bit for bit.

        The file has no name, so that nothing of it stays behind even when this process is killed.
        """
        before, folder = snapshot(trainer.state_dict()), trainer.options.output_dir
        with tempfile.TemporaryFile(dir=existing_folder(folder) if folder else None) as file:
            started = time.perf_counter()
            torch.save(before, file)
            file.flush()
            os.fsync(file.fileno())
            saved = time.perf_counter() - started
            file.seek(0)
            state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for part in filter(None, (trainer.model, trainer.ema and trainer.ema.module)):
                for tensor in part.state_dict().values():
                    tensor.zero_()
            trainer.loop.update.optimizer.state.clear()
        trainer.load_state_dict(state)
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

        loading: seconds of a CPU for one image; evaluated: images per second, 0 without evaluation.
        """
        options, process, world = planned.options, self.process, self.process.world_size
        self._memory()
        compute, waits = self.pace(options.batch_size * options.update_freq)
        cpus = cpus_per_process(process.local_world_size)
        if options.num_workers:  # a short trial lives on what was loaded ahead
            waits = max(waits, 1 - min(options.num_workers, cpus) / loading / compute)
        compute, waits = min(process.all_gather_object((compute, waits)))  # of the slowest
        rate = compute * (1 - waits) * world
        self.row("speed", f"{rate:,.1f} img/s, the network alone {compute * world:,.1f}")
        self.row("data waiting", f"{100 * waits:.0f} % of the time" + (
            "" if waits <= _WAIT_SHARE else "; what would help most: " + (
                f"--num_workers {cpus}, all CPUs of a process" if options.num_workers < cpus else
                "images stored with a shorter side of about twice the input size, on a local disk")))
        training = options.epochs * planned.batch.updates_per_epoch * planned.batch.global_batch / rate
        images = len(planned.data.val) if planned.data.val and evaluated else 0
        evaluation = options.epochs * images / (evaluated or 1)
        self.row("whole recipe", f"{plural(options.epochs, 'epoch')} would take "
                 f"{duration(training + evaluation)}, {duration(evaluation)} of it evaluating")

    def _disk(self, options: Options, state_size: int) -> None:
        if options.output_dir and options.save_ckpt:
            text, enough = Checkpoints(options.output_dir, keep=options.save_ckpt_num).disk_estimate(
                state_size, options.epochs)
            self.row("disk", text)
            self.problems("disk", [] if enough else [f"{text}: free some, or keep fewer: --save_ckpt_num."])
        else:
            self.row("disk", "nothing would be saved: give --output_dir (and leave --save_ckpt true)")


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number for which `fits` is true, by bisection and to a sixteenth; 0 for none."""
    most, step = 0, 2 ** 14
    while step >= max(1, most // 16):
        most, step = most + step * fits(most + step), step // 2
    return most


def _fits(trainer: Trainer, count: int) -> bool:
    """Whether the device has memory for the forward and backward pass of `count` images."""
    model, options, device = trainer.model, trainer.options, trainer.process.device
    try:
        with engine.autocast(device, amp_dtype(options)):
            out = model.train()(torch.zeros(count, 3, options.input_size, options.input_size, device=device))
        out.float().sum().backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.get_device_module(device).empty_cache()
    return True


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
