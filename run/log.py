"""What a person sees of a run: the console, log.txt, events.jsonl, TensorBoard, and W&B or trackio."""
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.files import append_json_line, read_json_lines, write_json, write_text
from common.ledger import Ledger
from common.log import logger
from common.text import duration
from config.options import Options
from engine import Progress
from run.folder import environment

SCORES = {"test_acc1": "top-1", "test_acc5": "top-5", "test_acc1_ema": "EMA top-1",
          "test_acc5_ema": "EMA top-5", "test_miou": "mIoU", "test_miou_ema": "EMA mIoU",
          "test_box_ap": "box AP", "test_mask_ap": "mask AP"}


class Tracker:
    """Rank 0's record of a run; made with `folder=None` it keeps none and only writes to the console.

    Nothing here stops a run: a file that cannot be written is logged, and log.txt catches up when the disk
    has room again. People see epochs from 1; log.txt counts them from 0.

    Args:
        folder: the run's; of an owner it is asked before each write where that is now.
        options: `epochs`; where TensorBoard's files go, and whether Weights & Biases is used.
        updates_per_epoch: of the whole run.
        n_parameters: written into each line of log.txt.
        peak_rate: images per second at the peak of all devices, None where that is not known.
        main: false on other ranks, which write nothing.
    """

    def __init__(self, folder: str | os.PathLike | Ledger | None, options: Options, *, updates_per_epoch: int,
                 n_parameters: int = 0, peak_rate: float | None = None, main: bool = True):
        self._owner = folder if folder is None or isinstance(folder, Ledger) else Ledger(folder)
        self.epochs, self.updates_per_epoch = options.epochs, updates_per_epoch
        self.n_parameters, self.peak_rate, self.main = n_parameters, peak_rate, main
        self.terminal = main and sys.stderr.isatty()  # where a bar is shown
        own = self._owner and self._owner.path
        self._lines: list[dict] = []
        self._bar, self._stack = tqdm(disable=True), ExitStack()
        opening, package = {}, options.track or ("wandb" if options.enable_wandb else None)
        if main and (log_dir := options.log_dir or (own and own / "tensorboard")):
            opening["tensorboardX"] = partial(_Board, log_dir)
        if main and package:
            opening[package] = partial(_open_run, package, options, own)
        opened = {name: self._outside(name, call) for name, call in opening.items()}
        self._records = {name: record for name, record in opened.items() if record is not None}
        self._keeper = package if options.wandb_ckpt and package else ""
        if self.terminal:
            self._stack.enter_context(logging_redirect_tqdm(loggers=[logger]))  # log lines go above the bar
            # A forked loader process has a copy of the bar as it was, and would draw that below its lines.
            os.register_at_fork(after_in_child=self._stack.close)

    # --------------------------------------------------------------------------------------- the run's start

    def events(self) -> list[dict]:
        """The incidents of the run so far."""
        return read_json_lines(self._owner.path / "events.jsonl") if self._owner else []

    def resume(self, first_epoch: int) -> None:
        """Keep the lines of log.txt before `first_epoch` (from 0); those after it will be made again."""
        if self._owner is not None:
            earlier = {line["epoch"]: line for line in read_json_lines(self._owner.path / "log.txt")
                       if isinstance(line.get("epoch"), int) and line["epoch"] < first_epoch}
            self._lines = [earlier[epoch] for epoch in sorted(earlier)]
            self._write("log.txt", self._write_log)

    def write_setup(self, config_yaml: str, data: Mapping[str, object], **more: object) -> None:
        """config.yaml (options and origins), data.json (images and classes) and environment.json."""
        self._write("config.yaml", lambda path: write_text(path, config_yaml))
        self._write("data.json", lambda path: write_json(path, data))
        self._write("environment.json", lambda path: write_json(path, environment() | more))

    # --------------------------------------------------------------------------------------------- the epoch

    def start_epoch(self, epoch: int, first_update: int = 0) -> None:
        """`first_update` is the first update within the epoch, above 0 after resuming in its middle."""
        # Not dynamic_ncols, which draws nothing where a terminal does not know its width (containers).
        self._bar = tqdm(total=self.updates_per_epoch, initial=first_update, leave=False, miniters=1,
                         ncols=min(shutil.get_terminal_size().columns, 140), disable=not self.terminal,
                         desc=f"epoch {epoch + 1}/{self.epochs}",
                         bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}")

    def tick(self) -> None:
        """One update is done; moves the bar only."""
        self._bar.update()

    def progress(self, p: Progress) -> None:
        """Show the figures so far: every print_freq updates and at the end of an epoch."""
        done, left = p.next_update - p.first_update, self.epochs * self.updates_per_epoch - p.next_update
        found, rate = p.figures, p.figures["images_per_second"]
        mfu = f"MFU {100 * rate / self.peak_rate:.0f} %  " if self.peak_rate else ""
        values = (f"loss {p.recent_loss:.4f}  lr {found['lr']:.3g}  {rate:.1f} img/s  {mfu}data wait "
                  f"{100 * found['data_wait']:.0f} %  ETA {duration(left * p.seconds / max(done, 1))}")
        if self.terminal:
            self._bar.set_postfix_str(values)
        else:
            logger.info("epoch %d/%d  update %d/%d  %s", p.epoch + 1, self.epochs,
                        p.next_update - p.epoch * self.updates_per_epoch, self.updates_per_epoch, values)
        self._scalars({"train/loss": p.recent_loss} | {f"train/{name}": found[name] for name in (
            "lr", "weight_decay", "grad_norm", "images_per_second", "data_wait")}, p.next_update)

    def end_epoch(self, p: Progress, results: Mapping[str, float | None], seconds: float) -> None:
        """Write the epoch's line to log.txt.

        Args:
            p: of the whole epoch.
            results: test_loss, test_acc1, test_acc5, the same with `_ema`, and whatever else belongs there.
            seconds: of the epoch with its evaluation.
        """
        self._bar.close()
        line = {f"train_{name}": value for name, value in p.figures.items()} | dict(results) | {
            "epoch": p.epoch, "update": p.next_update, "n_parameters": self.n_parameters,
            "nonfinite_updates": p.nonfinite, "seconds": seconds}
        line |= {"train_mfu": p.figures["images_per_second"] / self.peak_rate} if self.peak_rate else {}
        # JSON has no NaN or infinity: they become null.
        line = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
        self._lines = [old for old in self._lines if old["epoch"] < p.epoch] + [line]
        self._write("log.txt", self._write_log)
        self._scalars({f"epoch/{k}": line[k] for k in line if k not in ("epoch", "update")}, p.next_update)
        shown = [f"{words} {line[name]:.2f}" for name, words in SCORES.items() if line.get(name) is not None]
        logger.info("epoch %d/%d done in %s  %s", p.epoch + 1, self.epochs, duration(seconds),
                    "  ".join([f"train loss {p.figures['loss']:.4f}", *shown]))

    # --------------------------------------------------------------------------------- incidents and the end

    def incident(self, kind: str, sentence: str, **more: object) -> None:
        """Log something out of the ordinary and keep it in events.jsonl."""
        if self.main:
            logger.warning(sentence)
        record = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind, "message": sentence, **more}
        self._write("events.jsonl", lambda path: append_json_line(path, record))

    def log_checkpoint(self, path: str | os.PathLike) -> None:
        """Hand a checkpoint to the tracking package where that was asked for."""
        if self._keeper in self._records and Path(path).exists():
            record = self._records[self._keeper]
            self._outside(self._keeper, partial(record.log_artifact, str(path), type="model"))

    def close(self) -> None:
        """Close the bar and the writers; may be called twice."""
        self._bar.close()
        for name, record in self._records.items():
            self._outside(name, record.finish)  # a full disk shows here
        self._records = {}
        self._stack.close()

    def _scalars(self, values: Mapping[str, object], update: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for name, record in self._records.items():
            self._outside(name, partial(record.log, numbers, step=update))

    @staticmethod
    def _outside(name: str, call: Callable[[], Any]) -> Any:
        """What `call` gives; nothing that a service outside this project raises ends a training."""
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                return call()
        except ImportError:
            logger.warning("%s is not installed (pip install %s); the run continues without it.", name, name)
        except Exception as error:  # of any type: a missing login, a lost network, a full disk
            logger.warning("%s failed (%s); the run continues without this record.", name, error)
        return None

    def _write_log(self, path: Path) -> None:
        write_text(path, "".join(json.dumps(line) + "\n" for line in self._lines))

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        if self._owner is not None:
            try:
                write(self._owner.own() / name)
            except OSError as error:
                logger.error(f"{name} was not written in {self._owner.path}: {error.strerror}; the run "
                             "continues.")


class _Board:
    """TensorBoard's files, with the calls of the packages that track runs."""

    def __init__(self, folder: str | os.PathLike):
        from tensorboardX import SummaryWriter
        self.writer = SummaryWriter(str(folder))
        self.finish = self.writer.close

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)


def _open_run(package: str, options: Options, folder: Path | None) -> Any:
    """A run of `wandb` or `trackio`: their `log`, `log_artifact` and `finish` are the same."""
    where = {"dir": folder} if package == "wandb" else {}  # trackio keeps all runs of a project together
    return importlib.import_module(package).init(
        project=options.project, name=options.exp_name, config=asdict(options), resume="allow", **where)
