"""A training run from its options: folder → checkpoint → data → batch → model → optimizer → restore → epochs → report."""
import os
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch

import engine
import models  # noqa: F401  registers the architectures with timm
from common.errors import UserError
from common.random import key
from common.ledger import restarts
from common.log import logger
from common.safe_load import safe_torch_load
from datasets.build import Data, build_data, eval_loader, train_loader
from datasets.check import check_sample
from datasets.device import EvalPrepare, TrainPrepare
from datasets.sampler import GlobalBatchSampler
from evaluation import amp_dtype, evaluate_checkpoints, local_file
from launch import ExitCode
from launch.stop import StopRequest
from models.download import fetch_published
from native.paths import accelerate, code_paths, packed, use_code_paths
from models.compile import compile_model
from models.weights import load_for_model
from optim.build import build_optimizer, load_optimizer_state
from optim.ema import Ema, half_life_warning
from optim.finite import FiniteWatch, NonfinitePolicy
from optim.losses import build_loss
from optim.schedule import build_schedule
from optim.update import Update, UpdateConfig
from run.checkpoint import Checkpoints, Loaded, undisturbed
from config.rules import BatchPlan, plan_batch, resumed_schedule_notice, small_data_notice, validate_after_index
from run.folder import DONE, FAILED, PREEMPTED, RunFolder
from run.life import Fixed, Parts, Services, TrainingRun
from config.parse import Resolved
from run.preflight import cpus_per_process, start_warnings
from run.state import BEST, BEST_EMA, check_resumable, check_same_run, finished
from run.log import Tracker, WandbRun
from scoring import strange_weights
from report.page import write_report


def train(resolved: Resolved, process: Any, watchdog: Any) -> int:
    """Train as `resolved` says, or go on with the run in its folder; returns the exit code."""
    options = resolved.options
    folder = RunFolder(options.output_dir) if options.output_dir and process.is_main else None
    checkpoints = Checkpoints(folder.path, keep=options.save_ckpt_num) if folder and options.save_ckpt else None
    try:
        loaded = process.on_rank_zero(lambda: _open_folder(resolved, folder))
        if loaded is not None and finished(loaded.state, options.epochs):
            logger.info("This run has finished its %d epoch%s (%s); --epochs takes more. Evaluating it instead.",
                        options.epochs, "s" * (options.epochs > 1), loaded.path)
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
            services = Services(checkpoints, None, stop, watchdog, options.output_dir, process.on_rank_zero)
            run = build_run(resolved, process, loaded, services, planned)
            try:
                _tell(run, options, checkpoints)
                return _live(run, folder, loaded)
            finally:
                run.close()
    finally:
        if folder is not None:
            folder.release()


def _open_folder(resolved: Resolved, folder: RunFolder | None) -> Loaded | None:
    """Own the run folder (rank 0) and find the checkpoint to go on from, if any."""
    if folder is None:
        return find_checkpoint(resolved, None)
    sentence = folder.lock()
    if sentence:
        logger.info(sentence)
    refusal = folder.reason_to_stop() if requeued() else None
    if refusal:
        raise UserError(refusal)
    checkpoints = Checkpoints(folder.path)
    checkpoints.sweep()
    loaded = find_checkpoint(resolved, folder)
    for name in checkpoints.set_aside_newer(loaded) if loaded else ():
        logger.warning("%s is newer than the checkpoint that is resumed and was renamed superseded-%s", name, name)
    return loaded


def find_checkpoint(resolved: Resolved, folder: RunFolder | None) -> Loaded | None:
    """The checkpoint that training goes on from, None for a new run; nothing in the folder is changed."""
    options = resolved.options
    if folder is None and not options.resume:
        return None
    checkpoints = None if folder is None else Checkpoints(folder.path)
    asked = options.resume[0] if options.resume else ""
    own = not asked or asked in ("latest", "best") or (folder is not None and folder.already_went_on_from(asked))
    if own and checkpoints is None:
        raise UserError(f"--resume {asked} looks in the run folder: give --output_dir.")
    if not asked and not options.auto_resume:
        if checkpoints.numbered():
            raise UserError(f"--auto_resume false, but {folder.path} holds the checkpoints of an earlier run; choose "
                            "another --output_dir.")
        return None
    asked = "" if own and asked not in ("latest", "best") else local_file(asked)
    loaded = (checkpoints or Checkpoints(".")).resolve(asked)
    if loaded is None:
        return None
    check_resumable(loaded.state, loaded.path)
    for difference in check_same_run(loaded.state, resolved.to_dict(), loaded.path, explicit=not own):
        logger.warning("Resuming with another option: %s", difference)
    return loaded


@dataclass
class Planned:
    """What a run is made of before there is a model: `options` have the plan's batch and learning rate in them."""
    data: Data
    plan: BatchPlan
    options: Any
    updates_per_epoch: int

    @property
    def notes(self) -> list[str]:
        """What a person should know about data and batch."""
        return [*self.data.notes, self.plan.equation, *self.plan.notices]


def plan_run(resolved: Resolved, process: Any, state: dict | None, data: Data | None = None) -> Planned:
    """Index the pictures (unless `data` are given) and derive the batch; `state` is that of a run to go on with."""
    options = resolved.options
    if data is None:
        if not state:
            _check_start(options, process)
        data = process.local_first(lambda: build_data(
            options, train=True, evaluate=not options.disable_eval, rank_zero=process.local_rank == 0,
            class_names=state["classes"] if state else None))
    plan = plan_batch(resolved, process.world_size, state["global_batch"] if state else None)
    updates = validate_after_index(options, plan, len(data.train), data.num_classes)
    small = None if state else small_data_notice(options, plan, len(data.train))
    plan = replace(plan, notices=(*plan.notices, small)) if small else plan
    return Planned(data, plan, plan.apply(options), updates)


def _check_start(options: Any, process: Any) -> None:
    """Refuse what would otherwise be found only when all pictures have been indexed, minutes later."""
    build_optimizer(torch.nn.Linear(1, 1), replace(options, layer_decay=1.0))  # its name, and the packages it needs
    if options.finetune:
        process.on_rank_zero(lambda: bool(safe_torch_load(local_file(options.finetune))))


def build_run(resolved: Resolved, process: Any, loaded: Loaded | None, services: Services, planned: Planned) -> TrainingRun:
    """Model, optimizer and engine of a run on its data, with the state of `loaded` in them."""
    state, data, plan = None if loaded is None else loaded.state, planned.data, planned.plan
    options, updates = planned.options, planned.updates_per_epoch
    _set_numerics(options, state)
    model = build_model(options, data.num_classes).to(process.device)
    if not state:
        load_start_weights(model, options, data, process)
    paths = use_code_paths(state["code_paths"], process.device) if state and state["code_paths"] else code_paths(process.device)
    accelerate(model, paths)
    ema = Ema(model, options.model_ema_decay, "cpu" if options.model_ema_force_cpu else None) if options.model_ema else None
    optimizer = build_optimizer(model, options)
    dtype = amp_dtype(options)
    wrapped = process.wrap(_compiled(model, options, dtype, process) if options.compile else model)
    config = UpdateConfig(plan.update_freq, options.clip_grad, options.clip_by, options.clip_mode, dtype == torch.float16)
    update = Update(wrapped, optimizer, build_schedule(options, updates), config, ema, process)
    policy = NonfinitePolicy(options.on_nonfinite)
    fixed = Fixed(resolved.to_dict(), options.seed, plan.global_batch, data.class_names, updates, options.epochs, paths,
                  code_version())
    parts = Parts(model, ema, optimizer, update.scaler, policy, load_optimizer_state)
    services.tracker = _tracker(resolved, process, fixed, model, data)
    run = TrainingRun(options, process, parts, fixed, services)
    if state:
        run.restore(state)
        _warn_of_schedule(options, state, updates, run.update)
        logger.info("Going on at epoch %d, update %d from %s", run.epoch + 1, run.update, loaded.path)
    sampler = GlobalBatchSampler(len(data.train), plan.global_batch, plan.batch_size, plan.update_freq, process.rank,
                                 process.world_size, options.seed)
    run.loaders.append(train_loader(data, options, sampler))
    run.training = engine.Training(
        wrapped, model, update, build_loss(options), run.loaders[0], sampler,
        TrainPrepare(options, data.num_classes, process.device), FiniteWatch(policy), options.seed, updates,
        plan.update_freq, dtype, options.print_freq, run, process, data.train.path)
    run.evaluate = None if options.disable_eval else _evaluator(run, data, model, ema, process)
    return run


def _warn_of_schedule(options: Any, state: dict, updates_per_epoch: int, update: int) -> None:
    """Say when another `--epochs` than the checkpoint's moves the learning rate."""
    epochs = state["args"].get("epochs", options.epochs)
    earlier = build_schedule(replace(options, epochs=epochs), updates_per_epoch).lr(update)
    notice = resumed_schedule_notice(epochs=options.epochs, earlier_epochs=epochs, earlier_lr=earlier,
                                     lr=build_schedule(options, updates_per_epoch).lr(update))
    if notice:
        logger.warning(notice)


def build_model(options: Any, num_classes: int) -> torch.nn.Module:
    """The network of `--model`, freshly initialised from the seed: the same on every rank."""
    torch.manual_seed(key(options.seed, "init"))
    model = timm.create_model(options.model, num_classes=num_classes, drop_path_rate=options.drop_path,
                              layer_scale_init_value=options.layer_scale_init_value,
                              head_init_scale=options.head_init_scale)
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def load_start_weights(model: torch.nn.Module, options: Any, data: Data, process: Any) -> None:
    """Published or given weights to start from; rank 0 downloads, every node reads the file.

    Raises UserError when they keep their head and yet know next to nothing about the pictures.
    """
    if not options.pretrained and not options.finetune:
        return
    source = process.on_rank_zero(lambda: str(fetch_published(options.model)) if options.pretrained
                                  else local_file(options.finetune))
    report = load_for_model(model, source, model_key=options.model_key, prefix=options.model_prefix, weights=options.weights,
                            allow_partial=options.allow_partial, class_names=data.class_names, new_head=True)
    if "head.weight" in report.missing or options.allow_partial:
        return
    evaluation = engine.Evaluation(EvalPrepare(options, process.device), process.device, process=process)
    strange = strange_weights(model, report.source_key, data, options, evaluation)
    if strange:
        raise UserError(f"{strange[:-1]}; --allow_partial true trains on from them all the same.")


def _compiled(model: torch.nn.Module, options: Any, dtype: torch.dtype | None, process: Any) -> torch.nn.Module:
    """The model for `--compile true`: compiled on all ranks or on none."""
    logger.info("Compiling the model, which takes minutes ...")
    return compile_model(model.train(), (options.batch_size, 3, options.input_size, options.input_size), dtype,
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


def _set_numerics(options: Any, state: dict | None) -> None:
    if options.deterministic:
        # Some versions of cuBLAS need this to be deterministic, and PyTorch then refuses matrix products without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # The older of PyTorch's two ways to say this: torch.export and torch.compile read it, and refuse a mix of both.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.fast_math
    threads = state and state.get("threads")
    if threads and threads != torch.get_num_threads():
        # Sums are split by thread, so another number of threads gives other last bits.
        logger.info("Using %d threads as the run did so far (this start had %d)", threads, torch.get_num_threads())
        torch.set_num_threads(threads)


def _tracker(resolved: Resolved, process: Any, fixed: Fixed, model: torch.nn.Module, data: Data) -> Tracker:
    options, main = resolved.options, process.is_main
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    cpus = cpus_per_process(process.local_world_size)
    wandb = WandbRun(options.project, options.exp_name, fixed.args, options.wandb_ckpt) if options.enable_wandb and main else None
    tracker = Tracker(options.output_dir if main and options.output_dir else None, epochs=fixed.epochs,
                      updates_per_epoch=fixed.updates_per_epoch, n_parameters=size, num_workers=options.num_workers,
                      cpus=cpus, log_dir=options.log_dir if main else None, wandb=wandb,
                      terminal=None if main else False)
    if main:
        tracker.write_setup(resolved.to_yaml(), data.describe(), world_size=process.world_size, device=str(process.device),
                            backend=process.backend, code_paths=fixed.code_paths, version=fixed.version,
                            global_batch=fixed.global_batch)
    return tracker


def _evaluator(run: TrainingRun, data: Data, model: torch.nn.Module, ema: Ema | None, process: Any):
    """`evaluate(update)` for the end of each epoch: the weights and, if asked for, their average in one pass; it gives
    None when the run was asked to stop meanwhile."""
    options = run.options
    evaluation = engine.Evaluation(EvalPrepare(options, process.device), process.device, expected=len(data.val),
                                   observer=run, process=process)
    named = [("", model)] + ([("_ema", ema.module)] if ema is not None and options.model_ema_eval else [])
    loader = eval_loader(data, options, process.rank, process.world_size)
    run.loaders.append(loader)

    def evaluate(update: int) -> dict | None:
        found = {}
        with packed(*(network for _, network in named)):
            results = engine.evaluate(named, loader, evaluation, update)
        if not results:
            return None
        for result in results:
            found |= {f"test_loss{result.name}": result.loss, f"test_acc1{result.name}": result.acc1,
                      f"test_acc5{result.name}": result.acc5}
            if result.nonfinite and process.is_main:
                run.to.tracker.incident("nonfinite_outputs", f"{result.nonfinite} of {result.images} evaluated pictures "
                                        "gave outputs that are not numbers; they count as wrong.", update=update)
        return found
    return evaluate


def _tell(run: TrainingRun, options: Any, checkpoints: Checkpoints | None) -> None:
    if options.model_ema and run.process.is_main:
        warning = half_life_warning(options.model_ema_decay, run.fixed.epochs * run.fixed.updates_per_epoch)
        if warning:
            logger.warning(warning)
    cpus = run.to.tracker.cpus
    if options.num_workers > cpus:
        logger.info("--num_workers %d is more than the %d CPU%s of this process; more than these load nothing faster.",
                    options.num_workers, cpus, "s" * (cpus > 1))
    if checkpoints is not None:
        logger.info(checkpoints.disk_estimate(run.state(), run.fixed.epochs))
    elif run.process.is_main:
        logger.warning("Nothing of this run is saved: give --output_dir (and leave --save_ckpt true) to keep checkpoints.")


def _live(run: TrainingRun, folder: RunFolder | None, loaded: Loaded | None) -> int:
    """Train to the end, with the run folder's records around it."""
    options, checkpoints, tracker = run.options, run.to.checkpoints, run.to.tracker
    if folder is not None:
        tracker.resume(run.epoch)
        folder.begin(update=run.update, epoch=run.epoch, resume=options.resume[0] if options.resume else "",
                     automatic=requeued())
    if checkpoints is not None:
        run.best = checkpoints.restore_best(loaded)
    state, cause, unsaved = FAILED, "", False
    try:
        outcome = run.fit(engine.train_one_epoch, run.evaluate)
        state, cause = (DONE, "") if outcome == "done" else (PREEMPTED, run.to.stop.reason)
        unsaved = checkpoints is not None and not checkpoints.stands_at(
            run.epoch, run.update if run.update > run.epoch * run.fixed.updates_per_epoch else None)
        if unsaved and state == DONE:
            state, cause = FAILED, "the last checkpoint could not be saved"
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise
    finally:
        with undisturbed():
            for sentence in checkpoints.close() if checkpoints is not None else ():
                tracker.incident("save_failed", sentence, log=False, update=run.update)
            if folder is not None:
                folder.end(state, update=run.update, epoch=run.epoch, cause=cause)
            if checkpoints is not None and state == DONE:
                for path in (checkpoints.folder / BEST, checkpoints.folder / BEST_EMA, *checkpoints.numbered()[-1:]):
                    tracker.log_checkpoint(path)
            tracker.close()
    if state == PREEMPTED:
        # Not a warning, which every rank would give: all stop at the same update.
        logger.info("Stopped at update %d (%s); the same command goes on from %s.", run.update, cause,
                    "the newest checkpoint that was saved" if unsaved else "there")
        return ExitCode.PAUSED
    if unsaved:
        logger.error("The run was trained to the end, but its last checkpoint could not be saved: make room in %s and "
                     "start the same command again, which goes on from the newest one there.", options.output_dir)
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


def _evaluate_finished(resolved: Resolved, loaded: Loaded, process: Any, watchdog: Any) -> int:
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
