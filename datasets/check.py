"""A quick look at a sample of the pictures before a run: unreadable ones, surprising ones, how long one takes."""
import time
from dataclasses import dataclass, field

import numpy as np

from common.random import numpy_generator
from datasets.dataset import PictureDataset
from datasets.images import BadPicture, show


@dataclass
class SampleCheck:
    """looked: pictures decoded; unreadable: (path, reason); tiny: paths of pictures below half the input size;
    seconds: mean time to decode and transform one; classes: classes met."""

    looked: int
    classes: int
    seconds: float
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What a person should know, in words; the first says what was looked at."""
        said = [f"{self.looked} pictures of {self.classes} classes looked at, {1000 * self.seconds:.1f} ms each, "
                f"{len(self.unreadable)} unreadable"]
        if self.unreadable:
            path, reason = self.unreadable[0]
            said.append(f"unreadable: {path} ({reason})")
        if self.tiny:
            said.append(f"{len(self.tiny)} pictures are smaller than half the input size, such as {self.tiny[0]}")
        return said


def check_sample(dataset: PictureDataset, count: int = 64, seed: int = 0) -> SampleCheck:
    """Decode and transform up to `count` pictures drawn evenly from the data set; bad ones are counted, not raised."""
    count = min(count, len(dataset))
    edges = np.linspace(0, len(dataset), count + 1).astype(np.int64)
    chosen = [int(i) for i in numpy_generator(seed, "check").integers(edges[:-1], edges[1:])]
    found = SampleCheck(count, len(np.unique(dataset.targets[chosen])), 0.0)
    started = time.perf_counter()
    for index in chosen:
        try:
            picture = dataset.picture(index)
            if min(picture.size) * 2 < dataset.size:
                found.tiny.append(show(dataset.path(index)))
            dataset.transformed(picture, index)
        except BadPicture as error:
            found.unreadable.append((show(dataset.path(index)), str(error)))
    found.seconds = (time.perf_counter() - started) / max(1, count)
    return found


def spread_over_classes(targets: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Positions of up to `count` pictures, int64, drawn so that as many classes as possible are there equally often.

    targets: int64 (N,) class of each picture.
    """
    order = numpy_generator(seed, "spread").permutation(len(targets))
    by_class = order[np.argsort(targets[order], kind="stable")]
    sizes = np.bincount(targets)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = np.empty(len(targets), dtype=np.int64)  # a picture's place among those of its class
    turn[by_class] = np.arange(len(targets)) - first
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])
