"""The order of images: equal for every split, each image once, resumable at any update."""
import numpy as np
import pytest

from common.errors import UserError
from datasets.sampler import ExactEvalSampler, GlobalBatchSampler, epoch_order


def _global_batches(images, global_batch, world, freq, epoch=3, start=0):
    """{update: items in global order} over all ranks."""
    batches = {}
    for rank in range(world):
        sampler = GlobalBatchSampler(images, global_batch, global_batch // (world * freq), freq, rank, world, seed=7)
        sampler.set_start(epoch, start)
        micro = list(sampler)
        assert len(micro) == len(sampler) == (sampler.updates_per_epoch - start) * freq
        for number, items in enumerate(micro):
            batches.setdefault(start + number // freq, []).extend(items)
    return batches


@pytest.mark.parametrize("world, freq", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (8, 2)])
def test_every_split_sees_the_same_global_batches_in_the_same_order(world, freq):
    batches = _global_batches(203, 32, world, freq)
    order = epoch_order(203, 7, 3)
    assert sorted(batches) == list(range(6))
    for update, items in batches.items():
        assert items == [(3, int(order[p]), p) for p in range(update * 32, update * 32 + 32)]


def test_a_start_in_the_middle_gives_the_rest_of_the_epoch():
    whole, rest = _global_batches(203, 32, 2, 2), _global_batches(203, 32, 2, 2, start=4)
    assert rest == {4: whole[4], 5: whole[5]}


def test_epochs_and_seeds_differ_and_an_epoch_has_no_images_twice():
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(100)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 6


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [0, 1, 4, 23, 50])
def test_evaluation_takes_each_image_exactly_once(world, images):
    shares = [list(ExactEvalSampler(images, rank, world)) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(images))
    assert all(len(ExactEvalSampler(images, rank, world)) == len(shares[rank]) for rank in range(world))


@pytest.mark.parametrize("arguments, code", [((20, 32, 8, 4), "too_few_images"), ((200, 32, 8, 3), "batch_arithmetic")])
def test_impossible_splits_are_refused(arguments, code):
    with pytest.raises(UserError) as caught:
        GlobalBatchSampler(*arguments)
    assert caught.value.code == code and "32" in str(caught.value)


def test_a_start_behind_the_epoch_is_refused():
    with pytest.raises(UserError) as caught:
        GlobalBatchSampler(64, 32, 8, 4).set_start(0, 3)
    assert caught.value.code == "other_run"
