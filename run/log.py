"""What a person sees of a run: the console, log.txt, events.jsonl, TensorBoard and Weights & Biases."""
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import append_json_line, read_json_lines, write_json, write_text
from common.log import logger
from common.text import duration
from run.folder import environment

_WAIT_UPDATES, _WAIT_SHARE = 100, 0.10


@dataclass
class Plan:
    """What the console needs to know of a run. `cpus` and `num_workers` are those of one process."""
    epochs: int
    updates_per_epoch: int
    n_parameters: int = 0
    num_workers: int = 0
    cpus: int = 1


@dataclass
class WandbRun:
    """Where Weights & Biases shall keep a run; `config` are plain values."""
    project: str
    name: str
    config: Mapping[str, Any]
    checkpoints: bool = False


class Tracker:
    """Rank 0's record of a run; made with `folder=None` it keeps none and speaks on the console only.

    Nothing here stops a run: a file that cannot be written is said in the log, and log.txt catches up when the
    disk has room again.
    """

    def __init__(self, folder: str | os.PathLike | None, plan: Plan, log_dir: str | os.PathLike | None = None,
                 wandb: WandbRun | None = None, terminal: bool | None = None):
        self.folder, self.plan = None if folder is None else Path(folder), plan
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._lines: list[dict] = []
        self._bar, self._hinted, self._stack = None, False, ExitStack()
        self._waits: deque[tuple[int, float, float]] = deque()
        self._pace: deque[tuple[float, int]] = deque(maxlen=20)
        self._board, self._wandb = self._open_board(log_dir), _open_wandb(wandb)
        self._wandb_checkpoints = wandb is not None and wandb.checkpoints
        if self.terminal:
            from tqdm.contrib.logging import logging_redirect_tqdm
            self._stack.enter_context(logging_redirect_tqdm(loggers=[logger]))

    # The run's start

    def go_on(self, first_epoch: int) -> None:
        """Keep the lines of log.txt before `first_epoch`; those after it will be made anew."""
        if self.folder is not None:
            earlier = {line["epoch"]: line for line in read_json_lines(self.folder / "log.txt")
                       if isinstance(line.get("epoch"), int) and line["epoch"] < first_epoch}
            self._lines = [earlier[epoch] for epoch in sorted(earlier)]
            self._guard("log.txt", self._write_log)

    def write_setup(self, config_yaml: str, **more: Any) -> None:
        """config.yaml (the resolved options with their origins) and environment.json."""
        if self.folder is not None:
            self._guard("config.yaml", lambda: write_text(self.folder / "config.yaml", config_yaml))
            self._guard("environment.json", lambda: write_json(self.folder / "environment.json", environment() | more))

    # The epoch

    def start_epoch(self, epoch: int, first_update: int = 0) -> None:
        """`first_update` is the first update within the epoch, above 0 after resuming in its middle."""
        self._waits.clear()
        self._pace.clear()
        if self.terminal:
            from tqdm import tqdm
            self._bar = tqdm(total=self.plan.updates_per_epoch, initial=first_update, leave=False, unit="update",
                             dynamic_ncols=True, desc=f"epoch {epoch + 1}/{self.plan.epochs}")

    def tick(self) -> None:
        """One update is done; moves the bar only."""
        if self._bar is not None:
            self._bar.update()

    def progress(self, p: Any) -> None:
        """Show engine.Progress: every print_freq updates and at the end of an epoch."""
        done = p.next_update - p.epoch * self.plan.updates_per_epoch
        self._pace.append((time.monotonic(), p.next_update))
        values = (f"loss {p.recent_loss:.4f}  lr {p.lr:.3g}  {p.images_per_second:.1f} img/s  "
                  f"data wait {100 * p.data_wait:.0f} %")
        if self._bar is not None:
            self._bar.set_postfix_str(f"{values}  run {self._eta(p)}")
        else:
            logger.info(f"epoch {p.epoch + 1}/{self.plan.epochs}  update {done}/{self.plan.updates_per_epoch}  "
                        f"{values}  ETA {self._eta(p)}")
        self._scalars({"train/loss": p.recent_loss, "train/lr": p.lr, "train/weight_decay": p.weight_decay,
                       "train/grad_norm": p.grad_norm, "train/images_per_second": p.images_per_second,
                       "train/data_wait": p.data_wait}, p.next_update)
        self._watch_waiting(p)

    def _eta(self, p: Any) -> str:
        left = self.plan.epochs * self.plan.updates_per_epoch - p.next_update
        (start, first), (end, last) = self._pace[0], self._pace[-1]
        first_of_epoch = p.seconds / max(p.next_update - p.first_update, 1)
        return duration(left * ((end - start) / (last - first) if last > first else first_of_epoch))

    def _watch_waiting(self, p: Any) -> None:
        self._waits.append((p.next_update, p.data_wait * p.seconds, p.seconds))
        while len(self._waits) > 2 and self._waits[1][0] <= p.next_update - _WAIT_UPDATES:
            self._waits.popleft()
        update, waited, earlier = self._waits[0]
        span = p.seconds - earlier
        share = (p.data_wait * p.seconds - waited) / span if span > 0 else 0.0
        if not self._hinted and p.next_update - update >= _WAIT_UPDATES and share > _WAIT_SHARE:
            self._hinted = True
            self.incident("data_wait", f"{100 * share:.0f} % of the last {p.next_update - update} updates was spent "
                          f"waiting for data; {remedy(self.plan.num_workers, self.plan.cpus)}.", update=p.next_update)

    def end_epoch(self, p: Any, results: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Write the epoch's line to log.txt, which is returned.

        Args:
            p: engine.Progress of the whole epoch.
            results: test_loss, test_acc1, test_acc5, the same with `_ema`, and whatever else belongs there.
            seconds: of the epoch with its evaluation; default those of training.
        """
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        train = {"train_loss": p.loss, "train_lr": p.lr, "train_min_lr": p.min_lr, "train_weight_decay": p.weight_decay,
                 "train_grad_norm": p.grad_norm, "train_class_acc": p.class_acc,
                 "train_images_per_second": p.images_per_second, "train_data_wait": p.data_wait}
        line = {**train, **results, "epoch": p.epoch, "update": p.next_update, "n_parameters": self.plan.n_parameters,
                "nonfinite_updates": p.nonfinite, "seconds": p.seconds if seconds is None else seconds}
        line = {name: _plain(value) for name, value in line.items()}
        self._lines = [old for old in self._lines if old["epoch"] < p.epoch] + [line]
        self._guard("log.txt", self._write_log)
        self._scalars({f"epoch/{k}": v for k, v in line.items() if k not in ("epoch", "update")}, p.next_update)
        shown = [f"{words} {line[name]:.2f}" for name, words in (("test_acc1", "top-1"), ("test_acc5", "top-5"),
                 ("test_acc1_ema", "EMA top-1"), ("test_acc5_ema", "EMA top-5")) if line.get(name) is not None]
        loss = line["train_loss"] if line["train_loss"] is not None else math.nan
        logger.info(f"epoch {p.epoch + 1}/{self.plan.epochs} done in {duration(line['seconds'])}  "
                    + "  ".join([f"train loss {loss:.4f}", *shown]))
        return line

    @property
    def lines(self) -> list[dict]:
        """The lines of log.txt so far."""
        return list(self._lines)

    def _write_log(self) -> None:
        if self.folder is not None:
            write_text(self.folder / "log.txt", "".join(json.dumps(line) + "\n" for line in self._lines))

    # Incidents and the end

    def incident(self, kind: str, sentence: str, say: bool = True, **more: Any) -> None:
        """Say something out of the ordinary (unless it was said already) and keep it in events.jsonl."""
        if say:
            logger.warning(sentence)
        if self.folder is not None:
            record = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind, "message": sentence, **more}
            self._guard("events.jsonl", lambda: append_json_line(self.folder / "events.jsonl", record))

    def log_checkpoint(self, path: str | os.PathLike) -> None:
        """Store a checkpoint at Weights & Biases when that was asked for."""
        if self._wandb is not None and self._wandb_checkpoints and Path(path).exists():
            self._outside("wandb", lambda: self._wandb.log_artifact(str(path), type="model"))

    def close(self) -> None:
        """Close the bar and the writers; may be called twice."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._outside("TensorBoard", self._board.close)  # a full disk shows here
        if self._wandb is not None:
            self._outside("wandb", self._wandb.finish)
        self._bar = self._board = self._wandb = None
        self._stack.close()

    def _open_board(self, log_dir: str | os.PathLike | None):
        if self.folder is None and log_dir is None:
            return None
        try:
            from tensorboardX import SummaryWriter
            return SummaryWriter(str(log_dir or self.folder / "tensorboard"))
        except (ImportError, OSError) as error:
            logger.warning(f"No TensorBoard log: {error} (pip install tensorboardX).")
            return None

    def _scalars(self, values: Mapping[str, Any], update: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if self._board is not None:
            for name, value in numbers.items():
                self._outside("TensorBoard", lambda: self._board.add_scalar(name, value, update))
        if self._wandb is not None:
            self._outside("wandb", lambda: self._wandb.log(numbers, step=update))

    def _outside(self, name: str, call) -> None:
        try:
            call()
        except Exception as error:  # other people's services must not end a training
            logger.warning(f"{name} failed ({error}); the run goes on without this record.")

    def _guard(self, name: str, write) -> None:
        try:
            write()
        except OSError as error:
            logger.error(f"{name} was not written in {self.folder}: {error.strerror}; the run goes on.")


def _open_wandb(run: WandbRun | None):
    if run is None:
        return None
    try:
        import wandb
        return wandb.init(project=run.project, name=run.name, config=dict(run.config), resume="allow")
    except ImportError:
        logger.warning("--enable_wandb true needs the package wandb: pip install wandb. The run goes on without it.")
    except Exception as error:  # wandb raises its own types for a missing login or network
        logger.warning(f"wandb cannot be used ({error}); the run goes on without it.")
    return None


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remedy(num_workers: int, cpus: int) -> str:
    """The one change that would help most against waiting for data; both numbers are those of one process."""
    if num_workers < cpus:
        return f"--num_workers {cpus} would use all CPUs of this process (now {num_workers})"
    return ("all CPUs load pictures already: store the pictures with a shorter side of about twice the input "
            "size, on a local disk")
