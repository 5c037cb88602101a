"""Batches depend on seed, epoch and position alone: not on workers, splits, restarts or other random
streams."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.build import build_data, eval_loader
from datasets.dataset import make_loader
from datasets.device import EvalPrepare, TrainPrepare
from datasets.sampler import GlobalBatchSampler
from launch.stop import alive
from tests.kits.batches import prepared
from tests.kits.errors import refused
from tests.kits.images import fill_folder, jpeg, write_images
from tests.kits.options import data_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 140 + 6 images of noise."""
    return write_images(tmp_path_factory.mktemp("images"), train=140, val=6)


def _options(folder, **changes):
    return data_options(**{"data_set": "IMNET", "data_path": str(folder), "input_size": 48, "reprob": 0.5, **changes})


def _epoch(folder, world=1, freq=1, epoch=1, start=0, **changes):
    """Prepared images and targets of an epoch in global order, global batch 64, from all ranks."""
    return prepared(_options(folder, batch_size=64 // (world * freq), **changes), world, freq, epoch, start)


@pytest.mark.parametrize("split", [{"freq": 4}, {"world": 2, "freq": 2}, {"world": 4, "mixup_mode": "elem"},
                                   {"num_workers": 2}, {"num_workers": 1, "world": 2, "recount": 3}])
def test_no_split_and_no_worker_changes_a_bit(folder, split):
    same = {name: split[name] for name in ("mixup_mode", "recount") if name in split}
    whole, parts = _epoch(folder, **same), _epoch(folder, **split)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_disturbs_no_other_random_stream(folder, workers):
    options = _options(folder, num_workers=workers)
    data = build_data(options, train=True, evaluate=True)
    loaders = make_loader(data.train, options, GlobalBatchSampler(len(data.train), 64, 64, 1)), eval_loader(data, options)

    def draws(load):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        for loader in loaders if load else ():
            prepare = TrainPrepare(options, 3, "cpu") if loader is loaders[0] else EvalPrepare(options, "cpu")
            for batch in loader:
                prepare(batch)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draws(True) == draws(False)
    for loader in loaders:
        loader.close()


def test_workers_persist_and_follow_the_sampler(folder):
    options = _options(folder, num_workers=2)
    data = build_data(options, train=True, evaluate=False)
    sampler = GlobalBatchSampler(len(data.train), 16, 16, 1)
    loader = make_loader(data.train, options, sampler)
    workers = []
    for epoch, start in ((0, 5), (4, 0), (4, 7)):
        sampler.set_start(epoch, start)
        batches = list(loader)
        assert [batch.epoch for batch in batches] == [epoch] * (8 - start)
        assert batches[0].positions[0] == 16 * start and batches[0].images.is_shared()
        workers.append([worker.pid for worker in loader._iterator._workers])
    assert workers[0] == workers[1] == workers[2]
    loader.close()
    assert not any(map(alive, workers[0]))


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_evaluation_loads_each_image_once_with_its_label(folder, world):
    options = _options(folder, batch_size=2)
    data = build_data(options, train=False, evaluate=True)
    seen = {}
    for rank in range(world):
        for batch in eval_loader(data, options, rank, world):
            assert batch.epoch == -1 and len(batch.images) <= 3 and (batch.positions == -1).all()
            for index, target in zip(batch.indices.tolist(), batch.targets.tolist(), strict=True):
                assert index not in seen
                seen[index] = target
    assert [seen[i] for i in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_transform_names_the_image(folder, workers):
    options = _options(folder, num_workers=workers)
    data = build_data(options, train=False, evaluate=True)

    def fail(image):
        raise KeyError("no such operation")

    data.val.transform = fail
    with pytest.raises(RuntimeError, match=r"transforming .*val.class0.000\.png failed.*no such operation"):
        list(eval_loader(data, options))


# ------------------------------------------------------------------------------------------------- unreadable
# images

@pytest.fixture
def damaged(tmp_path):
    """Two classes with ten images each in train and val; in each part three cannot be read."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            fill_folder(tmp_path / part / name, 10)
        (tmp_path / part / "cat" / "3.JPEG").write_bytes(b"")
        (tmp_path / part / "dog" / "7.JPEG").write_bytes(jpeg(0)[:500])
        (tmp_path / part / "dog" / "8.JPEG").unlink()
        (tmp_path / part / "dog" / "8.JPEG").symlink_to("nowhere")
    return tmp_path


BAD = {"3.JPEG", "7.JPEG", "8.JPEG"}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_them_the_same_way_each_time_and_reports_each_once(damaged, workers, caplog, capfd):
    options = _options(damaged, num_workers=workers)
    data = build_data(options, train=True, evaluate=False)
    runs = []
    for _ in range(2):
        loader = make_loader(data.train, options, GlobalBatchSampler(20, 4, 4, 1))
        runs.append(list(loader))
        assert sorted(os.path.basename(data.train.path(i)) for i in loader.bad_images) == sorted(BAD)
        assert all(loader.bad_images.values())
        loader.close()
    assert sum(len(batch.unreadable) for batch in runs[0]) >= 3
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.targets, second.targets)
    assert not caplog.records and capfd.readouterr() == ("", "")  # workers log nothing


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_refuses_in_one_sentence_or_counts_them_as_incorrect(damaged, workers):
    options = _options(damaged, num_workers=workers)
    data = build_data(options, train=False, evaluate=True)
    with refused("unreadable_image", "cat/3.JPEG", "--allow_bad_images"):
        list(eval_loader(data, options, refuse_bad=True))
    loader, prepare = eval_loader(data, options), EvalPrepare(options, "cpu")
    targets = torch.cat([prepare(batch)[1] for batch in loader])
    assert len(targets) == 20 and int((targets == -100).sum()) == 3
    assert {os.path.basename(data.val.path(i)) for i in loader.bad_images} == BAD
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_images_ends_with_a_sentence(tmp_path, workers):
    for name in ("cat", "dog"):
        fill_folder(tmp_path / "train" / name, 4)
    for path in tmp_path.rglob("*.JPEG"):
        path.write_bytes(b"nothing")
    options = _options(tmp_path, num_workers=workers)
    data = build_data(options, train=True, evaluate=False)
    loader = make_loader(data.train, options, GlobalBatchSampler(8, 4, 4, 1))
    with refused("unreadable_image", ".JPEG", "20"):
        list(loader)


# ---------------------------------------------------------------------------------- what a machine has too
# little of

_SHORT = """
import os, resource, sys
sys.path[:0] = [{root!r}]
import torch
from common.errors import UserError, lacks_in_words
from datasets.build import build_data
from datasets.dataset import make_loader
from datasets.sampler import GlobalBatchSampler
from tests.kits.options import data_options
options = data_options(data_set="IMNET", data_path={data!r}, num_workers=2, input_size=48, batch_size=16)
data = build_data(options, train=True, evaluate=False)

def full(error):
    def call(*arguments):
        raise error
    return call

def load():
    try:
        with lacks_in_words():
            list(make_loader(data.train, options, GlobalBatchSampler(len(data.train), 16, 16, 1)))
    except UserError as error:
        print(error.code, error, flush=True)

real, fork = torch.Tensor.share_memory_, os.fork
torch.Tensor.share_memory_ = full(RuntimeError(
    "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"))
load()
torch.Tensor.share_memory_, os.fork = real, full(BlockingIOError(11, "Resource temporarily unavailable"))
load()
os.fork = fork
resource.setrlimit(resource.RLIMIT_NOFILE, (24, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
load()  # raises its soft limit by itself
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
load()
"""


def test_too_little_shared_memory_processes_or_descriptors_are_one_sentence_each(folder):
    code = _SHORT.format(root=str(Path(__file__).parents[3]), data=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["shared_memory", "processes", "open_files"], done
    for line, word in zip(lines, ("/dev/shm", "ulimit -u", "ulimit -n"), strict=True):
        assert word in line
    assert "Traceback" not in done.stderr, done.stderr


# -------------------------------------------------------------------------------------------------------
# workers' ends

_CHILD = """
import sys, time
sys.path[:0] = [{root!r}]
from tests.kits.options import data_options
from datasets.build import build_data
from datasets.dataset import make_loader
from datasets.sampler import GlobalBatchSampler
options = data_options(data_set="IMNET", data_path={data!r}, num_workers=2, input_size=48)
data = build_data(options, train=True, evaluate=False)
loader = make_loader(data.train, options, GlobalBatchSampler(len(data.train), 16, 16, 1))
batches = iter(loader)
next(batches)
print(*[worker.pid for worker in loader._iterator._workers], flush=True)
{then}
"""


def test_workers_end_with_their_parent_and_let_a_group_signal_pass(folder):
    root = str(Path(__file__).parents[3])
    children = [subprocess.Popen([sys.executable, "-c", _CHILD.format(root=root, data=str(folder), then=then)],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                for then in ("time.sleep(60)", "raise KeyError('x')")]
    try:
        workers = [[int(pid) for pid in child.stdout.readline().split()] for child in children]
        assert [len(pids) for pids in workers] == [2, 2]
        for pid in workers[0]:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.3)
        assert all(alive(pid) for pid in workers[0])
        children[0].kill()
        assert [child.wait(20) for child in children] == [-9, 1]
    finally:
        for child in children:
            child.kill()
            child.stdout.close()
    deadline = time.time() + 10
    while any(map(alive, sum(workers, []))) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, sum(workers, [])))
