"""Small parts for tests of the engine: a toy network, in-memory batches and several gloo processes."""
import os
import types
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import engine
from common.random import key, uniforms
from optim.build import build_optimizer
from optim.ema import Ema
from optim.finite import FiniteWatch
from optim.schedule import build_schedule
from optim.update import Update, UpdateConfig

CLASSES, SIZE, IMAGES = 7, 6, 64


class Batch(NamedTuple):
    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor


class Toy(nn.Module):
    """A small network with a norm, drop path keyed from outside, and something non-linear."""

    num_drop_draws = 2

    def __init__(self, seed: int = 0):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.branch = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, images, drop_draws=None):
        x = self.norm(self.stem(images).mean((2, 3)))
        branch = torch.nn.functional.gelu(self.branch(x))
        if self.training and drop_draws is not None:
            branch = branch * (drop_draws[:, :1].to(branch) >= 0.3) / 0.7
        return self.head(x + branch)


class Alone:
    """A process without peers."""

    rank, world_size = 0, 1

    def all_reduce_(self, tensor, op="sum"):
        return tensor

    def all_gather_object(self, obj):
        return [obj]


class Gloo(Alone):
    """One of several gloo processes, as `launch.process.Process` is to the engine."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def all_reduce_(self, tensor, op="sum"):
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()))
        return tensor

    def all_gather_object(self, obj):
        box = [None] * self.world_size
        dist.all_gather_object(box, obj)
        return box


def options(**changes):
    """Resolved options as far as optim reads them."""
    values = dict(opt="adamw", lr=0.01, min_lr=1e-4, weight_decay=0.05, weight_decay_end=0.1, layer_decay=1.0,
                  epochs=2, opt_eps=1e-8, opt_betas=None, momentum=0.9, warmup_epochs=0, warmup_steps=2,
                  mixup=0.0, cutmix=0.0, cutmix_minmax=None, smoothing=0.1)
    return types.SimpleNamespace(**{**values, **changes})


class Sampler:
    """Global batches in keyed order; rank r takes the r-th contiguous part of each."""

    def __init__(self, global_batch, update_freq, process):
        self.global_batch, self.update_freq, self.process = global_batch, update_freq, process
        self.set_start(0, 0)

    def set_start(self, epoch, update):
        self.epoch, self.first = epoch, update

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(IMAGES)
        size = self.global_batch // self.process.world_size // self.update_freq
        for update in range(self.first, IMAGES // self.global_batch):
            for micro in range(self.update_freq):
                start = update * self.global_batch + (self.process.rank * self.update_freq + micro) * size
                yield batch(order[start:start + size], np.arange(start, start + size))


def batch(indices, positions):
    """Images are functions of their index alone."""
    images = uniforms(1, "images", 0, np.asarray(indices), 3 * SIZE * SIZE).reshape(-1, 3, SIZE, SIZE)
    targets = [key(2, "label", int(index)) % CLASSES for index in indices]
    return Batch(torch.from_numpy(images), torch.tensor(targets, dtype=torch.int64), torch.as_tensor(indices),
                 torch.as_tensor(positions))


class ToyTask:
    """Labels smoothed by a tenth. `prepare` and `criterion` may be replaced."""
    score, loaders, autocast_dtype = "test_acc1", (), None

    def __init__(self, dtype, seed=0):
        self.seed = seed
        self.prepare = lambda b: (b.images.to(dtype), b.targets)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def losses(self, model, batch, update):
        images, targets = self.prepare(batch)
        count = getattr(getattr(model, "module", model), "num_drop_draws", 0)
        draws = engine.drop_draws(count, self.seed, update, batch, images.device)
        with engine.autocast(images.device, self.autocast_dtype):
            logits = model(images, **draws)
        hits = None if targets.is_floating_point() else (logits.detach().argmax(1) == targets).sum()
        return self.criterion(engine.full_precision(logits), targets), hits

    def evaluate(self, networks, observer, update):
        return {}


def training(process=None, dtype=torch.float64, update_freq=1, global_batch=16, config=None, mode="skip",
             model=None, wrap=None, ema=0.9, **changes):
    """An engine.Loop over the toy data. `wrap`: e.g. DistributedDataParallel."""
    process = process or Alone()
    values = options(**changes)
    plain = (model or Toy()).to(dtype)
    wrapped = wrap(plain) if wrap else plain
    updates = IMAGES // global_batch
    update = Update(wrapped, build_optimizer(plain, values), build_schedule(values, updates),
                    UpdateConfig(update_freq=update_freq, **(config or {})), ema=Ema(plain, ema),
                    agree=lambda flags: process.all_reduce_(flags, "min"))
    sampler = Sampler(global_batch, update_freq, process)
    return engine.Loop(model=wrapped, plain=plain, task=ToyTask(dtype), update=update, loader=sampler,
                       sampler=sampler, watch=FiniteWatch(mode), process=process,
                       updates_per_epoch=updates, print_freq=2, path_of=lambda index: f"image{index}.JPEG")


def train(loop, epoch=0, first_update=0, observer=None):
    """`engine.train_one_epoch`, unobserved unless told otherwise."""
    return engine.train_one_epoch(loop, observer or engine.Observer(), epoch=epoch, first_update=first_update)


def _child(rank, work, world_size, folder, arguments):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(work(Gloo(rank, world_size), *arguments), f"{folder}/result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_processes(work, world_size, folder, *arguments):
    """`work(process, *arguments)` on `world_size` gloo processes; their results in order of rank."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_child, (work, world_size, str(folder), arguments), nprocs=world_size,
                       start_method="fork")
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]
