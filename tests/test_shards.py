"""Tar files give the pictures, labels and order of the folder they were made from."""
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datasets.build import build_data, eval_loader
from datasets.images import BadImage
from datasets.shards import ShardReader


def options(path, **changes):
    return SimpleNamespace(**{**dict(
        data_set="IMNET", data_path=str(path), eval_data_path=None, nb_classes=None, val_labels=None,
        allow_class_mismatch=False, reindex=False, index_cache=str(path.parent / "cache"), input_size=64,
        color_jitter=0.4, aa="rand-m9-mstd0.5-inc1", train_interpolation="bicubic", hflip=0.5, scale=(0.08, 1.0),
        reprob=0.25, recount=1, imagenet_default_mean_and_std=True, crop_pct=None, seed=0, batch_size=4, num_workers=0,
        pin_mem=False, allow_bad_images=False), **changes})


@pytest.fixture
def both(tmp_path):
    """The same pictures as folders and as tars: mixed for training, one tar per class for evaluation."""
    folders, tars = tmp_path / "folders", tmp_path / "tars"
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        (tars / part).mkdir(parents=True)
        for number in range(12):
            name = f"class_{number % 3}"
            (folders / part / name).mkdir(parents=True, exist_ok=True)
            path = folders / part / name / f"{'a' * (number * 12)}{11 - number}.JPEG"
            Image.fromarray(draw.integers(0, 256, (70 + number, 90, 3), dtype=np.uint8)).save(path)
            shard = f"{number % 2}.tar" if part == "train" else f"{name}.tar"
            with tarfile.open(tars / part / shard, "a") as tar:
                tar.add(path, f"./some/{name}/{path.name}" if part == "train" else path.name)
    return folders, tars


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(both, workers):
    plain, shards = (build_data(options(path), train=True, evaluate=True) for path in both)
    assert shards.class_names == plain.class_names and len(shards.train) == 12
    items = [(2, index, index) for index in range(12)]
    for a, b in zip(plain.train.__getitems__(items)[:6], shards.train.__getitems__(items)[:6], strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
    ours, theirs = (list(eval_loader(data, options(both[0], num_workers=workers))) for data in (plain, shards))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.images.numpy(), b.images.numpy()) and np.array_equal(a.targets, b.targets)


def test_the_index_is_kept_and_notices_another_tar(both, monkeypatch):
    root, cache = str(both[1] / "train"), str(both[1].parent / "cache")
    first = ShardReader(root, cache_folder=cache)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("scanned again"))
        again = ShardReader(root, cache_folder=cache)
    assert [again.path(i) for i in range(12)] == [first.path(i) for i in range(12)]
    with tarfile.open(os.path.join(root, "0.tar"), "a") as tar:
        tar.add(both[0] / "val" / "class_1", "class_9")
    assert len(ShardReader(root, cache_folder=cache)) == 16
    os.truncate(os.path.join(root, "1.tar"), 600)
    with pytest.raises(BadImage, match="ends before"):
        [first.image(i) for i in range(12)]


def test_a_tar_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 99)
    with pytest.raises(UserError, match="a.tar cannot be read as an uncompressed tar"):
        ShardReader(str(tmp_path), cache_folder=str(tmp_path.parent / "cache"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(__file__, "class/words.txt")
    with pytest.raises(UserError, match="hold no images"):
        ShardReader(str(tmp_path), cache_folder=str(tmp_path.parent / "cache"))
