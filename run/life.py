"""The life of one training run: where it stands, what it saves, when it stops, what it survives.

It is the engine's observer, and knows the network, the optimizer and the loops only as objects handed to it.
"""
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from common.errors import UserError
from run.state import FORMAT, Best


@dataclass
class Parts:
    """What a checkpoint carries, as objects with `state_dict` and `load_state_dict`; `ema` may be None."""
    model: Any
    ema: Any
    optimizer: Any
    scaler: Any
    policy: Any
    load_optimizer: Callable[[Any, dict], None]


@dataclass
class Fixed:
    """What does not change during a run and is saved with it, plain values."""
    args: dict
    seed: int
    global_batch: int
    classes: list[str]
    updates_per_epoch: int
    epochs: int
    code_paths: dict
    version: str


class TrainingRun:
    """Counters, saves, stops and incidents of one run; on every rank, with files on rank 0 alone.

    `epoch` is the one under way, `update` the global updates done. `sums` belong to an epoch that was interrupted.
    """

    def __init__(self, options, process, parts: Parts, fixed: Fixed, services: "Services"):
        self.options, self.process, self.parts, self.fixed, self.to = options, process, parts, fixed, services
        self.best = Best()
        self.epoch = options.start_epoch
        self.update = self.epoch * fixed.updates_per_epoch
        self.sums: list[float] | None = None
        self.pictures_before: int | None = None
        self.training: Any = None
        self.loaders: list[Any] = []

    def state(self, sums: list[float] | None = None) -> dict:
        """Everything a run needs to go on; `sums` are those of an epoch that is not finished."""
        parts, fixed = self.parts, self.fixed
        return {"format": FORMAT, "model": parts.model.state_dict(),
                "model_ema": parts.ema.state_dict() if parts.ema is not None else None,
                "optimizer": parts.optimizer.state_dict(), "scaler": parts.scaler.state_dict(),
                "policy": {name: getattr(parts.policy, name) for name in ("row", "skipped", "rollbacks")},
                "epoch": self.epoch - 1, "update": self.update, "sums": sums, "seed": fixed.seed,
                "global_batch": fixed.global_batch, "pictures": self.training.sampler.num_images,
                "best": asdict(self.best), "classes": fixed.classes, "args": fixed.args, "code_paths": fixed.code_paths,
                "threads": torch.get_num_threads(), "version": fixed.version}

    def restore(self, state: dict) -> None:
        """Go on where `state` was saved. Raises UserError when it does not fit the model or optimizer."""
        self._check_position(state)
        self._restore_weights(state)
        for name, value in (state.get("policy") or {}).items():
            setattr(self.parts.policy, name, value)
        self.epoch = state["epoch"] + 1
        self.update = self.epoch * self.fixed.updates_per_epoch if state["update"] is None else state["update"]
        self.pictures_before = state.get("pictures")
        # The sums are over all ranks; one rank carries them on.
        self.sums = state.get("sums") if self.process.rank == 0 else None

    def _check_position(self, state: dict) -> None:
        """The update must lie in the epoch after the last one finished; it doesn't when pictures came or went.

        A run that was stopped between an epoch's last update and its evaluation stands at that epoch's end, with sums.
        """
        per_epoch, finished = self.fixed.updates_per_epoch, state["epoch"] + 1
        longest = per_epoch if state.get("sums") is not None else per_epoch - 1
        if state["update"] is not None and not 0 <= state["update"] - finished * per_epoch <= longest:
            raise UserError(f"the checkpoint stands at update {state['update']}, finished epochs: {finished}; with these "
                            f"pictures an epoch has {per_epoch} updates, so the data set is not the one the run began "
                            "with: restore it, or start from the weights with --finetune in another --output_dir.")

    def _restore_weights(self, state: dict) -> None:
        parts = self.parts
        try:
            parts.model.load_state_dict(state["model"])
            if parts.ema is not None:
                parts.ema.load_state_dict(state["model_ema"] or state["model"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint's weights do not fit --model {self.options.model}: "
                            f"{str(error).splitlines()[-1].strip()}") from None
        parts.load_optimizer(parts.optimizer, state["optimizer"])
        parts.scaler.load_state_dict(state.get("scaler") or {})

    def close(self) -> None:
        """End the loader workers. Left to the garbage collector, their queues close before they are told to end, and
        the program waits 5 s for each of them."""
        for loader in self.loaders:
            loader.close()

    # ------------------------------------------------------------------------------------------ the engine's observer

    def on_phase(self, phase: str, update: int) -> None:
        """Tell the watchdog."""
        self.to.watchdog.phase(phase, update)

    def leaves_evaluation(self) -> bool:
        """Whether the run was asked to stop: the evaluation is made when it goes on."""
        return self.to.stop.heard(self.process)

    def after_update(self, update: int, stats: Any) -> bool:
        """Agree with the other ranks whether to save or to stop at this boundary."""
        self.update = update + 1
        to = self.to
        to.tracker.tick()
        due = to.checkpoints is not None and to.checkpoints.due(self.options.save_every_minutes)
        flags = torch.tensor([int(to.stop.requested), int(due)], dtype=torch.int32)
        stops, saves = self.process.all_reduce_(flags, "max").tolist()
        if stops:
            to.stop.request("another process was asked to stop")
        elif saves and self.update % self.fixed.updates_per_epoch:
            self._save_within_epoch(wait=False)
        return bool(stops)

    def on_progress(self, progress: Any) -> None:
        """Pass a line of figures to the console."""
        if self.process.rank == 0:
            self.to.tracker.progress(progress)

    def on_nonfinite(self, record: dict) -> None:
        """Keep the report of an update that was not applied: that of the first rank whose pictures show it."""
        records = self.process.all_gather_object(record)
        if self.process.rank == 0:
            rank = next((rank for rank, found in enumerate(records) if found["reproduced"]), 0)
            module = f", first in module {records[rank]['first_module']}" if records[rank]["first_module"] else ""
            self.to.tracker.incident("nonfinite", f"Update {record['update']} was not applied: its loss or gradient was "
                                     f"not finite{module}; next: {record['action']}.", rank=rank, **records[rank])

    # ------------------------------------------------------------------------------------------ the run itself

    def fit(self, train_one_epoch: Callable, evaluate: Callable[[int], dict | None] | None) -> str:
        """Train to the last epoch; returns "done" or "stopped" (saved, can go on).

        `train_one_epoch(training, epoch, first_update, sums)` is the engine's; `evaluate(update)` gives log.txt's
        `test_…` entries, or None when it was left for a stop. Raises UserError when non-finite numbers end the run.
        """
        per_epoch = self.fixed.updates_per_epoch
        self._compare_pictures()
        while self.epoch < self.fixed.epochs:
            started, first = time.time(), self.update - self.epoch * per_epoch
            if self.process.rank == 0:
                self.to.tracker.start_epoch(self.epoch, first)
            progress = train_one_epoch(self.training, self.epoch, first, self.sums)
            self.update, self.sums = progress.next_update, None
            if progress.request == "stop":
                raise UserError(f"training ended at update {self.update}: too many non-finite losses or gradients; "
                                f"{self.to.where('events.jsonl')} names the updates, pictures and modules; lower --lr, "
                                "or train without --use_amp.")
            if progress.request == "rollback":
                self._roll_back()
            if progress.request == "interrupted" or self.to.stop.agreed(self.process):
                self._save_within_epoch(wait=True)
                return "stopped"
            if self.update == (self.epoch + 1) * per_epoch:
                tests = {} if evaluate is None else evaluate(self.update)
                if tests is None:
                    self.to.stop.request("another process was asked to stop")  # unless this one has a reason of its own
                    self._save_within_epoch(wait=True)
                    return "stopped"
                stops = self._finish_epoch(progress, tests, started)
                if stops and self.epoch < self.fixed.epochs:
                    return "stopped"
            else:
                self.sums = self.training.sums_over_ranks()
                self.sums = self.sums if self.process.rank == 0 else None
        return "done"

    def _compare_pictures(self) -> None:
        """Say that pictures came or went since the checkpoint: too few to change the updates of an epoch, so that the
        run can go on, but every epoch's order is another one."""
        now, before = self.training.sampler.num_images, self.pictures_before
        if before not in (None, now) and self.process.rank == 0:
            self.to.tracker.incident("pictures_changed", f"The training set has {now} pictures and had {before} when the "
                                     "checkpoint was saved: the run goes on with them, but not as an undisturbed one would; "
                                     "restore the data set to have that.", update=self.update, pictures=now, before=before)

    def _finish_epoch(self, progress: Any, tests: dict, started: float) -> bool:
        """Log and save; the epoch counts as finished from then on. True when the run was asked to stop."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        files = self.best.update(epoch, tests.get("test_acc1"), tests.get("test_acc1_ema"))
        # Asked once: a signal that comes after this is seen at the next update, when it can be saved again.
        stops = self.to.stop.agreed(self.process)
        ends = stops or self.epoch == self.fixed.epochs
        self._report_bad_pictures(epoch)
        self.on_phase("saving", self.update)
        if self.process.rank == 0:
            self.to.tracker.end_epoch(progress, tests, seconds=time.time() - started)
        if self.to.checkpoints is not None and (ends or files or self.epoch % self.options.save_ckpt_freq == 0):
            self.to.checkpoints.save(self.state(), epoch=epoch, best=files, wait=ends)
            self._say_failures()
        return stops

    def _report_bad_pictures(self, epoch: int) -> None:
        """Count and name the pictures that could not be read in this epoch and were replaced."""
        bad = self.training.loader.bad_images
        gathered = self.process.all_gather_object([self.training.path_of(index) for index in bad])
        bad.clear()
        paths = sorted({path for part in gathered for path in part})
        if paths and self.process.rank == 0:
            self.to.tracker.incident("bad_pictures", f"{len(paths)} picture{'s' * (len(paths) > 1)} of epoch {epoch + 1} could "
                                     f"not be read and {'were' if len(paths) > 1 else 'was'} replaced by others, such as "
                                     f"{paths[0]}.", epoch=epoch, count=len(paths), pictures=paths[:1000])

    def _save_within_epoch(self, wait: bool) -> None:
        self.on_phase("saving", self.update)
        sums = self.training.sums_over_ranks()
        if self.to.checkpoints is not None:
            self.to.checkpoints.save(self.state(sums), epoch=self.epoch, update=self.update, wait=wait)
            self._say_failures()

    def _say_failures(self) -> None:
        for sentence in self.to.checkpoints.failures():
            self.to.tracker.incident("save_failed", sentence, log=False, update=self.update)

    def _roll_back(self) -> None:
        """Take the weights of the last good checkpoint and go on with the next data, not with the same."""
        state = self.to.newest_state()
        if state is None:
            raise UserError(f"the loss or gradient was non-finite several times up to update {self.update} and there is "
                            "no checkpoint to go back to: lower --lr, lengthen --warmup_epochs, or train without --use_amp.")
        self._restore_weights(state)
        if self.process.rank == 0:
            self.to.tracker.incident("rollback", f"Rolled back to the weights of update {state['update']}; training goes on "
                                     f"with the data of update {self.update}.", update=self.update,
                                     weights_of_update=state["update"])


@dataclass
class Services:
    """Who does what for a run: `checkpoints` is None where nothing is saved (no --output_dir, or not rank 0)."""
    checkpoints: Any
    tracker: Any
    stop: Any
    watchdog: Any
    folder: Any
    on_rank_zero: Callable[[Callable], Any]

    def newest_state(self) -> dict | None:
        """The newest valid checkpoint's state on every rank; None without one."""
        def find():
            if self.checkpoints is None:
                return None
            self.checkpoints.close()
            loaded = self.checkpoints.newest_valid()
            return None if loaded is None else loaded.state
        return self.on_rank_zero(find)

    def where(self, name: str) -> str:
        """`name` in the run folder, for people."""
        return f"{self.folder}/{name}" if self.folder else "the console output above"
