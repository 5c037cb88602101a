"""The two loops: one epoch of training and one exact evaluation. No files, no options; what they need is
passed in."""
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.devices import PhaseClock, autocast, float32_products, to_device
from common.outcome import Outcome
from common.random import uniforms
from datasets.dataset import Batch, ImageLoader
from launch.process import Process
from optim.finite import FiniteWatch, Readback, diagnose
from optim.schedule import Schedule
from optim.update import Update, UpdateStats

Sums = list[float]
SumsOverRanks = Callable[[], Sums]
Figures = dict[str, float]
_AFTER = {"rollback": Outcome.ROLLED_BACK, "stop": Outcome.FAILED}


class Observer:
    """What a run wants to know while the loops go on; every call comes on every rank. This one wants
    nothing."""

    def on_phase(self, phase: str, update: int) -> None:
        """A heartbeat: "data", "forward", "backward", "step" or "evaluation" begins."""

    def leaves_evaluation(self) -> bool:
        """Asked before each batch of an evaluation. True, on any rank, ends it on all, without results."""
        return False

    def after_update(self, update: int, stats: UpdateStats, sums: SumsOverRanks) -> bool:
        """Global update `update` is done (`stats`: tensors on the device). True, on all ranks, stops here.

        `sums()` gives the sums of the epoch so far over all ranks, for a checkpoint; then every rank must
        call it.
        """
        return False

    def on_progress(self, progress: "Progress") -> None:
        """Every `print_freq` updates and at the end of the epoch, with values on the host."""

    def on_nonfinite(self, record: dict) -> None:
        """An update was not applied; `record`, plain values, says where it went wrong."""

    def on_incident(self, kind: str, sentence: str, **more: object) -> None:
        """Something out of the ordinary; `more` are plain values."""


class Task(Protocol):
    """What a run learns: a network, how it is optimized, how a batch becomes a loss, what is measured.

    `training.Trainer` takes any of them. `training.train(resolved, process, watchdog, data=…, task=…)` is the
    command around it: on every rank, `data(options, process, state)` finds the images (`datasets.build.Data`)
    and `task(plan, process, state)` makes the task, `state` being that of the run to resume, else None. The
    first and only other task is `plan.Classification`.

    score: the figure by which one epoch is better than another; that of the moving average ends in `_ema`.
    model: the network itself, neither wrapped nor compiled, on the process's device; equal on every rank,
    and fresh from the seed or from given weights where there is no `state`, which is loaded afterwards.
    optimizer: over its parameters; groups with `lr_scale` and `decays` follow the schedule with these.
    schedule: learning rate and weight decay per global update.
    loaders: training's first, then those of the evaluation. The run reports what they could not read, and
    closes them.
    """
    score: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loaders: list[ImageLoader]

    def batches(self, epoch: int, first_update: int) -> Iterable[Batch]:
        """This rank's micro-batches of `epoch` (from 0) from its update `first_update` on, in an order that
        is a function of the seed, the epoch and the position alone. Of a batch the loop itself reads `images`
        (whose length counts), `indices` and `positions`."""
        ...

    def losses(self, model: nn.Module, batch: Batch, update: int) -> tuple[Tensor, Tensor | None]:
        """Of one micro-batch: its mean loss (0-dim, float32) and its top-1 hits (0-dim; None without hard
        labels).

        All random draws are keyed by `update` and the images' global positions, so that a replay gives the
        same.
        """
        ...

    def evaluate(self, networks: Sequence[tuple[str, nn.Module]], observer: Observer,
                 update: int) -> Figures | None:
        """The `test_…` figures of (suffix, network) pairs on every rank; None when an observer left the
        evaluation."""
        ...


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What the training loop works with. `model` is the task's, maybe wrapped (DDP, compiled).
    `path_of(index)` names images in reports."""
    model: nn.Module
    task: Task
    update: Update
    watch: FiniteWatch
    process: Process
    updates_per_epoch: int
    print_freq: int = 10
    path_of: Callable[[int], str] = str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Host values of an epoch so far: means over its applied updates, of this rank, at the end over all
    ranks.

    `next_update` is the first global update not done. `outcome`: DONE when the epoch is complete, PAUSED when
    the observer asked to stop before, ROLLED_BACK or FAILED when the non-finite updates demand it. `sums` are
    those to continue from, of this rank, at the end of all ranks. `recent_loss` is the mean since the last
    report.

    `figures` (NaN for none): loss, grad_norm; lr, min_lr and weight_decay of the last update; class_acc,
    top-1 in percent where labels are hard; images_per_second; data_wait, the share of the time spent waiting
    for the loader; of some devices the share of each phase on the device's clock (forward_share …).
    """
    epoch: int
    first_update: int
    next_update: int
    recent_loss: float
    seconds: float
    nonfinite: int
    outcome: Outcome
    sums: Sums
    figures: Figures


class _Meter:
    """What the updates of an epoch came to, on the host as soon as that costs no wait."""

    def __init__(self, loop: Loop, observer: Observer, epoch: int, first_update: int, sums: Sums | None):
        self.loop, self.observer, self.epoch = loop, observer, epoch
        self.first_update = self.next_update = first_update
        self.start, self.waited, self.images, self.outcome = time.perf_counter(), 0.0, 0, Outcome.DONE
        # Loss and gradient norm per image, images in applied updates, hits, hard-labelled images. By images,
        # so that an epoch begun on two processes and ended on one weighs its updates alike. Then the number
        # of updates that were not applied, on which the ranks agree and which one of them counts.
        self.sums = self.reported = np.array(sums or [0.0] * 6)
        self.readback, self.clock = Readback(), PhaseClock(loop.process.device)

    def begins(self, phase: str) -> None:
        """A phase of the update begins, "other" between two updates."""
        self.clock.begins(phase)
        if phase != "other":
            self.observer.on_phase(phase, self.next_update)

    def add(self, stats: UpdateStats, hits: Tensor | None, held: list[Batch]) -> None:
        """File an update that was made of the micro-batches `held`."""
        lr, count = max(_each(self.loop.update.optimizer, "lr")), sum(len(batch.images) for batch in held)
        labelled = 0 if hits is None else count
        seen = torch.zeros_like(stats.loss) if hits is None else hits.float()
        values = torch.cat([stats.values, seen[None]])
        self.readback.add(values, (self.next_update, lr, count, labelled, held))
        self.images += count
        self.next_update += 1
        self.read(wait=False)

    def read(self, wait: bool = True) -> None:
        """Count the updates whose values have arrived, or wait for all that were filed; report those that
        were not applied, and note what follows for the epoch."""
        for values, (update, lr, count, labelled, held) in self.readback.arrived(wait):
            loss, norm, finite, loss_finite, scale, hits = values
            applied = [loss * count, norm * count, count] if finite else [0.0, 0.0, 0]
            action = self.loop.watch.decide(finite > 0, overflow=loss_finite > 0 and scale > 1.0)
            counted = action != "go" and self.loop.process.is_main
            self.sums = self.sums + [*applied, hits, labelled, counted]
            if action != "go":
                self.outcome = _AFTER.get(action, self.outcome)
                self.observer.on_nonfinite({
                    "update": update, "action": action, "loss": loss, "grad_norm": norm, "loss_scale": scale,
                    "epoch": self.epoch, "learning_rate": lr, **_replay(self.loop, update, held)})

    def sums_over_ranks(self) -> Sums:
        """To continue from; every rank must call it."""
        self.read()
        return self.loop.process.all_reduce_(torch.from_numpy(self.sums.copy()), "sum").tolist()

    def progress(self, sums: Sums) -> Progress:
        """The means of `sums`, and those since the last call."""
        recent, self.reported = self.sums - self.reported, self.sums
        loss, norm, applied, hits, labelled, nonfinite = sums
        optimizer, seconds = self.loop.update.optimizer, time.perf_counter() - self.start
        lrs, decays = _each(optimizer, "lr"), _each(optimizer, "weight_decay")
        shares = {f"{phase}_share": spent / seconds for phase, spent in self.clock.read().items()}
        figures = dict(
            loss=loss / applied if applied else np.nan, grad_norm=norm / applied if applied else np.nan,
            lr=max(lrs), min_lr=min(lrs), weight_decay=max(decays), data_wait=self.waited / seconds,
            class_acc=100 * hits / labelled if labelled else np.nan,
            images_per_second=self.images * self.loop.process.world_size / seconds)
        return Progress(
            epoch=self.epoch, first_update=self.first_update, next_update=self.next_update, seconds=seconds,
            recent_loss=float(recent[0] / recent[2]) if recent[2] else np.nan, nonfinite=int(nonfinite),
            outcome=self.outcome, sums=sums, figures=figures | shares)


def _each(optimizer: torch.optim.Optimizer, name: str) -> list[float]:
    return [group[name] for group in optimizer.param_groups]


def train_one_epoch(loop: Loop, observer: Observer, *, epoch: int, first_update: int = 0,
                    sums: Sums | None = None) -> Progress:
    """Train `epoch` from its update `first_update` on; returns the epoch's means and how it ended.

    `sums` are `Progress.sums` of the updates before (on one rank only, which carries them on).

    Losses, hits and finiteness stay on the device; the host reads an update's when the next one has been
    started (on the CPU at once).
    """
    loop.model.train()
    base = epoch * loop.updates_per_epoch
    end = base + loop.updates_per_epoch
    meter = _Meter(loop, observer, epoch, base + first_update, sums)
    batches = iter(loop.task.batches(epoch, first_update))
    if first_update == loop.updates_per_epoch:
        # Stopped between the last update and the evaluation: the epoch's line still has that update's
        # settings.
        loop.update.schedule.apply(loop.update.optimizer, end - 1)
    for number in range(base + first_update, end):
        stats = _train_one_update(loop, batches, meter, number)
        if observer.after_update(number, stats, meter.sums_over_ranks) or meter.outcome is not Outcome.DONE:
            break
        if (number + 1 - base) % loop.print_freq == 0 and number + 1 < end:
            meter.read()
            observer.on_progress(meter.progress(meter.sums.tolist()))
    total = meter.sums_over_ranks()
    if meter.outcome is Outcome.DONE and meter.next_update < end:
        meter.outcome = Outcome.PAUSED
    progress = meter.progress(total)
    if progress.next_update > progress.first_update:  # nothing to report where only the evaluation was left
        observer.on_progress(progress)
    return progress


def _train_one_update(loop: Loop, batches: Iterator[Batch], meter: _Meter, number: int) -> UpdateStats:
    """The training step: forward and backward of each micro-batch, then one update of the weights."""
    held: list[Batch] = []
    hits: Tensor | None = None
    update_freq = loop.update.options.update_freq
    for micro in range(update_freq):
        meter.begins("data")
        start = time.perf_counter()
        batch = next(batches)
        meter.waited += time.perf_counter() - start
        meter.begins("forward")
        with loop.update.micro_batch(last=micro == update_freq - 1):
            loss, correct = loop.task.losses(loop.model, batch, number)
            meter.begins("backward")
            loop.update.backward(loss)
        held.append(batch)
        hits = correct if hits is None or correct is None else hits + correct
    meter.begins("step")
    stats = loop.update.step(number)
    meter.begins("other")
    meter.add(stats, hits, held)
    return stats


def drop_draws(count: int, seed: int, update: int, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A HorNet's keyword argument with `count` draws of stochastic depth per image; nothing for 0.

    Keyed by update and global position, so that no split over processes and no recomputation changes them.
    """
    draws = uniforms(seed, "drop", update, np.asarray(batch.positions), count)
    return {"drop_draws": to_device(torch.from_numpy(draws), device)} if count else {}


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits as float32, others as they are: losses and probabilities need the range."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _replay(loop: Loop, number: int, held: list[Batch]) -> dict:
    """Run the micro-batches of update `number` again until one shows something non-finite, and name it."""
    found, indices = {}, [int(index) for batch in held for index in batch.indices]
    for batch in held:
        found = diagnose(loop.task.model, lambda: loop.task.losses(loop.task.model, batch, number)[0])
        if found["reproduced"]:
            break
    return {**found, "indices": indices, "images": [loop.path_of(index) for index in indices]}


@dataclass
class Outputs:
    """Per-image results in order of index, NumPy: indices and targets int64 (N,), top int64 and probabilities
    float32 (N, k) of the k = min(5, classes) best classes, nll float32 (N,) (0 for an unreadable image)."""
    indices: np.ndarray
    targets: np.ndarray
    top: np.ndarray
    probabilities: np.ndarray
    nll: np.ndarray


@dataclass
class EvalResult:
    """Counts over all images of all ranks, and their mean `loss`. `bad` images could not be read and count as
    incorrect; `nonfinite` ones gave logits that are not numbers and count as incorrect too."""
    name: str
    hits1: int
    hits5: int
    images: int
    bad: int
    nonfinite: int
    loss: float
    seconds: float = 0.0
    outputs: Outputs | None = None

    @property
    def acc1(self) -> float:
        """Top-1 in percent."""
        return 100.0 * self.hits1 / self.images if self.images else 0.0

    @property
    def acc5(self) -> float:
        """Top-5 in percent (top-k with fewer than five classes)."""
        return 100.0 * self.hits5 / self.images if self.images else 0.0


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate. `prepare(batch)` gives images and int64 targets on the device, -100 for unreadable
    images.

    `columns` restricts the logits to these classes (targets then count within them). `outputs` keeps
    per-image results. `expected` images are insisted on. float32 is true float32 unless `tf32` or an
    `autocast_dtype`.
    """
    prepare: Callable[[Batch], tuple[Tensor, Tensor]]
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    tf32: bool = False
    columns: Sequence[int] | None = None
    outputs: bool = False
    expected: int | None = None
    observer: Observer = field(default_factory=Observer)
    process: Process = field(default_factory=lambda: Process(device=torch.device("cpu")))


@torch.no_grad()
def evaluate(models: Sequence[tuple[str, nn.Module]], loader: Iterable[Batch], evaluation: Evaluation,
             update: int = 0) -> list[EvalResult]:
    """Score several (name, unwrapped model) in one pass over the images; the same results on every rank.

    Each rank passes its own share of the images, possibly none: nothing is padded, hits are integers, and the
    models, left in eval mode, wait for no other rank. No results at all when the observer of any rank has
    left the evaluation. Raises RuntimeError when not exactly `expected` images were seen.
    """
    tallies, left = [_Tally(evaluation) for _ in models], False
    with float32_products(evaluation.tf32):
        for _, model in models:
            model.eval()
        evaluation.observer.on_phase("evaluation", update)  # the first batch takes its time
        for batch in loader:
            evaluation.observer.on_phase("evaluation", update)
            if left := evaluation.observer.leaves_evaluation():
                break
            images, targets = evaluation.prepare(batch)
            for (_, model), tally in zip(models, tallies):
                with autocast(evaluation.device, evaluation.autocast_dtype):
                    logits = model(images)
                tally.add(full_precision(logits), targets, batch.indices)
    if evaluation.process.any(left):
        return []
    return [tally.result(name) for (name, _), tally in zip(models, tallies)]


class _Tally:
    """Integer counts and the loss sum of one model, on the device until the end."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.start, device = evaluation, time.perf_counter(), evaluation.device
        self.columns = None if evaluation.columns is None else torch.as_tensor(evaluation.columns).to(device)
        self.counts = torch.zeros(5, dtype=torch.int64, device=device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.rows: list[tuple] = []

    def add(self, logits: Tensor, targets: Tensor, indices: Tensor) -> None:
        if self.columns is not None:
            logits = logits.index_select(1, self.columns)
        nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
        top = logits.topk(min(5, logits.shape[1])).indices
        broken = logits.isnan().any(1)
        hit = (top == targets[:, None]) & ~broken[:, None]
        bad = targets == -100
        self.counts += torch.stack([hit[:, 0].sum(), hit.sum(), torch.ones_like(targets).sum(), bad.sum(),
                                    (broken & ~bad).sum()])
        self.loss += nll.to(self.loss.dtype).sum()
        if self.evaluation.outputs:
            probabilities = logits.softmax(1).gather(1, top).float()
            self.rows.append((indices, targets.cpu(), top.cpu(), probabilities.cpu(), nll.float().cpu()))

    def result(self, name: str) -> EvalResult:
        for total in (self.counts, self.loss):
            self.evaluation.process.all_reduce_(total, "sum")
        hits1, hits5, images, bad, nonfinite = self.counts.tolist()
        if self.evaluation.expected not in (None, images):
            raise RuntimeError(f"{images} images were evaluated instead of {self.evaluation.expected}")
        loss = self.loss.item() / (images - bad) if images > bad else np.nan
        return EvalResult(name, hits1, hits5, images, bad, nonfinite, loss, outputs=self._gather(),
                          seconds=time.perf_counter() - self.start)

    def _gather(self) -> Outputs | None:
        if not self.evaluation.outputs:
            return None
        own = [torch.cat(column).numpy() for column in zip(*self.rows)]
        parts = self.evaluation.process.all_gather_object(own)
        columns = [np.concatenate(column) for column in zip(*(part for part in parts if part))]
        order = np.argsort(columns[0], kind="stable")
        return Outputs(*(column[order] for column in columns))
