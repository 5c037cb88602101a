"""Training batches as the network gets them, from all ranks."""
import torch

from datasets.build import build_data
from datasets.dataset import make_loader
from datasets.device import Prepare
from datasets.sampler import GlobalBatchSampler


def prepared(options, world: int = 1, freq: int = 1, epoch: int = 0, start: int = 0):
    """Images and targets of an epoch from update `start` on, in global order."""
    data, update = build_data(options, train=True, evaluate=False), options.batch_size * world * freq
    prepare, found = Prepare(options, "cpu", data.num_classes), {}
    for rank in range(world):
        sampler = GlobalBatchSampler(len(data.train), update, options.batch_size, freq, rank, world, seed=options.seed)
        sampler.set_start(epoch, start)
        loader = make_loader(data.train, options, sampler)
        for batch in loader:
            found |= dict(zip(batch.positions.tolist(), zip(*prepare(batch)), strict=True))
        loader.close()
    positions = sorted(found)
    assert positions == list(range(update * start, len(data.train) // update * update))
    return [torch.stack([found[p][part] for p in positions]) for part in (0, 1)]
