"""The whole recipe's randomness (RandAugment, erasing, mixup, drop path) on any split of the global batch."""
import functools

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import models  # noqa: F401  (registers the networks)
from datasets.build import build_data, train_loader
from datasets.device import TrainPrepare
from datasets.sampler import GlobalBatchSampler
from engine import Training, train_one_epoch
from optim.build import build_optimizer
from optim.ema import Ema
from optim.finite import FiniteWatch, NonfinitePolicy
from optim.losses import build_loss
from optim.schedule import build_schedule
from optim.update import Update, UpdateConfig
from tests.kits.options import data_options
from tests.kits.toy import Alone, in_processes, options

GLOBAL_BATCH, EPOCHS = 32, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """72 pictures of noise in 3 classes: two updates of 32, the rest is left over."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(72):
        path = root / f"class{index % 3}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return root


def run(process, folder, update_freq, mixup=0.8):
    """Weights, EMA and the learning rates after an epoch in float64."""
    torch.manual_seed(process.rank)  # nothing may depend on the global generator
    size = GLOBAL_BATCH // update_freq // process.world_size
    values = options(mixup=mixup, cutmix=1.0 if mixup else 0.0, warmup_steps=-1)
    given = data_options(data_set="image_folder", data_path=str(folder), input_size=32, batch_size=size, reprob=0.5,
                         seed=3, mixup=mixup, cutmix=values.cutmix)
    data = build_data(given, train=True, evaluate=False)
    sampler = GlobalBatchSampler(len(data.train), GLOBAL_BATCH, size, update_freq, process.rank, process.world_size, 3)
    model = timm.create_model("hornet_pico_7x7", num_classes=3, drop_path_rate=0.3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.double()
    wrapped = model if process.world_size == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
    prepare = TrainPrepare(given, 3, "cpu")

    def in_double(batch):
        images, targets = prepare(batch)
        return images.double(), targets.double() if targets.is_floating_point() else targets

    update = Update(wrapped, build_optimizer(model, values), build_schedule(values, sampler.updates_per_epoch),
                    UpdateConfig(update_freq, 0.5), Ema(model, 0.9), process)
    training = Training(wrapped, model, update, build_loss(values), train_loader(data, given, sampler), sampler,
                        in_double, FiniteWatch(NonfinitePolicy()), 3, sampler.updates_per_epoch, update_freq,
                        process=process)
    progress = [train_one_epoch(training, epoch) for epoch in range(EPOCHS)][-1]
    return dict(weights=model.state_dict(), ema=update.ema.state_dict(), lr=progress.lr, decay=progress.weight_decay,
                updates=progress.next_update)


def assert_same(a, b):
    assert (a["lr"], a["decay"], a["updates"]) == (b["lr"], b["decay"], b["updates"])
    for part in ("weights", "ema"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def whole(folder):
    """The result of one process without accumulation, by mixup."""
    return functools.cache(lambda mixup: run(Alone(), folder, 1, mixup))


@pytest.mark.parametrize("world_size,mixup", [
    (1, 0.8), (2, 0.8), pytest.param(1, 0.0, marks=pytest.mark.slow), pytest.param(2, 0.0, marks=pytest.mark.slow),
    pytest.param(4, 0.8, marks=pytest.mark.slow), pytest.param(4, 0.0, marks=pytest.mark.slow)])
def test_any_split_gives_the_same_weights(folder, whole, tmp_path, world_size, mixup):
    for update_freq in (1, 2, 4):
        if world_size == 1:
            results = [run(Alone(), folder, update_freq, mixup)]
        else:
            results = in_processes(run, world_size, tmp_path / str(update_freq), folder, update_freq, mixup)
        for result in results:
            assert_same(whole(mixup), result)
