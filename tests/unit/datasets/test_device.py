"""The last steps on the device: normalisation, erasing and mixing, equal for every split of the global
batch."""
import numpy as np
import pytest
import torch

from common.random import key
from datasets.dataset import Batch
from datasets.device import GroupMixup, Prepare
from datasets.transforms import Erasing
from tests.kits.options import data_options

COUNT, SIZE = 192, 12
IMAGES = torch.from_numpy(np.random.default_rng(0).standard_normal((COUNT, SIZE, SIZE, 3), dtype=np.float32))
TARGETS = torch.from_numpy(np.random.default_rng(1).integers(0, 10, COUNT))


def group_mixup(**changes):
    return GroupMixup(data_options(**changes), 10)


def mixed(mixup, splits, first=64):
    parts = [mixup(IMAGES[part].clone(), TARGETS[part], 2, first + part) for part in np.split(np.arange(COUNT), splits)]
    return [torch.cat(values) for values in zip(*parts)]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_neighbours_are_mixed_by_the_same_share_and_no_split_of_the_global_batch_changes_a_bit(mode, minmax):
    mixup = group_mixup(seed=5, mixup_mode=mode, cutmix_minmax=minmax, mixup_prob=0.8)
    images, targets = mixed(mixup, [])
    for splits in ([64, 128], [2, 6, 70, 100, 190], list(range(2, COUNT, 2))):
        assert all(map(torch.equal, mixed(mixup, splits), (images, targets)))
    assert not torch.equal(mixed(mixup, [], first=66)[0], images)
    hot = torch.full((COUNT, 10), 0.01).scatter_(1, TARGETS[:, None], 0.91)
    plan = mixup.plan(2, 64 + np.arange(COUNT), SIZE, SIZE)
    for i, (lam, box) in enumerate(plan):
        expected, other = IMAGES[i].clone(), IMAGES[i ^ 1]
        if box is None:
            expected = expected * lam + other * (1 - lam)
        else:
            top, bottom, left, right = box
            expected[top:bottom, left:right] = other[top:bottom, left:right]
            assert lam == pytest.approx(1 - (bottom - top) * (right - left) / SIZE ** 2)
        assert torch.equal(images[i], expected)
        torch.testing.assert_close(targets[i], hot[i] * lam + hot[i ^ 1] * (1 - lam))
    assert any(box for _, box in plan)
    with pytest.raises(ValueError, match="3 positions"):
        mixup.plan(0, np.arange(3), SIZE, SIZE)


@pytest.mark.parametrize("mode, units", [("batch", 1), ("pair", 32), ("elem", 64)])
def test_shares_are_distributed_as_in_timm(mode, units):
    """Against the distributions themselves: half CutMix, a share prob mixed at all, Beta(0.8, 0.8) for
    mixup."""
    mixup = group_mixup(mixup_mode=mode, mixup_prob=0.7)
    drawn = [choice for group in range(6400 // units) for choice in mixup.choices(0, group, 224, 224)[::64 // units]]
    mixed = [lam for lam, box in drawn if box is None and lam < 1]
    cut = [lam for lam, box in drawn if box is not None]
    assert len(drawn) == 6400
    assert len(mixed) / 6400 == pytest.approx(0.35, abs=0.02) and len(cut) / 6400 == pytest.approx(0.35, abs=0.02)
    beta = np.random.default_rng(0).beta(0.8, 0.8, 200_000)
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(mixed, quantile) == pytest.approx(np.quantile(beta, quantile), abs=0.04)
    assert np.mean(cut) > 0.5  # Boxes are cut off at the borders, so more of the own image stays than lam said.


def batch(pixels, boxes, rows, mode, epoch=0):
    boxes = boxes[rows]
    erased = Erasing(mode=mode).fill(boxes.numpy(), [key(0, "erase", epoch, row) for row in rows], 32, 32)
    return Batch(torch.from_numpy(pixels[rows]), torch.zeros(len(rows), dtype=torch.int64), torch.tensor(rows),
                 torch.arange(len(rows)), boxes, epoch, erased=erased)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erased_boxes_are_filled_by_images_not_by_batch(mode):
    prepare, rows = Prepare(data_options(mixup=0, cutmix=0), "cpu", 10), [0, 1, 2, 3]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    boxes = torch.tensor([[[2, 3, 8, 9], [4, 4, 2, 2]], [[0, 0, 0, 0]] * 2, [[5, 5, 20, 4], [0, 0, 0, 0]],
                          [[0, 0, 31, 31], [0, 0, 0, 0]]], dtype=torch.int32)
    whole, targets = prepare(batch(pixels, boxes, rows, mode))
    plain, _ = prepare(batch(pixels, torch.zeros_like(boxes), rows, mode))
    assert targets.dtype == torch.int64
    assert torch.equal(whole[1], plain[1]) and torch.equal(whole[0, :, 10:], plain[0, :, 10:])
    box = whole[0, :, 2:10, 3:12]
    assert len(box.unique()) == {"pixel": 3 * 72, "rand": 6, "const": 1}[mode]
    assert len(box[:, 2:4, 1:3].unique()) == {"pixel": 12, "rand": 3, "const": 1}[mode]  # the second is on top
    for row in rows:
        assert torch.equal(prepare(batch(pixels, boxes, [row], mode))[0][0], whole[row])
    assert torch.equal(prepare(batch(pixels, boxes, rows, mode, epoch=1))[0], whole) == (mode == "const")
