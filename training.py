"""Training: one run from its first update to its last, with what it saves, and the command around it."""
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from pathlib import Path

import torch

import engine
import native
from common.errors import Failure, UserError
from common.ledger import Ledger
from common.log import logger
from common.outcome import ExitCode, Outcome
from common.text import plural
from config.parse import Resolved
from launch.process import Process
from launch.stop import OTHERS, StopRequest
from launch.watchdog import Watchdog
from optim.ema import Ema
from optim.finite import FiniteWatch
from optim.update import Update, UpdateStats
from plan import Classification, FindData, Plan, compiled, find_data, plan_run, rate_at_peak, set_numerics
from report.page import write_report
from run.checkpoint import Checkpoints, Loaded, open_folder, state_bytes
from run.folder import RunFolder
from run.log import Tracker
from run.start import code_version, kernels, process_problems
from run.state import BEST, BEST_EMA, Parts, Position, Setup, State, collect, finished, restore

MakeTask = Callable[[Plan, Process, State | None], engine.Task]


class Trainer(engine.Observer):
    """One run, on every rank, with files on rank 0 alone: build, fit, save, roll back.

    `parts` is what it saves, by the names of `run.state.TABLE`; `position` says where it stands.

    Args:
        task: what is learned (see `engine.Task`), made for the same `plan`, `process` and `state`.
        state: of the checkpoint that is resumed (see `run.state`); None for a new run.
        folder: the run folder, on rank 0; None where nothing is kept.
    """

    def __init__(self, task: engine.Task, plan: Plan, process: Process, *, stop: StopRequest,
                 watchdog: Watchdog, state: State | None = None, folder: Ledger | None = None):
        options, data, updates = plan.options, plan.data, plan.batch.updates_per_epoch
        self.task, self.model, self.options, self.process = task, task.model, options, process
        self.stop, self.watchdog, self.checkpoints = stop, watchdog, None
        if folder is not None and options.save_ckpt:
            self.checkpoints = Checkpoints(folder, keep=options.save_ckpt_num, failed=self._note_failed_save)
        set_numerics(options)
        # All ranks compute as rank 0 does, and a resumed run as the one that was saved.
        saved_paths = (state or {}).get("code_paths") or {}
        paths = process.on_rank_zero(lambda: native.attach(self.model, saved_paths))
        self.code_paths = paths if process.is_main else native.attach(self.model, paths)
        torch.set_num_threads(process.broadcast_object(torch.get_num_threads()))
        # Before it is copied for the average, which then computes on the same.
        self.code_paths |= compiled(self.model, options, process, saved_paths)
        average_on = "cpu" if options.model_ema_force_cpu else None
        self.ema = Ema(self.model, options.model_ema_decay, average_on) if options.model_ema else None
        self.tracker = Tracker(
            folder, options, updates_per_epoch=updates, main=process.is_main,
            n_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            peak_rate=rate_at_peak(self.model, options, process))
        wrapped = process.wrap(self.model)
        update = Update(wrapped, task.optimizer, task.schedule, options, ema=self.ema,
                        agree=lambda flags: process.all_reduce_(flags, "min"))
        self.loop = engine.Loop(
            model=wrapped, task=task, update=update, watch=FiniteWatch(options.on_nonfinite), process=process,
            updates_per_epoch=updates, print_freq=options.print_freq, path_of=plan.train.path)
        self.position = Position(updates_per_epoch=updates, epoch=options.start_epoch - 1,
                                 update=options.start_epoch * updates)
        self.setup = Setup(
            global_batch=plan.batch.global_batch, images=len(plan.train), classes=data.class_names,
            order=getattr(plan.train, "order", ""), args=plan.resolved.to_dict(), version=code_version(),
            code_paths=self.code_paths, threads=torch.get_num_threads(), kernels=kernels(process.device))
        self.parts: Parts = {
            "position": self.position, "model": self.model, "model_ema": self.ema and self.ema.module,
            "optimizer": update.optimizer, "scaler": update.scaler, "policy": self.loop.watch,
            "setup": self.setup}
        self._unreadable = {path for event in self.tracker.events() if event.get("kind") == "unreadable_image"
                            for path in event.get("images", ())}
        if state is not None:
            self.load_state_dict(state)

    # The run

    def fit(self) -> Outcome:
        """Train to the last epoch: DONE, or PAUSED when the run was saved on request and can be resumed.

        Raises UserError when non-finite numbers end the run.
        """
        at, epochs = self.position, self.options.epochs
        if self.setup.other_images:
            self.on_incident("images_changed", self.setup.other_images, update=at.update)
        while at.begun < epochs:
            started = time.time()
            self.tracker.start_epoch(at.begun, at.update_in_epoch)
            progress = engine.train_one_epoch(
                self.loop, self, epoch=at.begun, first_update=at.update_in_epoch,
                sums=at.sums if self.process.is_main else None)
            at.update, at.sums = progress.next_update, progress.sums
            rolled_back = progress.outcome is Outcome.ROLLED_BACK and self.roll_back()
            if progress.outcome in (Outcome.FAILED, Outcome.ROLLED_BACK) and not rolled_back:
                raise UserError(f"training ended at update {at.update}: too many non-finite losses or "
                                "gradients, or no checkpoint to roll back to; "
                                f"{Path(self.options.output_dir, 'events.jsonl')} names the updates, images "
                                "and modules; lower --lr, lengthen --warmup_epochs, or train without "
                                "--use_amp.", code="nonfinite")
            if progress.outcome is Outcome.PAUSED or self.stop.agreed(self.process):
                return self._pause()
            if at.update_in_epoch < self.loop.updates_per_epoch:
                continue  # rolled back within the epoch
            if self._is_saved(at.begun):
                self.save()  # an evaluation may fail, and the epoch's work must not go with it
            figures = self.evaluate()
            if figures is None:
                return self._pause()
            if self._finish_epoch(progress, figures, time.time() - started) and at.begun < epochs:
                return Outcome.PAUSED
        self.process.on_rank_zero(self._insist_on_a_checkpoint)
        return Outcome.DONE

    def evaluate(self) -> engine.Figures | None:
        """Figures of the weights and, if asked for, of their average; {} without evaluation, None when it was
        left."""
        if self.options.disable_eval:
            return {}
        average = [("_ema", self.ema.module)] if self.ema is not None and self.options.model_ema_eval else []
        return self.task.evaluate([("", self.model), *average], self, self.position.update)

    def state_dict(self) -> State:
        """Everything that resuming the run needs."""
        return collect(self.parts)

    def load_state_dict(self, state: State, names: Collection[str] = ()) -> None:
        """Stand where `state` was saved, with the parts of these names or with all.

        Raises UserError when it does not fit the data, model or optimizer.
        """
        state = {**state, "model_ema": state.get("model_ema") or state.get("model")}
        try:
            restore(state, {name: part for name, part in self.parts.items() if name in (names or self.parts)})
        except UserError:
            raise
        except Exception as error:  # of any type, for tensors that do not fit and entries from elsewhere
            raise UserError("the checkpoint's weights or optimizer state do not fit --model "
                            f"{self.options.model} and --opt {self.options.opt}: "
                            f"{' '.join(str(error).split())[-200:]}.", code="invalid_checkpoint") from error

    def save(self, best: Mapping[str, float] | None = None, wait: bool = False) -> None:
        """Save the epoch that was finished last, or the one under way when it has sums; see
        `Checkpoints.save`."""
        self.on_phase("saving", self.position.update)
        if self.checkpoints is not None:
            self.checkpoints.save(self.state_dict(), best=best, wait=wait)

    def roll_back(self) -> bool:
        """Take the weights of the last good checkpoint and continue with the next data, not with the same;
        False where there is none."""
        update = self.position.update
        loaded = self.process.on_rank_zero(lambda: self.checkpoints and self.checkpoints.newest_valid())
        if loaded is None:
            return False
        self.load_state_dict(loaded.state, ("model", "model_ema", "optimizer", "scaler"))
        earlier = loaded.state["update"]
        self.on_incident("rollback", f"Rolled back to the weights of update {earlier}; training continues "
                         f"with the data of update {update}.", update=update, weights_of_update=earlier)
        return True

    def close(self) -> None:
        """End the save under way, the loader workers and the records. Left to the garbage collector, the
        workers' queues close before they are asked to end, and the program waits 5 s for each of them."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        for loader in self.task.loaders:
            loader.close()
        self.tracker.close()

    # The engine's observer

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
            self.stop.request(OTHERS)
        elif saves and at.update_in_epoch < self.loop.updates_per_epoch:
            at.sums = sums()
            self.save()
        return bool(stops)

    def on_progress(self, progress: engine.Progress) -> None:
        """Pass a line of figures to the console."""
        self.tracker.progress(progress)

    def on_nonfinite(self, record: dict) -> None:
        """Keep the report of an update that was not applied: that of the first rank whose images show it."""
        records = self.process.all_gather_object(record)
        rank = next((rank for rank, found in enumerate(records) if found["reproduced"]), 0)
        module = f", first in module {records[rank]['first_module']}" if records[rank]["first_module"] else ""
        self.on_incident("nonfinite", f"Update {record['update']} was not applied: its loss or gradient was "
                         f"not finite{module}; next: {record['action']}.", rank=rank, **records[rank])

    def on_incident(self, kind: str, sentence: str, **more: object) -> None:
        """Log something out of the ordinary and keep it in events.jsonl."""
        self.tracker.incident(kind, sentence, **more)

    # Details

    def _note_failed_save(self, sentence: str) -> None:
        self.on_incident("save_failed", sentence, update=self.position.update)

    def _is_saved(self, epoch: int) -> bool:
        return (epoch + 1) % self.options.save_ckpt_freq == 0 or epoch + 1 == self.options.epochs

    def _pause(self) -> Outcome:
        self.stop.request(OTHERS)  # unless this one has a reason of its own
        self._report_unreadable()
        self.save(wait=True)
        return Outcome.PAUSED

    def _finish_epoch(self, progress: engine.Progress, figures: engine.Figures, seconds: float) -> bool:
        """Log and save; the epoch counts as finished from then on. True when the run was asked to stop."""
        self._report_unreadable()
        at = self.position
        at.epoch, at.sums = at.begun, None
        scores = {BEST: figures.get(self.task.score), BEST_EMA: figures.get(f"{self.task.score}_ema")}
        files = self.checkpoints.better(scores) if self.checkpoints is not None else {}
        # Asked once: a signal that comes after this is seen at the next update, when it can be saved again.
        stops = self.stop.agreed(self.process)
        self.tracker.end_epoch(progress, figures, seconds=seconds)
        if stops or files or self._is_saved(at.epoch):
            self.save(files, wait=stops or at.begun == self.options.epochs)
        return stops

    def _insist_on_a_checkpoint(self) -> None:
        if self.checkpoints is not None and self.checkpoints.unsaved:
            raise Failure("The run was trained to the end, but its last checkpoint could not be saved: make "
                          f"room in {self.options.output_dir} and start the same command again, which "
                          "resumes the newest one there.", code="unsaved")

    def _report_unreadable(self) -> None:
        """Report each image that could not be read once per run."""
        mine = [image for loader in self.task.loaders for image in loader.take_unreadable().items()]
        found = dict(image for part in self.process.all_gather_object(mine) for image in part)
        for path in sorted(found.keys() - self._unreadable):
            self._unreadable.add(path)
            self.on_incident("unreadable_image", found[path], epoch=self.position.begun, images=[path])


# ----------------------------------------------------------------------------------------- the command

def train(resolved: Resolved, process: Process, watchdog: Watchdog, *,
          data: FindData = find_data, task: MakeTask = Classification) -> ExitCode:
    """Train as `resolved` says, or resume the run in its folder; returns the exit code.

    `data` and `task` say what is learned (see `engine.Task`).
    """
    options = resolved.options
    folder = RunFolder(options.output_dir) if options.output_dir and process.is_main else None
    try:
        loaded = process.on_rank_zero(lambda: open_folder(resolved, folder))
        state = loaded.state if loaded else None
        if loaded is not None and finished(loaded.state, options.epochs):
            logger.info("This run has finished its %s (%s): raise --epochs to train on, or evaluate its best "
                        "weights with --eval true.", plural(options.epochs, "epoch"), loaded.path)
            return ExitCode.DONE
        with StopRequest(options.stop_before_end) as stop:
            plan = plan_run(resolved, process, state, data=data)
            # Not before: a start that is refused leaves nothing there.
            watchdog.record_in(folder or options.output_dir)
            for note in (*plan.data.notes, plan.batch.equation, *plan.batch.notices,
                         *process_problems(process)):
                logger.info(note)
            with closing(Trainer(task(plan, process, state), plan, process, stop=stop, watchdog=watchdog,
                                 state=state, folder=folder)) as trainer:
                if process.is_main:
                    _introduce(trainer, plan, loaded)
                return _fit(trainer, folder)
    finally:
        if folder is not None:
            folder.release()


def _introduce(trainer: Trainer, plan: Plan, loaded: Loaded | None) -> None:
    """What a person should know at the start, and the files that describe the run."""
    options, process, at = trainer.options, trainer.process, trainer.position
    trainer.tracker.write_setup(
        plan.resolved.to_yaml(), plan.data.describe(), world_size=process.world_size,
        device=str(process.device), backend=process.backend, code_paths=trainer.code_paths,
        version=code_version(), global_batch=plan.batch.global_batch)
    if loaded is not None:
        logger.info("Resuming at epoch %d, update %d from %s", at.begun + 1, at.update, loaded.path)
        epochs = (loaded.state["args"] or {}).get("epochs", options.epochs)
        if notice := trainer.task.schedule.stretched(epochs, at.update):
            logger.info(notice)
    if trainer.checkpoints is not None:
        state = trainer.state_dict()  # AdamW's two moments come with the first update
        size = state_bytes(state) + (0 if state["optimizer"]["state"] else 2 * state_bytes(state["model"]))
        text, enough = trainer.checkpoints.disk_estimate(size, options.epochs)
        logger.info("The %s%s", text, "" if enough else ": that is not enough, free some or keep fewer")
    else:
        logger.info("Nothing of this run is saved: give --output_dir (and leave --save_ckpt true) to keep "
                    "checkpoints.")


def _fit(trainer: Trainer, folder: RunFolder | None) -> ExitCode:
    """Train to the end, with the run folder's records around it."""
    options, checkpoints, at = trainer.options, trainer.checkpoints, trainer.position
    if folder is not None:
        trainer.tracker.resume(at.begun)
        folder.begin(update=at.update, epoch=at.begun, resume=options.resume[0] if options.resume else "")
    outcome, cause = Outcome.FAILED, ""
    try:
        outcome = trainer.fit()
        cause = trainer.stop.reason if outcome is Outcome.PAUSED else ""
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise
    finally:
        if folder is not None:
            folder.end(outcome, update=at.update, epoch=at.begun, cause=cause)
    if outcome is Outcome.PAUSED:
        # Not a warning, which every rank would give: all stop at the same update.
        logger.info("Stopped at update %d (%s); the same command resumes it from %s.", at.update, cause,
                    "the newest that was saved" if checkpoints and checkpoints.unsaved else "there")
        return ExitCode.PAUSED
    try:
        if checkpoints is not None:
            for path in (*checkpoints.best_files(), *checkpoints.numbered()[-1:]):
                trainer.tracker.log_checkpoint(path)
        if folder is not None:
            logger.info("Report: %s", write_report(folder.own()))
    except (UserError, OSError) as error:  # a finished training must not fail for the lack of a page
        logger.warning("No report page was written: %s", error)
    return ExitCode.DONE
