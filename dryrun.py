"""What `--dry_run true` does: everything a run or an evaluation needs, tried out for real and left without a trace.

The report comes line by line. Exit code 0: all is well; 2: one sentence says what is wrong.
"""
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import engine
from common.errors import UserError
from datasets.check import SampleCheck, check_sample
from datasets.device import EvalPrepare
from evaluation import prepare_evaluation
from launch import ExitCode
from optim.ema import half_life_warning
from run.checkpoint import Checkpoints, Loaded
from run.folder import RunFolder
from run.life import Services, TrainingRun
from config.parse import Resolved
from run.preflight import (Pace, Report, check_writable, cpus_per_process, digest, first_difference, free_space,
                           low_score, memory_words, peak_memory, plural, process_problems, recipe_hours,
                           shared_memory_needed, shared_memory_problem, size_words, trial_folder)
from run.state import finished, snapshot, state_bytes
from common.text import duration
from scoring import SAMPLED, score_pictures
from training import Planned, build_model, build_run, code_version, find_checkpoint, plan_run

_UPDATES, _SECONDS = 8, 20.0
# On a CPU, networks above the first size are tried with one small update, and above the second not at all.
_ONE_UPDATE, _NO_UPDATE = 5_000_000, 30_000_000


def check(resolved: Resolved, process: Any, watchdog: Any) -> int:
    """Try out what `resolved` asks for; the exit code. Raises UserError for what is wrong, on every rank."""
    options = resolved.options
    device = process.device
    place = torch.get_device_module(device).get_device_name() if device.type in ("cuda", "xpu") else device
    report = Report(f"Trying out the {'evaluation' if options.eval else 'training'} of {options.model} on {place}")
    if options.output_dir:
        process.on_rank_zero(lambda: check_writable(options.output_dir))
    _processes(report, process)
    observer = Trial(process, watchdog)
    try:
        (_evaluation if options.eval else _training)(resolved, process, observer, report)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory is too small for --batch_size {options.batch_size}: use --batch_size "
                        f"{max(1, options.batch_size // 2)} with --update_freq {2 * options.update_freq} (the same "
                        "global batch), --use_amp true or --grad_checkpointing true.") from error
    process.on_rank_zero(report.end)
    return ExitCode.DONE


def _processes(report: Report, process: Any) -> None:
    if process.world_size == 1:
        report.say("processes", f"one, on {process.node_name}")
        return
    started, problems = time.perf_counter(), process_problems(process, code_version())
    for problem in problems:
        report.problem("processes", problem)
    nodes = len(set(process.all_gather_object(process.node_name)))
    devices = "they share the CPU" if process.device.type == "cpu" else "each with a device of its own"
    if not problems:
        milliseconds = 1000 * (time.perf_counter() - started)
        report.say("processes", f"{process.world_size} on {nodes} node{'s' * (nodes > 1)}, {devices}; versions and "
                   f"clocks agree, all-reduce adds up ({milliseconds:.0f} ms for all of it)")


class Trial(engine.Observer):
    """Stops the engine after a few updates, and keeps their times; the watchdog hears its heartbeats."""

    def __init__(self, process: Any, watchdog: Any, updates: int = _UPDATES):
        self.process, self.watchdog, self.updates = process, watchdog, updates
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

    def after_update(self, update: int, stats: Any) -> bool:
        """Enough updates, or enough time, on any rank."""
        self.losses.append(stats.loss.item())  # waits for the device, so that the time is that of the whole update
        self.ends.append(time.perf_counter())
        over = len(self.ends) >= self.updates or self.ends[-1] - self.start > _SECONDS
        return bool(self.process.all_reduce_(torch.tensor([int(over)]), "max").item())

    def on_nonfinite(self, record: dict) -> None:
        """Remember it for the report."""
        self.nonfinite.append(record)

    def pace(self, pictures: int) -> tuple[float, float]:
        """(pictures per second computed without waiting, share of waiting) at `pictures` per update of this process.

        The first update, which fills caches and starts workers, counts only where it is the only one.
        """
        first = 1 if len(self.ends) > 1 else 0
        seconds = self.ends[-1] - (self.ends[0] if first else self.start)
        waited = min(sum(self.waits[first:]), seconds)
        return (len(self.ends) - first) * pictures / max(seconds - waited, 1e-9), waited / max(seconds, 1e-9)


# -------------------------------------------------------------------------------------------------------- training

def _training(resolved: Resolved, process: Any, observer: Trial, report: Report) -> None:
    options = resolved.options
    loaded = process.on_rank_zero(lambda: _checkpoint_to_go_on_from(resolved, report))
    planned = plan_run(resolved, process, loaded.state if loaded else None)
    report.say("data", *planned.data.notes)
    report.say("batch", planned.plan.equation, *planned.plan.notices)
    sample = _pictures(report, process, {"train": planned.data.train, "val": planned.data.val}, options)
    _shared_memory(report, process, options)
    with torch.device("meta"):
        size = sum(p.numel() for p in build_model(planned.options, planned.data.num_classes).parameters())
    on_cpu = process.device.type == "cpu"
    if on_cpu and size > _NO_UPDATE:
        report.say("model", f"{size / 1e6:.1f} M parameters, built without memory for them: above "
                   f"{_NO_UPDATE / 1e6:.0f} M a CPU tries no update and no checkpoint")
        _disk(report, process, options, 4 * size * (4 if options.model_ema else 3))
        return
    report.say("model", f"{size / 1e6:.2f} M parameters, {planned.data.num_classes} classes")
    tried, small = planned, resolved
    if on_cpu and size > _ONE_UPDATE:
        observer.updates, loaded = 1, None
        small = replace(resolved, options=replace(options, batch_size=2, update_freq=1, global_batch=None))
        tried = plan_run(small, process, None, planned.data)
    found = _try_updates(small, process, observer, report, loaded, tried)
    _speed(report, planned, tried, found, observer, sample, process)
    _disk(report, process, options, found.state_size)


def _checkpoint_to_go_on_from(resolved: Resolved, report: Report) -> Loaded | None:
    """The checkpoint a start would take; its folder is only read."""
    options = resolved.options
    loaded = find_checkpoint(resolved, RunFolder(options.output_dir) if options.output_dir else None)
    if loaded is None:
        return None
    if finished(loaded.state, options.epochs):
        report.say("checkpoint", f"{loaded.path} ends a run of {options.epochs} epochs: a start would only evaluate it")
        return None
    report.say("checkpoint", f"a start would go on from {loaded.path}")
    return loaded


def _pictures(report: Report, process: Any, parts: dict[str, Any], options: Any) -> SampleCheck:
    """Look at a sample of each part on rank 0; returns that of the first part there is."""
    found: list[SampleCheck] = []
    for name, dataset in parts.items():
        if dataset is None or not process.is_main:
            continue
        sample = check_sample(dataset)
        found.append(sample)
        said = sample.sentences()
        report.say(f"{name} pictures", *said)
        if sample.unreadable and name == "val" and not options.allow_bad_images:
            path, reason = sample.unreadable[0]
            report.problem(f"{name} pictures", f"picture {path} cannot be read ({reason}), which ends an evaluation: "
                           "mend it, or count unreadable pictures as wrong with --allow_bad_images true.")
    return process.broadcast_object(found[0] if process.is_main else None)


def _shared_memory(report: Report, process: Any, options: Any) -> None:
    local = process.local_world_size
    problems = list(filter(None, process.all_gather_object(shared_memory_problem(options, local))))
    if problems:
        report.problem("shared memory", problems[0])
    elif options.num_workers:
        report.say("shared memory", f"{plural(options.num_workers, 'worker')} x {plural(local, 'process')} need up to "
                   f"{size_words(shared_memory_needed(options, local))}, which there is")


@dataclass
class Tried:
    """What the updates showed. evaluation_rate: pictures per second of one process, None without evaluation."""
    state_size: int
    evaluation_rate: float | None = None
    evaluated: int = 0
    memory: list[tuple[int, int]] = field(default_factory=list)


def _try_updates(resolved: Resolved, process: Any, observer: Trial, report: Report, loaded: Loaded | None,
                 planned: Planned) -> Tried:
    """Real updates, evaluation, save, reload and comparison, in a temporary folder on the run's disk."""
    options, main = resolved.options, process.is_main
    with trial_folder(options.output_dir) if main else nullcontext("") as folder:
        checkpoints = Checkpoints(folder, background=False) if main else None
        aside = replace(resolved, options=replace(options, output_dir=folder, log_dir=None, enable_wandb=False))
        services = Services(checkpoints, None, None, observer.watchdog, folder, process.on_rank_zero)
        run = build_run(aside, process, loaded, services, planned)
        try:
            run.training.observer = observer
            observer.start = time.perf_counter()
            first = run.update - run.epoch * planned.updates_per_epoch
            progress = engine.train_one_epoch(run.training, run.epoch, first, run.sums)
            run.update, run.epoch = progress.next_update, progress.next_update // planned.updates_per_epoch
            _say_updates(report, planned, observer, progress)
            _same_weights(report, run, process)
            tried = Tried(state_bytes(run.state()), memory=process.all_gather_object(peak_memory(process.device)))
            if not options.disable_eval:
                networks = [("", run.parts.model)] + ([("_ema", run.parts.ema.module)] if run.parts.ema else [])
                _score_some(tried, networks[:1 + options.model_ema_eval], planned, process, observer)
            observer.on_phase("saving", run.update)
            process.on_rank_zero(lambda: _save_and_reload(report, run, checkpoints))
        finally:
            run.close()
            services.tracker.close()
    return tried


def _same_weights(report: Report, run: TrainingRun, process: Any) -> None:
    sums = process.all_gather_object(digest(run.parts.model)) if process.world_size > 1 else [""]
    strange = [rank for rank, value in enumerate(sums) if value != sums[0]]
    if strange:
        report.problem("updates", f"the weights of ranks {strange} differ from those of rank 0 after the same updates: "
                       "the network or a device is at fault.")


def _say_updates(report: Report, planned: Planned, observer: Trial, progress: engine.Progress) -> None:
    losses = " to ".join(f"{loss:.4g}" for loss in observer.losses[:1] + observer.losses[1:][-1:])
    count = len(observer.ends)
    report.say("updates", f"{plural(count, 'update')} of {planned.plan.global_batch} pictures: loss {losses}, "
               f"gradient norm {progress.grad_norm:.3g}, lr {progress.lr:.3g}")
    if observer.nonfinite:
        record = observer.nonfinite[0]
        where = f", first in {record['first_module']}" if record.get("first_module") else ""
        report.problem("updates", f"the loss or gradient of update {record['update']} is not finite{where}: lower "
                       "--lr, lengthen --warmup_epochs, or train without --use_amp.")


def _score_some(tried: Tried, networks: list, planned: Planned, process: Any, observer: Trial) -> None:
    """Evaluate one batch per process, for the time that evaluations will take."""
    evaluation = engine.Evaluation(EvalPrepare(planned.options, process.device), process.device, observer=observer,
                                   process=process)
    count = max(1, int(1.5 * planned.options.batch_size)) * process.world_size
    found = score_pictures(networks, planned.data, planned.options, evaluation, count)[0]
    tried.evaluated = len(planned.data.val)
    tried.evaluation_rate = found.images / process.world_size / found.seconds


def _save_and_reload(report: Report, run: TrainingRun, checkpoints: Checkpoints) -> None:
    """Save, read the file, spoil the weights and restore them: all must come back bit for bit."""
    before, started = snapshot(run.state()), time.perf_counter()
    checkpoints.save(before, epoch=run.epoch, update=run.update, wait=True)
    saved = time.perf_counter() - started
    failures = checkpoints.failures()
    if failures:
        report.problem("save, reload", failures[0])
        return
    loaded = checkpoints.newest_valid()
    difference = first_difference(before, {name: loaded.state[name] for name in before})
    if difference is None:
        with torch.no_grad():
            for part in filter(None, (run.parts.model, run.parts.ema)):
                for tensor in part.state_dict().values():
                    tensor.zero_()
            run.parts.optimizer.state.clear()
        run.restore(loaded.state)
        difference = first_difference(before, snapshot(run.state()))
    if difference:
        report.problem("save, reload", f"{difference} differs after saving and loading: please report this.")
    else:
        report.say("save, reload", f"{size_words(state_bytes(before))} in {saved:.2f} s; read again and restored bit "
                   "for bit")


def _speed(report: Report, planned: Planned, tried: Planned, found: Tried, observer: Trial, sample: SampleCheck,
           process: Any) -> None:
    """Memory, speed, the share of waiting with the change that would help most, and the time of the whole recipe."""
    options, world, on_cpu = planned.options, process.world_size, process.device.type == "cpu"
    peak, total = max(found.memory, key=lambda memory: memory[0])
    report.say("memory", memory_words(peak, total, on_cpu))
    compute, waited = observer.pace(tried.plan.batch_size * tried.plan.update_freq)
    slowest = process.all_reduce_(torch.tensor([compute, -waited], dtype=torch.float64), "min").tolist()
    cpus, could_use_amp = cpus_per_process(process.local_world_size), not on_cpu and not options.use_amp
    pace = Pace(slowest[0], sample.seconds, options.num_workers, cpus, -slowest[1], options.update_freq,
                None if on_cpu else peak / total, could_use_amp)
    roughly = "" if len(observer.ends) > 2 else "roughly, from so little: "
    report.say("speed", f"{roughly}{pace.rate * world:,.1f} img/s, the network alone {pace.compute * world:,.1f}")
    report.say("data waiting", f"{100 * pace.waiting:.0f} % of the time; {pace.advice()}")
    evaluation_rate = found.evaluation_rate and found.evaluation_rate * world
    pictures = planned.updates_per_epoch * planned.plan.global_batch
    hours = recipe_hours(pace.rate * world, pictures, evaluation_rate, found.evaluated, options.epochs)
    report.say("whole recipe", roughly + hours)
    warning = half_life_warning(options.model_ema_decay, options.epochs * planned.updates_per_epoch)
    if options.model_ema and warning:
        report.say("EMA", warning)


def _disk(report: Report, process: Any, options: Any, state_size: int) -> None:
    if not options.output_dir or not options.save_ckpt:
        report.say("disk", "nothing would be saved: give --output_dir (and leave --save_ckpt true) to keep checkpoints")
    elif process.is_main:
        needed = Checkpoints(options.output_dir, keep=options.save_ckpt_num).disk_needed(state_size, options.epochs)
        free = free_space(options.output_dir)
        text = (f"checkpoints take {size_words(state_size)} each, up to {size_words(needed)} in all; "
                f"{size_words(free)} can be had in {options.output_dir}")
        if needed < free:
            report.say("disk", text)
        else:
            report.problem("disk", f"{text}: free some, or keep fewer with --save_ckpt_num.")


# ------------------------------------------------------------------------------------------------------ evaluation

def _evaluation(resolved: Resolved, process: Any, observer: Trial, report: Report) -> None:
    prepared = prepare_evaluation(resolved, process, observer)
    options, data, candidates = prepared.options, prepared.data, prepared.candidates
    report.say("data", *data.notes)
    _pictures(report, process, {"val": data.val}, options)
    _shared_memory(report, process, options)
    size = sum(p.numel() for p in candidates[0].network.parameters())
    quick = process.device.type != "cpu" or size <= _ONE_UPDATE
    few = options if quick else replace(options, batch_size=2)
    seconds = 0.0
    for candidate in candidates:
        found = score_pictures([("", candidate.network)], data, few, prepared.evaluation,
                               SAMPLED if quick else 2 * process.world_size)[0]
        seconds += found.seconds * len(data.val) / found.images
        report.say("weights", f"{candidate.path} ({candidate.weights}): {found.hits1} of {found.images} sampled "
                   f"pictures right, mean loss {found.loss:.3f}")
        strange = low_score(found.hits1, found.images - found.bad, data.num_classes, candidate.weights)
        if strange and not prepared.evaluation.columns:
            report.say("", f"warning: {strange}")
    peak, total = max(process.all_gather_object(peak_memory(process.device)), key=lambda memory: memory[0])
    report.say("memory", memory_words(peak, total, process.device.type == "cpu"))
    report.say("whole set", f"{len(data.val)} pictures would take {duration(seconds)}")
