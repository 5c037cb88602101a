"""What segmentation and detection have in common as tasks of the Trainer and in evaluation."""
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

import engine
import native
from common.devices import float32_products
from config.options import Options
from datasets.build import Data
from datasets.dataset import Batch, ImageLoader, make_loader
from datasets.sampler import GlobalBatchSampler
from dense.backbone import same_statistics, start_from, synchronised
from dense.optim import scale_by_depth
from dense.options import DenseOptions
from evaluation import amp_dtype
from launch.process import Process
from optim.build import build_optimizer
from optim.schedule import Schedule
from plan import Plan
from run.state import State

Networks = Sequence[nn.Module]
Leaves = Callable[[], bool]


def find_scenes(find: Callable[..., Data], options: Options, process: Process, state: State) -> Data:
    """The data of a training, with the classes of the run to resume; `find` is `find_data` of the kind."""
    return process.local_first(lambda: find(options, state.get("classes"), train=True,
                                            evaluate=not options.disable_eval))


def share(data: Data, options: Options, process: Process, refuse_bad: bool = False) -> ImageLoader:
    """This rank's images of the evaluation, one at a time."""
    assert data.val is not None
    mine = range(process.rank, len(data.val), process.world_size)
    return make_loader(data.val, options, [[index] for index in mine], refuse_bad=refuse_bad)


def own_folder(options: Options, process: Process) -> str:
    """The run folder for what rank 0 writes while it evaluates, "" on other ranks."""
    return options.output_dir if process.is_main else ""


@torch.no_grad()
def went_through(networks: Networks, loader: Iterable[Batch], process: Process, leaves: Leaves,
                 take: Callable[[Batch], object]) -> bool:
    """`take` each batch of this rank's share in true float32, the networks in evaluation mode with rank 0's
    statistics; False when `leaves()` said so on any rank."""
    left = False
    for network in networks:
        network.eval()
        same_statistics(network, process)
    with float32_products():
        for batch in loader:
            if left := leaves():
                break
            take(batch)
    return not process.any(left)


class DenseTask(ABC):
    """A task (see `engine.Task`) but for its losses and what it measures.

    Args:
        network: fresh from the seed.
        sampler: makes the sampler of training from what follows the number of images in its arguments.
        depth: of `optim.scale_by_depth`.
    """
    score: str

    def __init__(self, plan: Plan, process: Process, state: State | None, *, network: Any,
                 sampler: Callable[..., GlobalBatchSampler], schedule: Schedule, depth: str):
        options, data, batch = cast(DenseOptions, plan.options), plan.data, plan.batch
        self.seed, self.autocast_dtype, self.process = options.seed, amp_dtype(options), process
        self.folder, self.data = own_folder(options, process), data
        network.backbone.set_grad_checkpointing(options.grad_checkpointing)
        self.drop_draws = network.num_drop_draws
        if state is None:
            start_from(network.backbone, options, process)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network) if synchronised(process) else network
        self.model: nn.Module = model.to(process.device)
        self.optimizer = build_optimizer(self.model, options, scale_by_depth(
            options.decay_rate, options.decay_layers, by=depth))
        self.schedule = schedule
        self.sampler = sampler(batch.global_batch, batch.batch_size, batch.update_freq, process.rank,
                               process.world_size, options.seed)
        self.loaders = [make_loader(plan.train, options, self.sampler)]
        if data.val is not None:
            self.loaders.append(share(data, options, process))

    @abstractmethod
    def measure(self, networks: Networks, leaves: Leaves) -> list | None:
        """What the evaluation finds of each network, None when `leaves()` said so on any rank."""

    @abstractmethod
    def figures(self, found: Any) -> engine.Figures:
        """The figures of one network by name, from what `measure` found."""

    def batches(self, epoch: int, first_update: int) -> Iterable[Batch]:
        """Micro-batches of `epoch` from `first_update` on."""
        self.sampler.set_start(epoch, first_update)
        return self.loaders[0]

    def evaluate(self, networks: Sequence[tuple[str, nn.Module]], observer: engine.Observer,
                 update: int) -> engine.Figures | None:
        """All networks in one pass over the images, each image on one rank."""
        def leaves() -> bool:
            observer.on_phase("evaluation", update)
            return observer.leaves_evaluation()

        with native.packed(*(network for _, network in networks)):
            found = self.measure([network for _, network in networks], leaves)
        return None if found is None else {
            f"test_{name}{suffix}": value for (suffix, _), each in zip(networks, found)
            for name, value in self.figures(each).items()}


MakeTask = Callable[[Plan, Process, State | None], engine.Task]
