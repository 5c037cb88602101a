"""The two loops: one epoch of training and one exact evaluation. No files, no options; what they need is passed in."""
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.random import uniforms


class Observer:
    """What a run wants to know while the loops go on; every call comes on every rank. This one wants nothing."""

    def on_phase(self, phase: str, update: int) -> None:
        """A heartbeat: "data", "forward", "backward", "step" or "evaluation" begins."""

    def leaves_evaluation(self) -> bool:
        """Asked before each batch of an evaluation. True, on any rank, ends it on all, without results."""
        return False

    def after_update(self, update: int, stats: Any) -> bool:
        """Global update `update` is done (`stats`: tensors on the device). True, on all ranks, stops here."""
        return False

    def on_progress(self, progress: "Progress") -> None:
        """Every `print_freq` updates and at the end of the epoch, with values on the host."""

    def on_nonfinite(self, record: dict) -> None:
        """An update was not applied; `record`, plain values, says where it went wrong."""


@dataclass
class Training:
    """What training needs. `model` may be wrapped (DDP, compiled); `plain` is the network inside it.

    `loader` yields batches in the order of `sampler` (`set_start(epoch, update)`); `prepare(batch)` gives images
    (B, 3, H, W) and targets on the device. `update`: optim.update.Update; `watch`: optim.finite.FiniteWatch.
    `path_of(index)` names pictures in reports. `process`: world_size and `all_reduce_`; None when alone.
    """
    model: nn.Module
    plain: nn.Module
    update: Any
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    loader: Any
    sampler: Any
    prepare: Callable
    watch: Any
    seed: int = 0
    updates_per_epoch: int = 1
    update_freq: int = 1
    autocast_dtype: torch.dtype | None = None
    print_freq: int = 10
    observer: Observer = field(default_factory=Observer)
    process: Any = None
    path_of: Callable[[int], str] | None = None
    sums_over_ranks: Callable[[], list[float]] | None = None  # set by the epoch under way; see _Meter.over_ranks


@dataclass
class Progress:
    """Host values of an epoch so far: means over its applied updates, of this rank, at the end over all ranks.

    `recent_loss` is the mean since the last report, `class_acc` top-1 in percent where labels are hard, `data_wait`
    the share of the time spent waiting for the loader. `next_update` is the first global update not done. `request`
    is "" when the epoch is complete, "interrupted" when the observer asked to stop before, "rollback" or "stop" when
    the non-finite updates demand it.
    """
    epoch: int
    first_update: int
    next_update: int
    loss: float = float("nan")
    recent_loss: float = float("nan")
    grad_norm: float = float("nan")
    lr: float = 0.0
    min_lr: float = 0.0
    weight_decay: float = 0.0
    class_acc: float | None = None
    images_per_second: float = 0.0
    data_wait: float = 0.0
    seconds: float = 0.0
    loss_scale: float = 1.0
    nonfinite: int = 0
    request: str = ""


class _Meter:
    """Sums of an epoch, kept on the device until they are read."""

    def __init__(self, training: Training, epoch: int, first_update: int, sums: Sequence[float] | None = None):
        self.training, self.progress = training, Progress(epoch, first_update, first_update)
        self.start, self.waited, self.pictures = time.perf_counter(), 0.0, 0
        # Loss and gradient norm per picture, pictures in applied updates, hits, hard-labelled pictures. By pictures,
        # so that an epoch begun on two processes and ended on one weighs its updates alike.
        self.window, self.sums = [], np.zeros(5) if sums is None else np.array(sums[:5], dtype=np.float64)
        self.progress.nonfinite = int(sums[5]) if sums is not None and len(sums) > 5 else 0

    def add(self, stats: Any, hits: torch.Tensor | None, pictures: int) -> None:
        labelled = 0 if hits is None else pictures
        row = [torch.where(stats.finite > 0, stats.loss, 0), torch.where(stats.finite > 0, stats.grad_norm, 0),
               stats.finite, torch.zeros_like(stats.loss) if hits is None else hits.float(),
               torch.full_like(stats.loss, labelled), torch.full_like(stats.loss, pictures)]
        self.window.append(torch.stack(row))
        self.pictures += pictures
        self.progress.next_update += 1

    def read(self, over_ranks: bool = False) -> Progress:
        """Bring the sums to the host; `over_ranks` sums them over the processes first."""
        progress, process = self.progress, self.training.process
        self._read_window()
        loss, norm, applied, hits, labelled = self.over_ranks()[:5] if over_ranks else self.sums.tolist()
        progress.loss, progress.grad_norm = (loss / applied, norm / applied) if applied else (float("nan"),) * 2
        progress.class_acc = 100 * hits / labelled if labelled else None
        groups = self.training.update.optimizer.param_groups
        progress.lr, progress.min_lr = max(g["lr"] for g in groups), min(g["lr"] for g in groups)
        progress.weight_decay = max(g["weight_decay"] for g in groups)
        progress.loss_scale = self.training.update.scaler.scale.item()
        progress.seconds = time.perf_counter() - self.start
        progress.images_per_second = self.pictures * (1 if process is None else process.world_size) / progress.seconds
        progress.data_wait = self.waited / progress.seconds
        return progress

    def over_ranks(self) -> list[float]:
        """The sums so far over all ranks, for a checkpoint within the epoch; every rank must call it."""
        self._read_window()
        process, sums = self.training.process, torch.from_numpy(self.sums.copy())
        if process is not None and process.world_size > 1:
            process.all_reduce_(sums, "sum")
        return [*sums.tolist(), self.progress.nonfinite]  # rank 0 carries the count on

    def _read_window(self) -> None:
        if self.window:
            rows = torch.stack(self.window).cpu().double().numpy()
            window = np.concatenate([rows[:, :3] * rows[:, 5:], rows[:, 3:5]], axis=1).sum(0)
            self.window, self.sums = [], self.sums + window
            self.progress.recent_loss = float(window[0] / window[2]) if window[2] else float("nan")


def train_one_epoch(training: Training, epoch: int, first_update: int = 0,
                    sums: Sequence[float] | None = None) -> Progress:
    """Train `epoch` from its update `first_update` on; returns the epoch's means and what the run must do next.

    `sums` are those of the updates before, from `sums_over_ranks` (on one rank only).

    Losses, hits and finiteness stay on the device; the host reads them every `print_freq` updates, and an
    update's flags when the next one has been started (on the CPU at once).
    """
    training.model.train()
    training.sampler.set_start(epoch, first_update)
    base = epoch * training.updates_per_epoch
    end = base + training.updates_per_epoch
    meter = _Meter(training, epoch, base + first_update, sums)
    training.sums_over_ranks = meter.over_ranks
    progress, batches = meter.progress, iter(training.loader)
    if first_update == training.updates_per_epoch:
        # Stopped between the last update and the evaluation: the epoch's line still tells that update's settings.
        training.update.schedule.apply(training.update.optimizer, end - 1)
    for number in range(base + first_update, end):
        held, hits = [], None
        for micro in range(training.update_freq):
            held.append(_next_batch(training, batches, meter, number))
            right = _micro_batch(training, held[-1], number, last=micro == training.update_freq - 1)
            hits = right if hits is None else hits + right
        training.observer.on_phase("step", number)
        stats = training.update.step(number)
        meter.add(stats, hits, sum(len(batch.images) for batch in held))
        lr = max(group["lr"] for group in training.update.optimizer.param_groups)
        _report(training, progress, training.watch.add(number, stats, (held, lr)))
        if training.observer.after_update(number, stats) or progress.request:
            break
        if (number + 1 - base) % training.print_freq == 0 and number + 1 < end:
            training.observer.on_progress(meter.read())
    _report(training, progress, training.watch.flush())
    if not progress.request and progress.next_update < end:
        progress.request = "interrupted"
    meter.read(over_ranks=True)
    if progress.next_update > progress.first_update:  # nothing to tell where only the evaluation was left
        training.observer.on_progress(progress)
    return progress


def _next_batch(training: Training, batches: Iterator, meter: _Meter, number: int) -> Any:
    training.observer.on_phase("data", number)
    start = time.perf_counter()
    batch = next(batches)
    meter.waited += time.perf_counter() - start
    return batch


def _micro_batch(training: Training, batch: Any, number: int, last: bool) -> torch.Tensor | None:
    """Accumulate one micro-batch's gradient; returns its top-1 hits where the labels are hard."""
    training.observer.on_phase("forward", number)
    images, targets = training.prepare(batch)
    with training.update.micro_batch(last):
        logits, loss = _loss(training, training.model, batch, images, targets, number)
        training.observer.on_phase("backward", number)
        training.update.backward(loss)
    return None if targets.is_floating_point() else (logits.detach().argmax(1) == targets).sum()


def _loss(training: Training, model: nn.Module, batch: Any, images: torch.Tensor, targets: torch.Tensor,
          number: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = getattr(training.plain, "num_drop_draws", 0)
    # Keyed by update and global position, so that no split over processes and no recomputation changes them.
    # Without `non_blocking` the host would wait here for all that the device still has to do.
    dropped = {} if not draws else {"drop_draws": torch.from_numpy(uniforms(
        training.seed, "drop", number, np.asarray(batch.positions), draws)).to(images.device, non_blocking=True)}
    with _autocast(images.device, training.autocast_dtype):
        logits = model(images, **dropped)
    return logits, training.criterion(_full(logits), targets)


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _full(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _report(training: Training, progress: Progress, incidents: Iterable) -> None:
    """Tell the observer of updates that were not applied, and note what the run must do about them."""
    for incident in incidents:
        held, lr = incident.context
        progress.nonfinite += 1
        progress.request = progress.request if incident.action == "skip" else incident.action
        training.observer.on_nonfinite({
            "update": incident.update, "epoch": progress.epoch, "action": incident.action, "learning_rate": lr,
            "loss": incident.loss, "grad_norm": incident.grad_norm, "loss_scale": incident.loss_scale,
            **_replay(training, incident.update, held)})


def _replay(training: Training, number: int, held: list) -> dict:
    """Run the micro-batches of update `number` again until one shows something non-finite, and say what."""
    found, pictures = {}, [int(index) for batch in held for index in batch.indices]
    for batch in held:
        images, targets = training.prepare(batch)
        found = training.watch.diagnose(
            training.plain, lambda: _loss(training, training.plain, batch, images, targets, number)[1])
        if found["reproduced"]:
            break
    paths = {"pictures": [training.path_of(index) for index in pictures]} if training.path_of else {}
    return {**found, "indices": pictures, **paths}


@dataclass
class Outputs:
    """Per-picture results in order of index, NumPy: indices and targets int64 (N,), top int64 and probabilities
    float32 (N, k) of the k = min(5, classes) best classes, nll float32 (N,) (0 for an unreadable picture)."""
    indices: np.ndarray
    targets: np.ndarray
    top: np.ndarray
    probabilities: np.ndarray
    nll: np.ndarray


@dataclass
class EvalResult:
    """Sums over all pictures of all ranks. `bad` pictures could not be read and count as wrong; `nonfinite` ones
    gave logits that are not numbers and count as wrong too."""
    name: str
    hits1: int
    hits5: int
    images: int
    bad: int
    nonfinite: int
    loss_sum: float
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

    @property
    def loss(self) -> float:
        """Mean cross-entropy per readable picture."""
        return self.loss_sum / (self.images - self.bad) if self.images > self.bad else float("nan")


@dataclass
class Evaluation:
    """How to evaluate. `prepare(batch)` gives images and int64 targets on the device, -100 for unreadable pictures.

    `columns` restricts the logits to these classes (targets then count within them). `outputs` keeps per-picture
    results. `expected` pictures are insisted on. float32 is true float32 unless `tf32` or an `autocast_dtype`.
    """
    prepare: Callable
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    tf32: bool = False
    columns: Sequence[int] | None = None
    outputs: bool = False
    expected: int | None = None
    observer: Observer = field(default_factory=Observer)
    process: Any = None


@torch.no_grad()
def evaluate(models: Sequence[tuple[str, nn.Module]], loader: Any, evaluation: Evaluation, update: int = 0) -> list[EvalResult]:
    """Score several (name, unwrapped model) in one pass over the pictures; the same results on every rank.

    Each rank passes its own share of the pictures, possibly none: nothing is padded, hits are integers, and the
    models talk to no other rank. No results at all when the observer of any rank has left the evaluation. Raises
    RuntimeError when not exactly `expected` pictures were seen.
    """
    start, modes = time.perf_counter(), [model.training for _, model in models]
    tallies, left = [_Tally(evaluation) for _ in models], False
    with nullcontext() if evaluation.tf32 else true_float32():
        for _, model in models:
            model.eval()
        for batch in loader:
            evaluation.observer.on_phase("evaluation", update)
            if left := evaluation.observer.leaves_evaluation():
                break
            images, targets = evaluation.prepare(batch)
            for (_, model), tally in zip(models, tallies):
                with _autocast(evaluation.device, evaluation.autocast_dtype):
                    logits = model(images)
                tally.add(_full(logits), targets, batch.indices)
    for (_, model), mode in zip(models, modes):
        model.train(mode)
    leavers = torch.tensor(int(left))
    if leavers if evaluation.process is None else evaluation.process.all_reduce_(leavers, "max"):
        return []
    results = [tally.result(name) for (name, _), tally in zip(models, tallies)]
    for result in results:
        result.seconds = time.perf_counter() - start
        if evaluation.expected not in (None, result.images):
            raise RuntimeError(f"{result.images} pictures were evaluated instead of {evaluation.expected}")
    return results


class _Tally:
    """Integer counts and the loss sum of one model, on the device until the end."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation
        self.columns = None if evaluation.columns is None else torch.as_tensor(evaluation.columns).to(evaluation.device)
        self.counts = torch.zeros(5, dtype=torch.int64, device=evaluation.device)
        wide = torch.float32 if evaluation.device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=wide, device=evaluation.device)
        self.rows: list[tuple] = []

    def add(self, logits: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor) -> None:
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
        process, loss = self.evaluation.process, self.loss
        if process is not None and process.world_size > 1:
            process.all_reduce_(self.counts, "sum")
            process.all_reduce_(loss, "sum")
        return EvalResult(name, *self.counts.tolist(), loss.item(), outputs=self._gather())

    def _gather(self) -> Outputs | None:
        if not self.evaluation.outputs:
            return None
        own = [torch.cat(column).numpy() for column in zip(*self.rows)]
        process = self.evaluation.process
        parts = [own] if process is None else process.all_gather_object(own)
        columns = [np.concatenate(column) for column in zip(*(part for part in parts if part))]
        order = np.argsort(columns[0], kind="stable")
        return Outputs(*(column[order] for column in columns))


@contextmanager
def true_float32() -> Iterator[None]:
    """Products and convolutions of float32 tensors in float32 (no TF32, no bf16), the settings restored afterwards."""
    backends = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value
