"""The frame of the data sets of dense prediction: keyed draws, unreadable images, micro-batches.

The draws of an image are keyed by seed, epoch and index, so that any number of processes and workers gives
the same images and targets. Padding is a matter of the batch.
"""
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.random import key, numpy_generator
from datasets.dataset import ATTEMPTS, UNREADABLE_TARGET
from datasets.images import BadImage, decode_path
from datasets.sampler import Item

S = TypeVar("S")


class Rows(NamedTuple):
    """What every batch has: targets (0, or UNREADABLE_TARGET where no image could be read), indices in the
    data set and positions in the epoch (-1 in evaluation), int64 (B,); epoch (-1 in evaluation); unreadable:
    (index, reason) of each image that could not be read."""
    targets: Tensor
    indices: Tensor
    positions: Tensor
    epoch: int
    unreadable: tuple[tuple[int, str], ...]


class SceneDataset(Dataset, Generic[S]):
    """Images with what they show. A subclass says how one is loaded and how samples are put together."""

    seed = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Where image `index` comes from, for reports."""
        raise NotImplementedError

    def load(self, index: int, draws: np.random.Generator | None) -> S:
        """Image `index` with what it shows, transformed with `draws`, without for evaluation; BadImage when
        it cannot be read."""
        raise NotImplementedError

    def blank(self, index: int) -> S:
        """What stands for image `index` where it cannot be read."""
        raise NotImplementedError

    def batch(self, samples: Sequence[S], rows: Rows) -> tuple:
        """A named tuple with at least the fields of Rows and `images`, in any order."""
        raise NotImplementedError

    def __getitem__(self, item: Item | int) -> tuple:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[Item | int]) -> tuple:
        """A batch from (epoch, index, position) tuples in training or plain indices in evaluation."""
        each = [item if isinstance(item, tuple) else (-1, item, -1) for item in items]
        bad: list[tuple[int, str]] = []
        found = [self._sample(epoch, index, bad) for epoch, index, _ in each]
        samples = [self.blank(row[1]) if sample is None else sample for row, sample in zip(each, found)]
        targets = [UNREADABLE_TARGET if sample is None else 0 for sample in found]
        indices, positions = torch.tensor([row[1:] for row in each], dtype=torch.int64).T.contiguous()
        return self.batch(samples, Rows(torch.tensor(targets), indices, positions, each[0][0], tuple(bad)))

    def _sample(self, epoch: int, index: int, bad: list[tuple[int, str]]) -> S | None:
        """Image `index`, in training another where it cannot be read; None when none could be."""
        used = index
        for attempt in range(ATTEMPTS if epoch >= 0 else 1):
            try:
                draws = numpy_generator(self.seed, "augment", epoch, index) if epoch >= 0 else None
                return self.load(used, draws)
            except BadImage as error:
                bad.append((used, str(error)))
                used = key(self.seed, "replace", epoch, index, attempt) % len(self)
        return None


def read_image(path: str, size: Sequence[int]) -> np.ndarray:
    """RGB pixels uint8 (H, W, 3), turned as the EXIF entry says; BadImage unless of the annotated `size`."""
    image: Image.Image = decode_path(path, exif_orientation=True)
    if image.size != (size[1], size[0]):
        raise BadImage(f"{image.width}x{image.height} pixels, annotated as {size[1]}x{size[0]}")
    return np.asarray(image)
