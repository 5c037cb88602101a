"""A quick look at a sample of the images before a run: unreadable ones, surprising ones, how long one takes."""
import time
from dataclasses import dataclass, field

import numpy as np

from common.random import numpy_generator
from datasets.dataset import ImageDataset
from datasets.images import BadImage, show


@dataclass
class SampleCheck:
    """looked: images decoded; unreadable: (path, reason); tiny: paths of images below half the input size;
    seconds: mean time to decode and transform one; classes: classes met."""

    looked: int
    classes: int
    seconds: float
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What a person should know, in words; the first says what was looked at."""
        said = [f"{self.looked} images of {self.classes} classes looked at, {1000 * self.seconds:.1f} ms each, "
                f"{len(self.unreadable)} unreadable"]
        if self.unreadable:
            path, reason = self.unreadable[0]
            said.append(f"unreadable: {path} ({reason})")
        if self.tiny:
            said.append(f"{len(self.tiny)} images are smaller than half the input size, such as {self.tiny[0]}")
        return said


def check_sample(dataset: ImageDataset, count: int = 64, seed: int = 0) -> SampleCheck:
    """Decode and transform up to `count` images drawn evenly from the data set; bad ones are counted, not raised."""
    count = min(count, len(dataset))
    edges = np.linspace(0, len(dataset), count + 1).astype(np.int64)
    chosen = [int(i) for i in numpy_generator(seed, "check").integers(edges[:-1], edges[1:])]
    found = SampleCheck(count, len(np.unique(dataset.targets[chosen])), 0.0)
    started = time.perf_counter()
    for index in chosen:
        try:
            image = dataset.image(index)
            if min(image.size) * 2 < dataset.size:
                found.tiny.append(show(dataset.path(index)))
            dataset.transformed(image, index)
        except BadImage as error:
            found.unreadable.append((show(dataset.path(index)), str(error)))
    found.seconds = (time.perf_counter() - started) / max(1, count)
    return found


def spread_over_classes(targets: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Positions of up to `count` images, int64, drawn so that as many classes as possible are there equally often.

    targets: int64 (N,) class of each image.
    """
    order = numpy_generator(seed, "spread").permutation(len(targets))
    by_class = order[np.argsort(targets[order], kind="stable")]
    sizes = np.bincount(targets)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = np.empty(len(targets), dtype=np.int64)  # an image's place among those of its class
    turn[by_class] = np.arange(len(targets)) - first
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])
