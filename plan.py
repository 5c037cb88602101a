"""What a run is made of before it trains: data and batch, the network it starts from, the task it learns."""
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import timm
import torch
from torch import Tensor, nn

import engine
import models  # noqa: F401  registers the architectures with timm
import native
from common.log import logger
from common.random import key
from common.safe_load import safe_torch_load
from config.options import Options
from config.parse import Resolved
from config.rules import BatchPlan, plan_batch, small_data_notice, validate_after_index
from datasets.build import Data, build_data, eval_loader
from datasets.dataset import Batch, ImageDataset
from datasets.device import EvalPrepare, TrainPrepare
from evaluation import amp_dtype
from launch.process import Process
from models.compile import compile_model
from models.download import fetch_published, local_file
from models.hornet import HorNet
from models.weights import load_for_model
from optim.build import build_loss, build_optimizer
from run.state import State


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is made of before there is a model: `options` are those of `resolved` with the batch in
    them."""
    resolved: Resolved
    options: Options
    data: Data
    train: ImageDataset
    batch: BatchPlan
    updates_per_epoch: int


def plan_run(resolved: Resolved, process: Process, state: State | None, data: Data | None = None) -> Plan:
    """Index the images (unless `data` are given) and derive the batch; `state` is that of a run to resume."""
    options, state = resolved.options, state or {}
    if data is None:
        if not state:  # what would otherwise be refused only when all images have been indexed, minutes later
            build_optimizer(nn.Linear(1, 1), replace(options, layer_decay=1.0))
            if options.finetune:
                process.on_rank_zero(lambda: bool(safe_torch_load(local_file(options.finetune))))
        data = process.local_first(lambda: build_data(
            options, train=True, evaluate=not options.disable_eval, rank_zero=process.local_rank == 0,
            class_names=state.get("classes"), order=(state.get("order") or "") if state else None))
    assert data.train is not None
    batch = plan_batch(resolved, process.world_size, state.get("global_batch"))
    updates = validate_after_index(options, batch, len(data.train))
    small = None if state else small_data_notice(options, batch, len(data.train))
    batch = replace(batch, notices=(*batch.notices, small)) if small else batch
    options = replace(options, batch_size=batch.batch_size, update_freq=batch.update_freq,
                      global_batch=batch.global_batch, lr=batch.lr)
    return Plan(resolved=resolved, options=options, data=data, train=data.train, batch=batch,
                updates_per_epoch=updates)


def set_numerics(options: Options) -> None:
    """Switch deterministic algorithms and TF32 as the options say, for the whole process."""
    if options.deterministic:
        # Some versions of cuBLAS need this to be deterministic, and PyTorch then refuses matrix products
        # without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # The older of PyTorch's two ways to say this: torch.export and torch.compile read it, and refuse a mix of
    # both.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.fast_math


def build_model(options: Options, num_classes: int) -> HorNet:
    """The network of `--model`, freshly initialised from the seed: the same on every rank."""
    torch.manual_seed(key(options.seed, "init"))
    model = timm.create_model(options.model, num_classes=num_classes, drop_path_rate=options.drop_path,
                              layer_scale_init_value=options.layer_scale_init_value,
                              head_init_scale=options.head_init_scale)
    assert isinstance(model, HorNet)
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def load_start_weights(model: HorNet, options: Options, data: Data, process: Process) -> None:
    """Published or given weights to start from; rank 0 downloads, every node reads the file."""
    if not options.pretrained and not options.finetune:
        return
    source = process.on_rank_zero(lambda: str(fetch_published(options.model)) if options.pretrained
                                  else local_file(options.finetune))
    load_for_model(model, source, model_key=options.model_key, prefix=options.model_prefix,
                   weights=options.weights, allow_partial=options.allow_partial,
                   class_names=data.class_names, new_head=True)


def compiled(model: nn.Module, options: Options, process: Process) -> nn.Module:
    """The model for `--compile true`, compiled on all ranks or on none; otherwise as it is."""
    if not options.compile:
        return model
    logger.info("Compiling the model, which takes minutes ...")
    shape = (options.batch_size, 3, options.input_size, options.input_size)
    return compile_model(model.train(), shape, amp_dtype(options),
                         lambda mine: bool(process.all_reduce_(torch.tensor([int(mine)]), "min").item()))


class Classification:
    """The task of images with one class each: cross-entropy in training, top-1 and top-5 in evaluation."""
    score = "test_acc1"

    def __init__(self, options: Options, data: Data, process: Process, drop_draws: int):
        self.seed, self.drop_draws, self.autocast_dtype = options.seed, drop_draws, amp_dtype(options)
        self.prepare = TrainPrepare(options, data.num_classes, process.device)
        self.criterion = build_loss(options)
        self.evaluation = engine.Evaluation(EvalPrepare(options, process.device), process.device,
                                            process=process, expected=len(data.val) if data.val else None)
        self.loaders = [eval_loader(data, options, process.rank, process.world_size)] if data.val else []

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
            results = engine.evaluate(networks, self.loaders[0], evaluation, update)
        for result in results:
            if result.nonfinite:
                observer.on_incident("nonfinite_outputs", f"{result.nonfinite} of {result.images} evaluated "
                                     "images gave outputs that are not numbers; they count as incorrect.",
                                     update=update)
        return {f"test_{name}{result.name}": getattr(result, name) for result in results
                for name in ("loss", "acc1", "acc5")} or None
