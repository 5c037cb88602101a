"""Mixing belongs to global positions: equal for every split, distributed as timm's."""
import numpy as np
import pytest
import torch

from common.errors import UserError
from datasets.mixup import GroupMixup, build_mixup
from tests.kits.options import data_options

COUNT, SIZE = 192, 12
IMAGES = torch.from_numpy(np.random.default_rng(0).standard_normal((COUNT, SIZE, SIZE, 3), dtype=np.float32))
TARGETS = torch.from_numpy(np.random.default_rng(1).integers(0, 10, COUNT))


def _mixed(mixup, splits, first=64):
    images, targets = [], []
    for part in np.split(np.arange(COUNT), splits):
        x, y = mixup(IMAGES[part].clone(), TARGETS[part], 2, first + part)
        images.append(x)
        targets.append(y)
    return torch.cat(images), torch.cat(targets)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_no_split_of_the_global_batch_changes_a_bit(mode, minmax):
    mixup = GroupMixup(10, 5, mode=mode, cutmix_minmax=minmax, prob=0.8)
    whole = _mixed(mixup, [])
    for splits in ([64, 128], [2, 6, 70, 100, 190], list(range(2, COUNT, 2))):
        parts = _mixed(mixup, splits)
        assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    assert not torch.equal(_mixed(mixup, [], first=66)[0], whole[0])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_pictures_and_labels_are_mixed_with_the_neighbour_by_the_same_share(mode):
    mixup = GroupMixup(10, 3, mode=mode, smoothing=0.1)
    positions = np.arange(COUNT)
    images, targets = mixup(IMAGES.clone(), TARGETS, 0, positions)
    hot = torch.full((COUNT, 10), 0.01).scatter_(1, TARGETS[:, None], 0.91)
    boxes = 0
    for run in mixup.runs(0, positions, SIZE, SIZE):
        for i in range(run.start, run.stop):
            own, other = IMAGES[i], IMAGES[i ^ 1]
            if run.box is None:
                expected = own * run.lam + other * (1 - run.lam)
            else:
                top, bottom, left, right = run.box
                expected = own.clone()
                expected[top:bottom, left:right] = other[top:bottom, left:right]
                assert run.lam == pytest.approx(1 - (bottom - top) * (right - left) / SIZE ** 2)
                boxes += 1
            assert torch.equal(images[i], expected)
            torch.testing.assert_close(targets[i], hot[i] * run.lam + hot[i ^ 1] * (1 - run.lam))
    assert boxes
    assert torch.allclose(targets.sum(1), torch.ones(COUNT))


@pytest.mark.parametrize("mode, units", [("batch", 1), ("pair", 32), ("elem", 64)])
def test_shares_are_distributed_as_in_timm(mode, units):
    """Against the distributions themselves: half CutMix, a share prob mixed at all, Beta(0.8, 0.8) for mixup."""
    mixup = GroupMixup(10, 0, mode=mode, prob=0.7)
    drawn = [choice for group in range(6400 // units) for choice in mixup.choices(0, group, 224, 224)]
    mixed = [lam for lam, box in drawn if box is None and lam < 1]
    cut = [lam for lam, box in drawn if box is not None]
    assert len(drawn) == 6400
    assert len(mixed) / 6400 == pytest.approx(0.35, abs=0.02) and len(cut) / 6400 == pytest.approx(0.35, abs=0.02)
    beta = np.random.default_rng(0).beta(0.8, 0.8, 200_000)
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(mixed, quantile) == pytest.approx(np.quantile(beta, quantile), abs=0.04)
    assert np.mean(cut) > 0.5  # Boxes are cut off at the borders, so more of the own picture stays than lam said.


def test_off_partly_on_and_impossible():
    assert build_mixup(data_options(mixup=0.0, cutmix=0.0), 10) is None
    only_mixup = build_mixup(data_options(mixup=0.8, cutmix=0.0), 10)
    assert all(box is None for group in range(50) for _, box in only_mixup.choices(0, group, 32, 32))
    only_cutmix = build_mixup(data_options(mixup=0.0, cutmix=1.0), 10)
    assert all(box is not None for group in range(50) for _, box in only_cutmix.choices(0, group, 32, 32))
    with pytest.raises(UserError, match="must be even"):
        only_mixup.runs(0, np.arange(3), 32, 32)
    with pytest.raises(UserError, match="not one of batch, pair, elem"):
        GroupMixup(10, 0, mode="half")


def test_drawing_disturbs_no_other_stream():
    np.random.seed(1), torch.manual_seed(1)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(1), torch.manual_seed(1)
    GroupMixup(10, 0).choices(0, 0, 32, 32)
    assert (np.random.rand(), torch.rand(1)) == expected
