"""A training run from its options: folder → checkpoint → data → batch → model → optimizer → restore → epochs → report."""
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import timm
import torch

import engine
import models  # noqa: F401  registers the architectures with timm
import native
from common.errors import UserError
from common.files import read_json_lines
from common.ledger import restarts
from common.log import logger
from common.outcome import ExitCode, Outcome
from common.random import key
from common.safe_load import safe_torch_load
from common.text import plural, printable
from config.options import Options
from config.parse import Resolved
from config.rules import BatchPlan, plan_batch, resumed_schedule_notice, small_data_notice, validate_after_index
from datasets.build import Data, build_data, check_sample, eval_loader, train_loader
from datasets.dataset import Batch, ImageLoader
from datasets.device import EvalPrepare, TrainPrepare
from datasets.sampler import GlobalBatchSampler
from evaluation import amp_dtype, evaluate_checkpoints, strange_weights
from launch.process import Process
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from models.compile import compile_model
from models.download import fetch_published, local_file
from models.weights import load_for_model
from optim.build import build_loss, build_optimizer
from optim.ema import Ema, half_life_warning
from optim.finite import FiniteWatch, NonfinitePolicy
from optim.schedule import build_schedule
from optim.update import Update, UpdateConfig, UpdateStats
from report.page import write_report
from run.checkpoint import Checkpoints, Loaded, file_name
from run.folder import RunFolder
from run.log import Tracker, WandbRun
from run.start import cpus_per_process, start_warnings
from run.state import (BEST, BEST_EMA, Best, DataIdentity, Environment, Part, Position, State, check_resumable,
                       check_same_run, collect, finished, restore)


class Classification:
    """The task of images with one class each: cross-entropy in training, top-1 and top-5 in evaluation."""
    score = "test_acc1"

    def __init__(self, options: Options, data: Data, process: Process, drop_draws: int):
        self.seed, self.drop_draws, self.autocast_dtype = options.seed, drop_draws, amp_dtype(options)
        self.prepare = TrainPrepare(options, data.num_classes, process.device)
        self.criterion = build_loss(options)
        self.evaluation = engine.Evaluation(EvalPrepare(options, process.device), process.device, process=process,
                                            expected=len(data.val) if data.val else None)
        self.loaders = [eval_loader(data, options, process.rank, process.world_size)] if data.val else []

    def losses(self, model: torch.nn.Module, batch: Batch, update: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean loss of a micro-batch, and its top-1 hits where nothing is mixed."""
        images, targets = self.prepare(batch)
        draws = engine.drop_draws(self.drop_draws, self.seed, update, batch, images.device)
        with engine.autocast(images.device, self.autocast_dtype):
            logits = model(images, **draws)
        hits = None if targets.is_floating_point() else (logits.detach().argmax(1) == targets).sum()
        return self.criterion(engine.full_precision(logits), targets), hits

    def evaluate(self, networks: Sequence[tuple[str, torch.nn.Module]], observer: engine.Observer,
                 update: int) -> engine.Figures | None:
        """All networks in one pass, in true float32 whatever they are trained in."""
        with native.packed(*(network for _, network in networks)):
            results = engine.evaluate(networks, self.loaders[0], replace(self.evaluation, observer=observer), update)
        for result in results:
            if result.nonfinite:
                observer.on_incident("nonfinite_outputs", f"{result.nonfinite} of {result.images} evaluated images gave "
                                     "outputs that are not numbers; they count as incorrect.", update=update)
        return {f"test_{name}{result.name}": value for result in results for name, value in (
            ("loss", result.loss), ("acc1", result.acc1), ("acc5", result.acc5))} or None


class Trainer(engine.Observer):
    """One run, on every rank, with files on rank 0 alone: build, fit, save, roll back.

    `parts` is what it saves, by the names of `run.state.TABLE`; `position` says where it stands.

    Args:
        planned: options with the batch in them, and the data.
        state: of the checkpoint that is resumed (see `run.state`); None for a new run.
        folder: the run folder, on rank 0; "" where nothing is kept.
        checkpoints: None where nothing is saved.
    """

    def __init__(self, planned: "Planned", process: Process, *, stop: StopRequest, watchdog: Watchdog,
                 state: State | None = None, folder: str = "", checkpoints: Checkpoints | None = None):
        options, data, updates = planned.options, planned.data, planned.updates_per_epoch
        self.options, self.process, self.stop, self.watchdog = options, process, stop, watchdog
        self.folder, self.checkpoints = folder, checkpoints
        _set_numerics(options)
        self.model = build_model(options, data.num_classes).to(process.device)
        if state is None:
            load_start_weights(self.model, options, data, process)
        paths = native.attach(self.model, (state or {}).get("code_paths"))
        self.ema = Ema(self.model, options.model_ema_decay, "cpu" if options.model_ema_force_cpu else None) \
            if options.model_ema else None
        self.task = Classification(options, data, process, getattr(self.model, "num_drop_draws", 0))
        self.tracker = _tracker(planned, process, folder, self.model)
        wrapped = process.wrap(_compiled(self.model, options, process) if options.compile else self.model)
        config = UpdateConfig(update_freq=planned.batch.update_freq, clip_grad=options.clip_grad, clip_by=options.clip_by,
                              clip_mode=options.clip_mode, loss_scaling=amp_dtype(options) == torch.float16)
        update = Update(wrapped, build_optimizer(self.model, options), build_schedule(options, updates), config,
                        ema=self.ema, agree=lambda flags: process.all_reduce_(flags, "min"))
        sampler = GlobalBatchSampler(len(data.train), planned.batch.global_batch, planned.batch.batch_size,
                                     planned.batch.update_freq, process.rank, process.world_size, options.seed)
        policy = NonfinitePolicy(options.on_nonfinite)
        self.loop = engine.Loop(
            model=wrapped, plain=self.model, task=self.task, update=update, loader=train_loader(data, options, sampler),
            sampler=sampler, watch=FiniteWatch(policy), process=process, updates_per_epoch=updates,
            print_freq=options.print_freq, path_of=data.train.path)
        self.position = Position(updates, options.start_epoch - 1, options.start_epoch * updates)
        self.best = Best()
        self.data = DataIdentity(planned.batch.global_batch, len(data.train), data.class_names)
        self.parts: dict[str, Part | None] = {
            "position": self.position, "model": self.model, "model_ema": self.ema, "optimizer": update.optimizer,
            "scaler": update.scaler, "policy": policy, "best": self.best, "data": self.data,
            "environment": Environment(planned.args, paths, torch.get_num_threads(), code_version())}
        self._unreadable = {path for event in read_json_lines(Path(folder, "events.jsonl") if folder else os.devnull)
                            for path in event.get("images", ()) if event.get("kind") == "unreadable_image"}
        if state is not None:
            self.load_state_dict(state)

    # ------------------------------------------------------------------------------------------------- the run

    def fit(self) -> Outcome:
        """Train to the last epoch: DONE, or PAUSED when the run was saved on request and can be resumed.

        Raises UserError when non-finite numbers end the run.
        """
        at, epochs = self.position, self.options.epochs
        self._compare_images()
        while at.begun < epochs:
            started = time.time()
            if self.process.is_main:
                self.tracker.start_epoch(at.begun, at.update_in_epoch)
            progress = engine.train_one_epoch(self.loop, self, epoch=at.begun, first_update=at.update_in_epoch,
                                              sums=at.sums if self.process.is_main else None)
            at.update, at.sums = progress.next_update, progress.sums
            if progress.outcome is Outcome.FAILED:
                raise UserError(f"training ended at update {at.update}: too many non-finite losses or gradients; "
                                f"{self._where('events.jsonl')} names the updates, images and modules; lower --lr, "
                                "or train without --use_amp.", code="nonfinite")
            if progress.outcome is Outcome.ROLLED_BACK:
                self.roll_back()
            if progress.outcome is Outcome.PAUSED or self.stop.agreed(self.process):
                return self._pause()
            if at.update_in_epoch < self.loop.updates_per_epoch:
                continue  # rolled back within the epoch
            if self._saves_epoch(at.begun):
                self.save()  # an evaluation may fail, and the epoch's work must not go with it
            figures = self.evaluate()
            if figures is None:
                self.stop.request("another process was asked to stop")  # unless this one has a reason of its own
                return self._pause()
            if self._finish_epoch(progress, figures, time.time() - started) and at.begun < epochs:
                return Outcome.PAUSED
        return Outcome.DONE

    def evaluate(self) -> engine.Figures | None:
        """Figures of the weights and, if asked for, of their average; {} without evaluation, None when it was left."""
        if self.options.disable_eval:
            return {}
        with_ema = self.ema is not None and self.options.model_ema_eval
        networks = [("", self.model), *([("_ema", self.ema.module)] if with_ema else [])]
        return self.task.evaluate(networks, self, self.position.update)

    def state_dict(self) -> State:
        """Everything that resuming the run needs."""
        return collect(self.parts)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Stand where `state` was saved. Raises UserError when it does not fit the data, model or optimizer."""
        self._restore(state, self.parts)

    def save(self, best: Mapping[str, float] | None = None, wait: bool = False) -> None:
        """Save the epoch that was finished last, or the one under way when it has sums; see `Checkpoints.save`."""
        at, begun = self.position, self.position.sums is not None
        self.on_phase("saving", at.update)
        if self.checkpoints is not None:
            self.checkpoints.save(self.state_dict(), epoch=at.begun if begun else at.epoch,
                                  update=at.update if begun else None, best=best, wait=wait)
            for sentence in self.checkpoints.failures():
                self.on_incident("save_failed", sentence, log=False, update=at.update)

    def roll_back(self) -> None:
        """Take the weights of the last good checkpoint and continue with the next data, not with the same."""
        update = self.position.update
        find = self.checkpoints.newest_valid if self.checkpoints is not None else lambda: None
        loaded = self.process.on_rank_zero(find)
        if loaded is None:
            raise UserError(f"the loss or gradient was non-finite several times up to update {update} and there is no "
                            "checkpoint to roll back to: lower --lr, lengthen --warmup_epochs, or train without --use_amp.",
                            code="nonfinite")
        names = ("model", "model_ema", "optimizer", "scaler")
        self._restore(loaded.state, {name: self.parts[name] for name in names})
        self.on_incident("rollback", f"Rolled back to the weights of update {loaded.state['update']}; training continues "
                         f"with the data of update {update}.", update=update, weights_of_update=loaded.state["update"])

    def close(self) -> None:
        """End the loader workers and the records. Left to the garbage collector, the workers' queues close before they
        are told to end, and the program waits 5 s for each of them."""
        for loader in self._loaders:
            loader.close()
        self.tracker.close()

    # ------------------------------------------------------------------------------------- the engine's observer

    def on_phase(self, phase: str, update: int) -> None:
        """Tell the watchdog."""
        self.watchdog.phase(phase, update)

    def leaves_evaluation(self) -> bool:
        """Whether the run was asked to stop: the evaluation is made when it is resumed."""
        return self.stop.heard(self.process)

    def after_update(self, update: int, stats: UpdateStats, sums: engine.SumsOverRanks) -> bool:
        """Agree with the other ranks whether to save or to stop at this boundary."""
        at, at.update = self.position, update + 1
        self.tracker.tick()
        due = self.checkpoints is not None and self.checkpoints.due(self.options.save_every_minutes)
        flags = torch.tensor([int(self.stop.requested), int(due)], dtype=torch.int32)
        stops, saves = self.process.all_reduce_(flags, "max").tolist()
        if stops:
            self.stop.request("another process was asked to stop")
        elif saves and at.update_in_epoch < self.loop.updates_per_epoch:
            at.sums = sums()
            self.save()
        return bool(stops)

    def on_progress(self, progress: engine.Progress) -> None:
        """Pass a line of figures to the console."""
        if self.process.is_main:
            self.tracker.progress(progress)

    def on_nonfinite(self, record: dict) -> None:
        """Keep the report of an update that was not applied: that of the first rank whose images show it."""
        records = self.process.all_gather_object(record)
        rank = next((rank for rank, found in enumerate(records) if found["reproduced"]), 0)
        module = f", first in module {records[rank]['first_module']}" if records[rank]["first_module"] else ""
        self.on_incident("nonfinite", f"Update {record['update']} was not applied: its loss or gradient was not "
                         f"finite{module}; next: {record['action']}.", rank=rank, **records[rank])

    def on_incident(self, kind: str, sentence: str, log: bool = True, **more: object) -> None:
        """Log something out of the ordinary and keep it in events.jsonl."""
        if self.process.is_main:
            self.tracker.incident(kind, sentence, log=log, **more)

    # --------------------------------------------------------------------------------------------------- details

    @property
    def _loaders(self) -> list[ImageLoader]:
        return [self.loop.loader, *self.task.loaders]

    def _restore(self, state: Mapping[str, object], parts: Mapping[str, Part | None]) -> None:
        try:
            restore({**state, "model_ema": state.get("model_ema") or state.get("model")}, parts)
        except (RuntimeError, AttributeError, TypeError) as error:  # what torch raises for tensors that do not fit
            raise UserError(f"the checkpoint's weights do not fit --model {self.options.model}: "
                            f"{str(error).splitlines()[-1].strip()}", code="invalid_checkpoint") from None

    def _saves_epoch(self, epoch: int) -> bool:
        return (epoch + 1) % self.options.save_ckpt_freq == 0 or epoch + 1 == self.options.epochs

    def _pause(self) -> Outcome:
        self._report_unreadable()
        self.save(wait=True)
        return Outcome.PAUSED

    def _finish_epoch(self, progress: engine.Progress, figures: engine.Figures, seconds: float) -> bool:
        """Log and save; the epoch counts as finished from then on. True when the run was asked to stop."""
        self._report_unreadable()
        at = self.position
        at.epoch, at.sums = at.begun, None
        if self.checkpoints is not None:
            self.best.correct(self.checkpoints.failed_best())
        files = self.best.take(at.epoch, figures.get(self.task.score), figures.get(f"{self.task.score}_ema"))
        # Asked once: a signal that comes after this is seen at the next update, when it can be saved again.
        stops = self.stop.agreed(self.process)
        if self.process.is_main:
            self.tracker.end_epoch(progress, figures, seconds=seconds)
        if stops or files or self._saves_epoch(at.epoch):
            self.save(files, wait=stops or at.begun == self.options.epochs)
        return stops

    def _compare_images(self) -> None:
        """Report that images came or went since the checkpoint: too few to change the updates of an epoch, so that the
        run can be resumed, but every epoch's order is another one."""
        now, before = self.data.images, self.data.images_before
        if before not in (None, now):
            self.on_incident("images_changed", f"The training set has {now} images and had {before} when the checkpoint was "
                             "saved: the run is resumed with them, but not as an undisturbed one would continue; restore "
                             "the data set to have that.", update=self.position.update, images=now, before=before)

    def _report_unreadable(self) -> None:
        """Report each image that could not be read once per run: in training it was replaced by another."""
        mine = [(loader.images.path(index), reason) for loader in self._loaders for index, reason in loader.bad_images]
        for loader in self._loaders:
            loader.bad_images.clear()
        for path, reason in sorted({image for part in self.process.all_gather_object(mine) for image in part}):
            if path not in self._unreadable:
                self._unreadable.add(path)
                self.on_incident("unreadable_image", f"{printable(path)} could not be read ({reason}): it is replaced by "
                                 "another image in training and counts as incorrect in evaluation.",
                                 epoch=self.position.begun, images=[path])

    def _where(self, name: str) -> str:
        return f"{self.options.output_dir}/{name}" if self.options.output_dir else "the console output above"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a run is made of before there is a model: `options` have the batch and its learning rate in them, `args` are
    those that were asked for, plain values for checkpoints, and `config` the same as a recipe."""
    data: Data
    batch: BatchPlan
    options: Options
    updates_per_epoch: int
    args: dict
    config: str

    @property
    def notes(self) -> list[str]:
        """What a person should know about data and batch."""
        return [*self.data.notes, self.batch.equation, *self.batch.notices]


def plan_run(resolved: Resolved, process: Process, state: State | None, data: Data | None = None) -> Planned:
    """Index the images (unless `data` are given) and derive the batch; `state` is that of a run to resume."""
    options, state = resolved.options, state or {}
    if data is None:
        if not state:
            _check_start(options, process)
        data = process.local_first(lambda: build_data(
            options, train=True, evaluate=not options.disable_eval, rank_zero=process.local_rank == 0,
            class_names=state.get("classes")))
    batch = plan_batch(resolved, process.world_size, state.get("global_batch"))
    updates = validate_after_index(options, batch, len(data.train), data.num_classes)
    small = None if state else small_data_notice(options, batch, len(data.train))
    batch = replace(batch, notices=(*batch.notices, small)) if small else batch
    return Planned(data=data, batch=batch, options=batch.apply(options), updates_per_epoch=updates,
                   args=resolved.to_dict(), config=resolved.to_yaml())


def _check_start(options: Options, process: Process) -> None:
    """Refuse what would otherwise be found only when all images have been indexed, minutes later."""
    build_optimizer(torch.nn.Linear(1, 1), replace(options, layer_decay=1.0))  # its name, and the packages it needs
    if options.finetune:
        process.on_rank_zero(lambda: bool(safe_torch_load(local_file(options.finetune))))


def build_model(options: Options, num_classes: int) -> torch.nn.Module:
    """The network of `--model`, freshly initialised from the seed: the same on every rank."""
    torch.manual_seed(key(options.seed, "init"))
    model = timm.create_model(options.model, num_classes=num_classes, drop_path_rate=options.drop_path,
                              layer_scale_init_value=options.layer_scale_init_value,
                              head_init_scale=options.head_init_scale)
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def load_start_weights(model: torch.nn.Module, options: Options, data: Data, process: Process) -> None:
    """Published or given weights to start from; rank 0 downloads, every node reads the file.

    Raises UserError when they keep their head and yet know next to nothing about the images.
    """
    if not options.pretrained and not options.finetune:
        return
    source = process.on_rank_zero(lambda: str(fetch_published(options.model)) if options.pretrained
                                  else local_file(options.finetune))
    report = load_for_model(model, source, model_key=options.model_key, prefix=options.model_prefix,
                            weights=options.weights, allow_partial=options.allow_partial, class_names=data.class_names,
                            new_head=True)
    if "head.weight" in report.missing or options.allow_partial:
        return
    evaluation = engine.Evaluation(EvalPrepare(options, process.device), process.device, process=process)
    strange = strange_weights(model, report.source_key, data, options, evaluation)
    if strange:
        raise UserError(f"{strange[:-1]}; --allow_partial true starts from them anyway.", code="strange_weights")


def _compiled(model: torch.nn.Module, options: Options, process: Process) -> torch.nn.Module:
    """The model for `--compile true`: compiled on all ranks or on none."""
    logger.info("Compiling the model, which takes minutes ...")
    shape = (options.batch_size, 3, options.input_size, options.input_size)
    return compile_model(model.train(), shape, amp_dtype(options),
                         lambda mine: bool(process.all_reduce_(torch.tensor([int(mine)]), "min").item()))


@cache
def code_version() -> str:
    """The commit of this code, with a + for local changes; "unknown" outside a git checkout."""
    try:
        text = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, text=True,
                              capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return text.strip()


def _set_numerics(options: Options) -> None:
    if options.deterministic:
        # Some versions of cuBLAS need this to be deterministic, and PyTorch then refuses matrix products without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # The older of PyTorch's two ways to say this: torch.export and torch.compile read it, and refuse a mix of both.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.fast_math


def _tracker(planned: Planned, process: Process, folder: str, model: torch.nn.Module) -> Tracker:
    options, main = planned.options, process.is_main
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    wandb = WandbRun(options.project, options.exp_name, planned.args, options.wandb_ckpt) \
        if options.enable_wandb and main else None
    return Tracker(folder if main and folder else None, epochs=options.epochs,
                   updates_per_epoch=planned.updates_per_epoch, n_parameters=size, num_workers=options.num_workers,
                   cpus=cpus_per_process(process.local_world_size), log_dir=options.log_dir if main else None,
                   wandb=wandb, terminal=None if main else False)


# --------------------------------------------------------------------------------------------------- the command


def train(resolved: Resolved, process: Process, watchdog: Watchdog) -> int:
    """Train as `resolved` says, or resume the run in its folder; returns the exit code."""
    options = resolved.options
    folder = RunFolder(options.output_dir) if options.output_dir and process.is_main else None
    checkpoints = Checkpoints(folder.path, keep=options.save_ckpt_num) if folder and options.save_ckpt else None
    try:
        loaded = process.on_rank_zero(lambda: _open_folder(resolved, folder))
        if loaded is not None and finished(loaded.state, options.epochs):
            logger.info("This run has finished its %s (%s); raise --epochs to train on. Evaluating it instead.",
                        plural(options.epochs, "epoch"), loaded.path)
            return _evaluate_finished(resolved, loaded, process, watchdog)
        with StopRequest(options.stop_before_end) as stop:
            planned = plan_run(resolved, process, loaded.state if loaded else None)
            watchdog.record_in(options.output_dir)  # not before: a start that is refused leaves nothing in the folder
            for note in planned.notes:
                logger.info(note)
            sample = check_sample(planned.data.train, 8) if process.is_main else None
            for warning in start_warnings(options, process, code_version(), sample):
                if process.is_main:
                    logger.warning(warning)
            trainer = Trainer(planned, process, stop=stop, watchdog=watchdog, state=loaded.state if loaded else None,
                              folder=options.output_dir if folder else "", checkpoints=checkpoints)
            try:
                _introduce(trainer, planned, loaded)
                return _fit(trainer, folder, loaded)
            finally:
                trainer.close()
    finally:
        if folder is not None:
            folder.release()


def _open_folder(resolved: Resolved, folder: RunFolder | None) -> Loaded | None:
    """Own the run folder (rank 0) and find the checkpoint to resume, if any."""
    if folder is None:
        return find_checkpoint(resolved, None)
    sentence = folder.lock()
    if sentence:
        logger.info(sentence)
    refusal = folder.reason_to_stop() if requeued() else None
    if refusal:
        raise UserError(refusal, code="not_restarted")
    checkpoints = Checkpoints(folder.path)
    checkpoints.sweep()
    loaded = find_checkpoint(resolved, folder)
    for name in checkpoints.set_aside_newer(loaded) if loaded else ():
        logger.warning("%s is newer than the checkpoint that is resumed and was renamed superseded-%s", name, name)
    return loaded


def find_checkpoint(resolved: Resolved, folder: RunFolder | None) -> Loaded | None:
    """The checkpoint to resume, None for a new run; nothing in the folder is changed."""
    options = resolved.options
    asked = options.resume[0] if options.resume else ""
    if folder is None:
        if not asked:
            return None
        if asked in ("latest", "best"):
            raise UserError(f"--resume {asked} looks in the run folder: give --output_dir.", code="missing_option")
    checkpoints = Checkpoints(folder.path if folder else ".")
    if not asked and not options.auto_resume:
        if checkpoints.numbered() or checkpoints.best():
            raise UserError(f"--auto_resume false, but {checkpoints.folder} holds the checkpoints of an earlier run; "
                            "choose another --output_dir.", code="other_run")
        return None
    # A requeued job repeats its command: what it began from then lies behind what it has saved here since.
    own = asked in ("", "latest", "best") or folder is not None and folder.already_went_on_from(asked)
    loaded = checkpoints.resolve(asked if asked in ("latest", "best") else "") if own else None
    if loaded is None and asked:
        loaded = checkpoints.resolve(local_file(asked))
    if loaded is None:
        return None
    check_resumable(loaded.state, loaded.path)
    for difference in check_same_run(loaded.state, resolved.to_dict(), loaded.path, explicit=not own):
        logger.warning("Resuming with another option: %s", difference)
    return loaded


def _schedule_notice(trainer: Trainer, state: State) -> str | None:
    """What another `--epochs` than the checkpoint's does to the learning rate."""
    options, at = trainer.options, trainer.position
    earlier = (state["args"] or {}).get("epochs", options.epochs)
    now, then = (build_schedule(replace(options, epochs=epochs), at.updates_per_epoch).lr(at.update)
                 for epochs in (options.epochs, earlier))
    return resumed_schedule_notice(epochs=options.epochs, earlier_epochs=earlier, lr=now, earlier_lr=then)


def _introduce(trainer: Trainer, planned: Planned, loaded: Loaded | None) -> None:
    """What a person should know at the start, and the files that describe the run."""
    options, process, tracker = trainer.options, trainer.process, trainer.tracker
    if loaded is not None:
        logger.info("Resuming at epoch %d, update %d from %s", trainer.position.begun + 1, trainer.position.update,
                    loaded.path)
        notice = _schedule_notice(trainer, loaded.state)
        if notice and process.is_main:
            logger.warning(notice)
    if not process.is_main:
        return
    tracker.write_setup(planned.config, planned.data.describe(), world_size=process.world_size, device=str(process.device),
                        backend=process.backend, code_paths=trainer.parts["environment"].code_paths,
                        version=code_version(), global_batch=trainer.data.global_batch)
    lags = options.model_ema and half_life_warning(options.model_ema_decay, options.epochs * planned.updates_per_epoch)
    if lags:
        logger.warning(lags)
    if options.num_workers > tracker.cpus:
        logger.info("--num_workers %d is more than the %s of this process; more than these load nothing faster.",
                    options.num_workers, plural(tracker.cpus, "CPU"))
    if trainer.checkpoints is not None:
        logger.info(trainer.checkpoints.disk_estimate(trainer.state_dict(), options.epochs))
    else:
        logger.warning("Nothing of this run is saved: give --output_dir (and leave --save_ckpt true) to keep checkpoints.")


def _fit(trainer: Trainer, folder: RunFolder | None, loaded: Loaded | None) -> ExitCode:
    """Train to the end, with the run folder's records around it."""
    options, checkpoints, tracker, at = trainer.options, trainer.checkpoints, trainer.tracker, trainer.position
    if folder is not None:
        tracker.resume(at.begun)
        folder.begin(update=at.update, epoch=at.begun, resume=options.resume[0] if options.resume else "",
                     automatic=requeued())
    if checkpoints is not None:
        trainer.best.correct(checkpoints.scores())
    outcome, cause, unsaved = Outcome.FAILED, "", False
    try:
        outcome = trainer.fit()
        cause = trainer.stop.reason if outcome is Outcome.PAUSED else ""
        unsaved = checkpoints is not None and checkpoints.newest != file_name(
            *((at.epoch,) if at.sums is None else (at.begun, at.update)))
        if unsaved and outcome is Outcome.DONE:
            outcome, cause = Outcome.FAILED, "the last checkpoint could not be saved"
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise
    finally:
        for sentence in checkpoints.close() if checkpoints is not None else ():
            trainer.on_incident("save_failed", sentence, log=False, update=at.update)
        if folder is not None:
            folder.end(outcome, update=at.update, epoch=at.begun, cause=cause)
        if checkpoints is not None and outcome is Outcome.DONE:
            for path in (checkpoints.folder / BEST, checkpoints.folder / BEST_EMA, *checkpoints.numbered()[-1:]):
                tracker.log_checkpoint(path)
        tracker.close()
    if outcome is Outcome.PAUSED:
        # Not a warning, which every rank would give: all stop at the same update.
        logger.info("Stopped at update %d (%s); the same command resumes it from %s.", at.update, cause,
                    "the newest checkpoint that was saved" if unsaved else "there")
        return ExitCode.PAUSED
    if unsaved:
        logger.error("The run was trained to the end, but its last checkpoint could not be saved: make room in %s and "
                     "start the same command again, which resumes the newest one there.", options.output_dir)
        return ExitCode.FAILED
    if folder is not None:
        _write_page(folder)
    return ExitCode.DONE


def requeued() -> bool:
    """Whether a scheduler, not a person, has started this attempt."""
    return restarts() > 0


def _write_page(folder: RunFolder) -> None:
    """The run's report page; a finished training must not fail for the lack of it."""
    try:
        logger.info("Report: %s", write_report([folder.path]))
    except (UserError, OSError) as error:
        logger.warning("No report page was written: %s", error)


def _evaluate_finished(resolved: Resolved, loaded: Loaded, process: Process, watchdog: Watchdog) -> int:
    """What starting a finished run again comes to: its best weights are evaluated, the last where no best are there."""
    options = resolved.options
    if options.disable_eval:
        return ExitCode.DONE
    folder = options.output_dir
    best = process.on_rank_zero(lambda: Checkpoints(folder).best() if folder else None)
    # Not what a fine-tuning began with, and in true float32 as after each epoch, whatever it was trained in.
    options = replace(options, eval=True, resume=(str(best or loaded.path),), finetune="", pretrained=False, use_amp=False,
                      fast_math=False)
    return evaluate_checkpoints(replace(resolved, options=options), process, watchdog)
