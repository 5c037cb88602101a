"""The order of images: equal for every split, each image once, resumable at any update."""
import numpy as np
import pytest

from datasets.sampler import GlobalBatchSampler, epoch_order


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


def test_epochs_and_seeds_differ_and_an_epoch_has_no_images_twice():
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(100)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 6


