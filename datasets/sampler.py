"""Which image comes when: the order is a function of (seed, epoch) over global positions."""
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from common.random import numpy_generator

Item = tuple[int, int, int]  # (epoch, index in the data set, global position within the epoch)


class GlobalBatchSampler(Sampler[list[Item]]):
    """Micro-batches of one process, cut from global batches that no number of processes changes.

    The epoch's order is a permutation from key(seed, 'order', epoch); global batch k is its k-th slice (what
    is left over at the end is not used, as published); rank r takes the r-th contiguous part of it and
    micro-batch m the m-th slice of that. Iteration starts where `set_start` says, so a resumed run needs only
    (epoch, update).
    """

    def __init__(self, num_images: int, global_batch: int, batch_size: int, update_freq: int,
                 rank: int = 0, world_size: int = 1, seed: int = 0):
        self.num_images, self.global_batch, self.batch_size = num_images, global_batch, batch_size
        self.update_freq, self.rank, self.world_size, self.seed = update_freq, rank, world_size, seed
        self.epoch = self.first_update = 0

    @property
    def updates_per_epoch(self) -> int:
        """floor(images / global batch)."""
        return self.num_images // self.global_batch

    def set_start(self, epoch: int, first_update_in_epoch: int = 0) -> None:
        """The next iteration yields `epoch` from its update `first_update_in_epoch` on."""
        self.epoch, self.first_update = epoch, first_update_in_epoch

    def order(self, epoch: int) -> np.ndarray:
        """The images of an epoch in their order, int64 (num_images,)."""
        return numpy_generator(self.seed, "order", epoch).permutation(self.num_images)

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.first_update) * self.update_freq

    def __iter__(self) -> Iterator[list[Item]]:
        epoch = self.epoch
        order = self.order(epoch)
        for update in range(self.first_update, self.updates_per_epoch):
            start = update * self.global_batch + self.rank * self.batch_size * self.update_freq
            for micro in range(self.update_freq):
                first = start + micro * self.batch_size
                yield [(epoch, index, first + i)
                       for i, index in enumerate(order[first:first + self.batch_size].tolist())]
