"""Small parts for tests of the engine: a toy network and in-memory batches."""
from functools import partial

import numpy as np
import torch
from torch import nn

import engine
from common.random import key, uniforms
from config.options import Options
from datasets.dataset import Batch
from datasets.sampler import GlobalBatchSampler
from launch.process import Process
from optim.build import build_optimizer
from optim.ema import Ema
from optim.finite import FiniteWatch
from optim.schedule import Schedule
from optim.update import Update
from plan import Classification

CLASSES, SIZE, IMAGES = 7, 6, 64


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


Alone = partial(Process, device=torch.device("cpu"))  # a process without peers


def options(**changes):
    """Options as far as optim reads them."""
    values = dict(lr=0.01, min_lr=1e-4, weight_decay_end=0.1, epochs=2, warmup_epochs=0, warmup_steps=2,
                  mixup=0.0, cutmix=0.0)
    return Options(**{**values, **changes})


class Sampler(GlobalBatchSampler):
    """Micro-batches of the toy images in keyed order."""

    def __init__(self, global_batch, update_freq, process):
        super().__init__(IMAGES, global_batch, global_batch // process.world_size // update_freq, update_freq,
                         process.rank, process.world_size)

    def __iter__(self):
        for items in super().__iter__():
            _, indices, positions = zip(*items)
            yield batch(indices, positions)


def batch(indices, positions):
    """Images are functions of their index alone."""
    images = uniforms(1, "images", 0, np.asarray(indices), 3 * SIZE * SIZE).reshape(-1, 3, SIZE, SIZE)
    targets = [key(2, "label", int(index)) % CLASSES for index in indices]
    return Batch(torch.from_numpy(images), torch.tensor(targets, dtype=torch.int64), torch.as_tensor(indices),
                 torch.as_tensor(positions), torch.zeros(len(targets), 0, 4), epoch=-1)


class ToyTask:
    """Labels smoothed by a tenth. `prepare` and `criterion` may be replaced."""
    losses, seed, autocast_dtype = Classification.losses, 0, None

    def __init__(self, model, values, sampler, dtype):
        self.model, self.sampler, self.drop_draws = model, sampler, getattr(model, "num_drop_draws", 0)
        self.optimizer = build_optimizer(model, values)
        self.schedule = Schedule(values, IMAGES // sampler.global_batch)
        self.prepare = lambda b: (b.images.to(dtype), b.targets)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def batches(self, epoch, first_update):
        self.sampler.set_start(epoch, first_update)
        return self.sampler


def training(process=None, dtype=torch.float64, global_batch=16, mode="skip", model=None, wrap=None, ema=0.9,
             **changes):
    """An engine.Loop over the toy data. `wrap`: e.g. DistributedDataParallel; `changes` are options."""
    process, values, plain = process or Alone(), options(**changes), (model or Toy()).to(dtype)
    task = ToyTask(plain, values, Sampler(global_batch, values.update_freq, process), dtype)
    wrapped = wrap(plain) if wrap else plain
    update = Update(wrapped, task.optimizer, task.schedule, values, ema=Ema(plain, ema),
                    agree=lambda flags: process.all_reduce_(flags, "min"))
    return engine.Loop(model=wrapped, task=task, update=update, watch=FiniteWatch(mode), process=process,
                       updates_per_epoch=IMAGES // global_batch, print_freq=2,
                       path_of=lambda index: f"image{index}.JPEG")


def train(loop, epoch=0, first_update=0, observer=None):
    """`engine.train_one_epoch`, unobserved unless told otherwise."""
    return engine.train_one_epoch(loop, observer or engine.Observer(), epoch=epoch, first_update=first_update)
