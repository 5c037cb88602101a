"""Batches depend on seed, epoch and position alone: not on workers, splits, restarts or other random streams."""
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datasets.build import build_data, eval_loader, train_loader
from datasets.cifar import read_arrays
from datasets.device import EvalPrepare, TrainPrepare
from datasets.sampler import GlobalBatchSampler
from tests.kits.options import data_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 70 + 3 textured pictures."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 70), ("val", 3)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((60, 48)).save(root / part / name / f"{i}.png")
    return root


def _options(folder, **changes):
    return data_options(**{"data_set": "IMNET", "data_path": str(folder), "input_size": 48, "reprob": 0.5, **changes})


def _epoch(folder, world=1, freq=1, epoch=1, start=0, **changes):
    """Prepared images and targets of an epoch in global order, global batch 64, from all ranks."""
    options = _options(folder, batch_size=64 // (world * freq), **changes)
    data = build_data(options, train=True, evaluate=False)
    prepare = TrainPrepare(options, data.num_classes, "cpu")
    found = {}
    for rank in range(world):
        sampler = GlobalBatchSampler(len(data.train), 64, options.batch_size, freq, rank, world, seed=options.seed)
        sampler.set_start(epoch, start)
        loader = train_loader(data, options, sampler)
        for batch in loader:
            images, targets = prepare(batch)
            for row, position in enumerate(batch.positions.tolist()):
                found[position] = images[row], targets[row]
        if options.num_workers:
            loader.close()
    positions = sorted(found)
    assert positions == list(range(64 * start, 128))
    return torch.stack([found[p][0] for p in positions]), torch.stack([found[p][1] for p in positions])


@pytest.mark.parametrize("split", [dict(freq=4), dict(world=2, freq=2), dict(world=4, mixup_mode="elem"),
                                   dict(num_workers=2), dict(num_workers=1, world=2, recount=3)])
def test_no_split_and_no_worker_changes_a_bit(folder, split):
    same = {name: split[name] for name in ("mixup_mode", "recount") if name in split}
    whole, parts = _epoch(folder, **same), _epoch(folder, **split)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_of_an_epoch_gives_the_same_rest(folder, workers):
    whole, rest = _epoch(folder), _epoch(folder, start=1, num_workers=workers)
    assert torch.equal(whole[0][64:], rest[0]) and torch.equal(whole[1][64:], rest[1])


def test_epochs_and_seeds_give_other_pictures(folder):
    images = [_epoch(folder, epoch=epoch, seed=seed)[0] for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_disturbs_no_other_random_stream(folder, workers):
    options = _options(folder, num_workers=workers)
    data = build_data(options, train=True, evaluate=True)
    sampler = GlobalBatchSampler(len(data.train), 64, 64, 1)
    loaders = train_loader(data, options, sampler), eval_loader(data, options)

    def draws(load):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        if load:
            for loader in loaders:
                prepare = TrainPrepare(options, 2, "cpu") if loader is loaders[0] else EvalPrepare(options, "cpu")
                for batch in loader:
                    prepare(batch)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draws(True) == draws(False)
    if workers:
        for loader in loaders:
            loader.close()


def test_workers_persist_and_follow_the_sampler(folder):
    options = _options(folder, num_workers=2)
    data = build_data(options, train=True, evaluate=False)
    sampler = GlobalBatchSampler(len(data.train), 16, 16, 1)
    loader = train_loader(data, options, sampler)
    workers = []
    for epoch, start in ((0, 5), (4, 0), (4, 7)):
        sampler.set_start(epoch, start)
        batches = list(loader)
        assert [batch.epoch for batch in batches] == [epoch] * (8 - start)
        assert batches[0].positions[0] == 16 * start and batches[0].images.is_shared()
        workers.append([worker.pid for worker in loader._iterator._workers])
    assert workers[0] == workers[1] == workers[2]
    loader.close()
    assert not any(os.path.exists(f"/proc/{pid}/cmdline") and open(f"/proc/{pid}/cmdline").read() for pid in workers[0])


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_evaluation_loads_each_picture_once_with_its_label(folder, world):
    options = _options(folder, batch_size=2)
    data = build_data(options, train=False, evaluate=True)
    seen = {}
    for rank in range(world):
        for batch in eval_loader(data, options, rank, world):
            assert batch.epoch == -1 and len(batch.images) <= 3 and (batch.positions == -1).all()
            for index, target in zip(batch.indices.tolist(), batch.targets.tolist(), strict=True):
                assert index not in seen
                seen[index] = target
    assert [seen[i] for i in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_transform_names_the_picture(folder, workers):
    options = _options(folder, num_workers=workers)
    data = build_data(options, train=False, evaluate=True)

    def fail(picture):
        raise KeyError("no such operation")

    data.val.transform = fail
    loader = eval_loader(data, options)
    with pytest.raises(RuntimeError, match=r"transforming .*val.a.0\.png failed.*no such operation"):
        list(loader)


def test_settings_are_checked(folder):
    with pytest.raises(UserError, match="--remode blur is not one of pixel, rand, const"):
        TrainPrepare(_options(folder, remode="blur"), 2, "cpu")


_CHILD = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from tests.kits.options import data_options
from datasets.build import *
options = data_options(data_set="IMNET", data_path={data!r}, num_workers=2, input_size=48)
data = build_data(options, train=True, evaluate=False)
loader = train_loader(data, options, GlobalBatchSampler(len(data.train), 16, 16, 1))
batches = iter(loader)
next(batches)
print(*[worker.pid for worker in loader._iterator._workers], flush=True)
{then}
"""


def test_workers_end_with_their_parent_and_let_a_group_signal_pass(folder):
    tests = os.path.dirname(__file__)
    children = [subprocess.Popen(
        [sys.executable, "-c", _CHILD.format(root=os.path.dirname(tests), tests=tests, data=str(folder), then=then)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for then in ("time.sleep(60)", "raise KeyError('x')")]
    try:
        workers = [[int(pid) for pid in child.stdout.readline().split()] for child in children]
        assert [len(pids) for pids in workers] == [2, 2]
        for pid in workers[0]:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.3)
        assert all(_alive(pid) for pid in workers[0])
        children[0].kill()
        assert [child.wait(20) for child in children] == [-9, 1]
    finally:
        for child in children:
            child.kill()
            child.stdout.close()
    deadline = time.time() + 10
    while any(map(_alive, sum(workers, []))) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, sum(workers, [])))


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-100 with 8 + 4 pictures, as distributed: a pickle of bytes keys."""
    where = tmp_path / "cifar-100-python"
    where.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 8), ("test", 4)):
        content = {b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), b"fine_labels": list(range(count)),
                   b"filenames": [b"x.png"] * count}
        (where / name).write_bytes(pickle.dumps(content, protocol=3))
    names = {b"fine_label_names": [b"class%02d" % i for i in range(100)]}
    (where / "meta").write_bytes(pickle.dumps(names, protocol=3))
    return tmp_path


def test_cifar_is_read_as_it_is(cifar):
    options = data_options(data_set="CIFAR", data_path=str(cifar), input_size=32, batch_size=4)
    data = build_data(options, train=True, evaluate=True)
    assert data.num_classes == 100 and data.class_names[3] == "class03"
    assert data.train.targets.tolist() == list(range(8)) and data.val.path(2).endswith("test[2]")
    batch = next(iter(eval_loader(data, options)))
    raw = pickle.loads((cifar / "cifar-100-python" / "test").read_bytes())[b"data"]
    assert np.array_equal(batch.images.numpy().transpose(0, 3, 1, 2).reshape(4, -1), raw)
    loader = train_loader(data, options, GlobalBatchSampler(8, 4, 4, 1))
    assert sum(len(batch.images) for batch in loader) == 8
    with pytest.raises(UserError, match="10 or 100 classes, not --nb_classes 7"):
        build_data(data_options(data_set="CIFAR", data_path=str(cifar), nb_classes=7), train=True, evaluate=False)
    with pytest.raises(UserError, match="python version of CIFAR"):
        build_data(data_options(data_set="CIFAR", data_path=str(cifar), nb_classes=10), train=True, evaluate=False)


def test_the_original_files_written_by_python_2_are_read(tmp_path):
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86"
             b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
             b"\x89U\x06ABCDEFtb")
    (tmp_path / "file").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x06K\x09eu.")
    content = read_arrays(str(tmp_path / "file"))
    assert content["data"].tolist() == [[65, 66, 67], [68, 69, 70]] and content["labels"] == [6, 9]


class _Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_pickle_of_a_data_file_is_executed(cifar, tmp_path):
    file, mark = cifar / "cifar-100-python" / "train", tmp_path / "owned"
    for content in ({b"data": _Hostile(mark)}, [1, 2], {b"data": np.array([_Hostile(mark)], dtype=object)}):
        file.write_bytes(pickle.dumps(content, protocol=3))
        with pytest.raises(UserError, match="is not a CIFAR file|does not hold CIFAR"):
            build_data(data_options(data_set="CIFAR", data_path=str(cifar)), train=True, evaluate=False)
    file.write_bytes(b"\x80\x02garbage")
    with pytest.raises(UserError):
        read_arrays(str(file))
    assert not mark.exists()
