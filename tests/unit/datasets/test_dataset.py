"""Batches depend on seed, epoch and position alone: not on workers, splits, restarts or other random
streams."""
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch

from datasets.build import build_data, eval_loader
from datasets.dataset import make_loader
from datasets.device import Prepare
from datasets.sampler import GlobalBatchSampler
from launch.stop import alive
from tests.kits.errors import refused
from tests.kits.images import fill_folder, jpeg, write_images
from tests.kits.options import data_options
from tests.kits.processes import Child, assert_gone, environment, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 140 + 6 images of noise."""
    return write_images(tmp_path_factory.mktemp("images"), train=140, val=6)


def options(folder, **changes):
    return data_options(**{"data_set": "IMNET", "data_path": str(folder), "input_size": 48, "reprob": 0.5, **changes})


def training(folder, batch=16, **changes):
    """The loader over global batches of the training images, and its sampler."""
    values = options(folder, **changes)
    data = build_data(values, train=True, evaluate=False)
    sampler = GlobalBatchSampler(len(data.train), batch, batch, 1)
    return make_loader(data.train, values, sampler), sampler


def test_epochs_and_seeds_differ_and_an_epoch_has_no_image_twice():
    orders = [GlobalBatchSampler(100, 1, 1, 1, seed=seed).order(epoch) for seed in (0, 1) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(100)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_follow_the_sampler_keep_their_workers_and_disturb_no_other_random_stream(folder, workers):
    loader, sampler = training(folder, num_workers=workers)
    prepare, seen = Prepare(options(folder), "cpu", 3), []

    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draws()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    for epoch, start in ((0, 5), (4, 0), (4, 7)):
        sampler.set_start(epoch, start)
        batches = list(loader)
        assert [batch.epoch for batch in batches] == [epoch] * (8 - start) and batches[0].positions[0] == 16 * start
        prepare(batches[0])
        seen.append([worker.pid for worker in loader._iterator._workers] if workers else [])
    assert draws() == expected and seen[0] == seen[1] == seen[2] and batches[0].images.is_shared() == (workers > 0)
    loader.close()
    assert not any(map(alive, seen[0]))


def test_an_error_in_a_transform_names_the_image(folder):
    loader, _ = training(folder, num_workers=1)
    loader.images.transform = {}.__getitem__
    with pytest.raises(RuntimeError, match=r"transforming .*train.class\d.\d+\.png failed"):
        list(loader)


# -------------------------------------------------------------------------------------------- unreadable images

BAD = {"3.JPEG", "7.JPEG", "8.JPEG"}


@pytest.fixture
def damaged(tmp_path):
    """Two classes with ten images each in train and val; in each part those called `BAD` cannot be read."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            fill_folder(tmp_path / part / name, 10)
        (tmp_path / part / "cat" / "3.JPEG").write_bytes(b"")
        (tmp_path / part / "dog" / "7.JPEG").write_bytes(jpeg(0)[:500])
        (tmp_path / part / "dog" / "8.JPEG").unlink()
        (tmp_path / part / "dog" / "8.JPEG").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_them_the_same_way_each_time_and_logs_nothing_in_workers(damaged, workers, caplog, capfd):
    runs = []
    for _ in range(2):
        loader, _ = training(damaged, batch=4, num_workers=workers)
        runs.append(list(loader))
        assert {os.path.basename(path) for path in loader.take_unreadable()} == BAD and not loader.take_unreadable()
        loader.close()
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.targets, second.targets)
    assert not caplog.records and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_refuses_or_counts_them_as_incorrect_and_training_from_nothing_else_ends(damaged, workers):
    values = options(damaged, num_workers=workers)
    data = build_data(values, train=False, evaluate=True)
    with refused("unreadable_image", "cat/3.JPEG", "--allow_bad_images"):
        list(eval_loader(data, values, refuse_bad=True))
    loader, prepare = eval_loader(data, values), Prepare(values, "cpu")
    targets = torch.cat([prepare(batch)[1] for batch in loader])
    assert len(targets) == 20 and int((targets == -100).sum()) == 3
    assert {os.path.basename(path) for path in loader.take_unreadable()} == BAD
    loader.close()
    for path in damaged.glob("train/*/*.JPEG"):
        path.unlink()
        path.touch()
    with refused("unreadable_image", ".JPEG", "20"):
        list(training(damaged, batch=4, num_workers=workers)[0])


# ------------------------------------------------------------------------------------------------- workers' ends

def test_a_low_limit_of_open_files_is_raised(folder):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 6, limits[1]))
    try:
        loader, _ = training(folder, num_workers=2)
        assert len(list(loader)) == 8
        loader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def load(folder, fails):
    """A process that prints the ids of its workers once they have loaded a batch, and then fails or waits."""
    loader, _ = training(folder, num_workers=2)
    batches = iter(loader)
    next(batches)
    print(*[worker.pid for worker in loader._iterator._workers], flush=True)
    if fails:
        raise KeyError("x")
    time.sleep(60)


def test_workers_end_with_their_parent_and_let_a_group_signal_pass(folder):
    children = [Child(load, (folder, fails), environment()) for fails in (False, True)]
    wait_for(lambda: all("\n" in child.text() for child in children), 30)
    waiting, failing = ([int(pid) for pid in child.text().splitlines()[0].split()] for child in children)
    for pid in waiting:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGUSR2)
    time.sleep(0.3)
    assert len(waiting) == len(failing) == 2 and all(map(alive, waiting))
    children[0].kill()
    assert children[1].end(20) == 1
    assert_gone(waiting + failing, 3)  # at once: PyTorch's workers look after their parent every five seconds
