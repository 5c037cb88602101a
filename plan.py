"""What a run is made of before it trains: data and batch, the network it starts from, the task it learns."""
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
from torch import Tensor, nn

import engine
import models  # noqa: F401  registers the architectures with timm
import native
from common.devices import dense_peak, set_float32
from common.log import logger
from common.random import key
from common.safe_load import safe_torch_load
from common.text import plural
from config.options import Options
from config.parse import Resolved
from config.rules import BatchPlan, plan_batch
from datasets.build import Data, build_data, eval_loader
from datasets.dataset import Batch, ImageDataset, make_loader
from datasets.device import Prepare
from datasets.sampler import GlobalBatchSampler
from evaluation import amp_dtype
from launch.process import Process
from models.compile import compile_blocks
from models.download import fetch_published
from models.hornet import HorNet
from models.inspect import flops
from models.trained import locate
from models.weights import load_for_model
from optim.build import build_loss, build_optimizer
from optim.ema import half_life_notice
from optim.schedule import Schedule
from run.start import cpus_per_process
from run.state import State

FindData = Callable[[Options, Process, State], Data]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is made of before there is a model: `options` are those of `resolved` with the batch in
    them."""
    resolved: Resolved
    options: Options
    data: Data
    train: ImageDataset
    batch: BatchPlan


def find_data(options: Options, process: Process, state: State) -> Data:
    """Index the images of `options`, with the classes of the run to resume."""
    if not state:  # what would otherwise be refused only when all images have been indexed, minutes later
        build_optimizer(nn.Linear(1, 1), replace(options, layer_decay=1.0))
        if options.finetune:
            process.on_rank_zero(lambda: bool(safe_torch_load(locate(options.finetune))))
    return process.local_first(lambda: build_data(
        options, train=True, evaluate=not options.disable_eval, rank_zero=process.local_rank == 0,
        class_names=state.get("classes"), order=(state.get("order") or "") if state else None))


def plan_run(resolved: Resolved, process: Process, state: State | None, *,
             data: FindData = find_data) -> Plan:
    """Find the images and derive the batch; `state` is that of a run to resume, else None."""
    options, state = resolved.options, state or {}
    batch_for = partial(plan_batch, options, process.world_size, lr_batch=resolved.lr_batch,
                        checkpoint_batch=state.get("global_batch"))
    batch_for(10 ** 12)  # what no number of images makes valid is refused before they are indexed
    found = data(options, process, state)
    assert found.train is not None
    batch = batch_for(len(found.train))
    options = replace(options, batch_size=batch.batch_size, update_freq=batch.update_freq,
                      global_batch=batch.global_batch, lr=batch.lr)
    notices = [*batch.notices, too_many_workers(options, process.local_world_size),
               half_life_notice(options, batch.updates_per_epoch)]
    return Plan(resolved=resolved, options=options, data=found, train=found.train,
                batch=replace(batch, notices=tuple(filter(None, notices))))


def too_many_workers(options: Options, local_world_size: int) -> str | None:
    """A sentence when a process has more loader workers than CPUs."""
    cpus = cpus_per_process(local_world_size)
    if options.num_workers <= cpus:
        return None
    return (f"--num_workers {options.num_workers} is more than the {plural(cpus, 'CPU')} of this process; "
            "more load nothing faster.")


def set_numerics(options: Options) -> None:
    """Switch deterministic algorithms and TF32 as the options say, for the whole process."""
    if options.deterministic:
        # Some versions of cuBLAS need this to be deterministic, and PyTorch then refuses matrix products
        # without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    set_float32(options.fast_math)


def rate_at_peak(model: nn.Module, options: Options, process: Process) -> float | None:
    """Images per second of all processes if their devices computed at their peak; None where it is not known.
    """
    if not isinstance(model, HorNet) or process.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(process.device)
    peak = dense_peak(name, amp_dtype(options), options.fast_math)
    # A multiply-add is two operations, and a backward pass twice a forward pass.
    return peak and process.world_size * peak / (6 * flops(model, options.input_size))


def load_start_weights(model: HorNet, options: Options, data: Data, process: Process) -> None:
    """Published or given weights to start from; rank 0 downloads, every node reads the file."""
    if not options.pretrained and not options.finetune:
        return
    source = process.on_rank_zero(lambda: str(fetch_published(options.model)) if options.pretrained
                                  else str(locate(options.finetune)))
    load_for_model(model, source, model_key=options.model_key, prefix=options.model_prefix,
                   weights=options.weights, allow_partial=options.allow_partial,
                   class_names=data.class_names, new_head=True)


def compiled(model: nn.Module, options: Options, process: Process, paths: dict[str, str]) -> dict[str, str]:
    """The code paths of a run, those of `--compile true` included, which are the same on all ranks; `paths`
    has those of a run to resume."""
    if not options.compile or not isinstance(model, HorNet):
        return {}
    logger.info("Compiling the model, which takes minutes ...")
    shape = (options.batch_size, 3, options.input_size, options.input_size)
    return {"compiled": compile_blocks(
        model.train(), shape, amp_dtype(options), saved=paths.get("compiled"),
        agree=lambda mine: not process.any(not mine), from_first=process.broadcast_object)}


class Classification:
    """The task of images with one class each (see `engine.Task`): cross-entropy, top-1 and top-5."""
    score = "test_acc1"

    def __init__(self, plan: Plan, process: Process, state: State | None = None):
        options, data, batch = plan.options, plan.data, plan.batch
        self.seed, self.autocast_dtype = options.seed, amp_dtype(options)
        torch.manual_seed(key(options.seed, "init"))  # the same weights on every rank
        model = timm.create_model(options.model, num_classes=data.num_classes,
                                  drop_path_rate=options.drop_path,
                                  layer_scale_init_value=options.layer_scale_init_value,
                                  head_init_scale=options.head_init_scale)
        assert isinstance(model, HorNet)
        model.set_grad_checkpointing(options.grad_checkpointing)
        self.drop_draws = model.num_drop_draws
        if state is None:
            load_start_weights(model, options, data, process)
        if options.freeze:
            model.freeze(options.freeze)
        self.model: nn.Module = model.to(process.device)
        self.optimizer = build_optimizer(model, options)
        self.schedule = Schedule(options, plan.batch.updates_per_epoch)
        self.prepare = Prepare(options, process.device, data.num_classes)
        self.criterion = build_loss(options)
        self.sampler = GlobalBatchSampler(len(plan.train), batch.global_batch, batch.batch_size,
                                          batch.update_freq, process.rank, process.world_size, options.seed)
        self.loaders = [make_loader(plan.train, options, self.sampler)]
        if data.val is not None:
            self.loaders.append(eval_loader(data, options, process.rank, process.world_size))
        self.evaluation = engine.Evaluation(Prepare(options, process.device), process.device,
                                            process=process, expected=len(data.val) if data.val else None)

    def batches(self, epoch: int, first_update: int) -> Iterable[Batch]:
        """Micro-batches of `epoch` from `first_update` on."""
        self.sampler.set_start(epoch, first_update)
        return self.loaders[0]

    def losses(self, model: nn.Module, batch: Batch, update: int) -> tuple[Tensor, Tensor | None]:
        """Mean loss of a micro-batch, and its top-1 hits where nothing is mixed."""
        images, targets = self.prepare(batch)
        draws = engine.drop_draws(self.drop_draws, self.seed, update, batch, images.device)
        with engine.autocast(images.device, self.autocast_dtype):
            logits = model(images, **draws)
        hits = None if targets.is_floating_point() else (logits.detach().argmax(1) == targets).sum()
        return self.criterion(engine.full_precision(logits), targets), hits

    def evaluate(self, networks: Sequence[tuple[str, nn.Module]], observer: engine.Observer,
                 update: int) -> engine.Figures | None:
        """All networks in one pass, in true float32 whatever they are trained in."""
        with native.packed(*(network for _, network in networks)):
            evaluation = replace(self.evaluation, observer=observer)
            results = engine.evaluate(networks, self.loaders[1], evaluation, update)
        for result in results:
            if result.nonfinite:
                observer.on_incident("nonfinite_outputs", f"{result.nonfinite} of {result.images} evaluated "
                                     "images gave outputs that are not numbers; they count as incorrect.",
                                     update=update)
        return {f"test_{name}{result.name}": getattr(result, name) for result in results
                for name in ("loss", "acc1", "acc5")} or None
