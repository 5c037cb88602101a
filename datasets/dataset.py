"""The data set that workers run, and the loader around it: uint8 batches in one shared buffer, keyed
draws."""
import atexit
import ctypes
import gc
import hashlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.errors import Failure, UserError
from common.random import key, reseed, seeded
from common.text import printable
from config.options import Options
from datasets.images import BadImage, fast_jpeg, transformed, unreadable
from datasets.readers import Reader
from datasets.sampler import Item
from datasets.transforms import Erasing, Transform

UNREADABLE_TARGET = -100  # torch's cross entropy passes over it, and no prediction equals it
ATTEMPTS = 20  # at an image that can be read, in training
_PATIENCE = 300  # seconds for one batch
_T = TypeVar("_T")

class Batch(NamedTuple):
    """images uint8 (B, H, W, 3); targets, indices (in the data set) and positions (global, within the epoch;
    -1 in evaluation) int64 (B,); boxes to erase int32 (B, recount, 4) as top, left, height, width (0 = none);
    epoch (-1 in evaluation); unreadable: (index, reason) of each image that could not be read, replacements
    included: in training another image stands there, in evaluation a black one with target -100; erased:
    nothing, or places int64 (n,) among the B * H * W pixels and what fills them, float32 (n, 3),
    normalised."""

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor
    boxes: torch.Tensor
    epoch: int
    unreadable: tuple[tuple[int, str], ...] = ()
    erased: tuple[torch.Tensor, ...] = ()


class ImageDataset(Dataset[Batch]):
    """Images of a reader with their logit positions, transformed; takes a micro-batch's items, gives a Batch.

    targets: int64 (N,), -1 for images of no class, which are left out; indices count what is left.
    """

    def __init__(self, reader: Reader, targets: np.ndarray, transform: Transform, size: int, *, seed: int = 0,
                 erasing: Erasing | None = None, exif_orientation: bool = False):
        fast_jpeg()  # Built and tested here, once, so that forked workers inherit it.
        self._kept = np.flatnonzero(targets >= 0)
        self.targets = targets[self._kept]
        self.reader, self.transform, self.size = reader, transform, size
        self.seed, self.erasing, self.exif_orientation = seed, erasing, exif_orientation

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def order(self) -> str:
        """Digest of the images in their order: the reader's, unless some of its images are left out."""
        if len(self) == len(self.reader):
            return self.reader.order
        return hashlib.blake2b(self.reader.order.encode() + self._kept.tobytes(), digest_size=16).hexdigest()

    def share(self, rank: int, world_size: int) -> Sequence[int]:
        """The images of one rank in evaluation: every world_size-th, or a contiguous part where only the
        order in which images are stored is read fast."""
        if not self.reader.sequential:
            return range(rank, len(self), world_size)
        stored = np.argsort(np.argsort(self.reader.stored_order())[self._kept])
        return np.array_split(stored, world_size)[rank].tolist()

    def path(self, index: int) -> str:
        """Where image `index` comes from, for reports."""
        return self.reader.name(int(self._kept[index]))

    def pixels(self, index: int, draws: int | None = None) -> np.ndarray:
        """Image `index` transformed, uint8 (size, size, 3), with random draws seeded by `draws`.

        Raises BadImage, and RuntimeError naming the image when the transform fails.
        """
        def work(image: Image.Image) -> np.ndarray:
            if draws is not None:
                reseed(draws)
            return self.transform(image)

        data = self.reader.encoded(int(self._kept[index]))
        try:
            return transformed(data, work, self.exif_orientation)
        except (BadImage, OSError):
            raise
        except Exception as error:
            raise RuntimeError(f"transforming {printable(self.path(index))} failed: {error}") from error

    def _labelled(self, draws: int | None, index: int) -> tuple[np.ndarray, int]:
        return self.pixels(index, draws), int(self.targets[index])

    def __getitems__(self, items: Sequence[Item | int]) -> Batch:
        """A Batch from (epoch, index, position) tuples in training or plain indices in evaluation."""
        count, size = len(items), self.size
        images = torch.empty(count, size, size, 3, dtype=torch.uint8)
        if get_worker_info() is not None:
            images.share_memory_()  # While still empty: filled in place, it is not copied on its way out.
        boxes = np.zeros((count, self.erasing.count if self.erasing else 1, 4), dtype=np.int32)
        targets, unreadable = np.empty(count, dtype=np.int64), []
        rows = [item if isinstance(item, tuple) else (-1, item, -1) for item in items]
        with seeded(0) if rows[0][0] >= 0 else nullcontext():
            for row, (epoch, index, _) in enumerate(rows):
                draws = key(self.seed, "augment", epoch, index) if epoch >= 0 else None
                found = self.first_readable(partial(self._labelled, draws), epoch, index, unreadable)
                images.numpy()[row], targets[row] = found or (0, UNREADABLE_TARGET)  # black
                if found and self.erasing is not None:
                    boxes[row] = self.erasing.boxes(size, size)
        indices, positions = torch.tensor([row[1:] for row in rows], dtype=torch.int64).T.contiguous()
        erased = () if self.erasing is None else self.erasing.fill(
            boxes, [key(self.seed, "erase", epoch, index) for epoch, index, _ in rows], size, size)
        return Batch(images, torch.from_numpy(targets), indices, positions, torch.from_numpy(boxes),
                     rows[0][0], tuple(unreadable), erased)

    def first_readable(self, read: Callable[[int], _T], epoch: int, index: int,
                       unreadable: list[tuple[int, str]]) -> _T | None:
        """What `read` gives of image `index` or, in training, of another in place of an unreadable one; None
        when none can be read. Reasons are added to `unreadable`."""
        used = index
        for attempt in range(ATTEMPTS if epoch >= 0 else 1):
            try:
                return read(used)
            except BadImage as error:
                unreadable.append((used, str(error)))
                used = key(self.seed, "replace", epoch, index, attempt) % len(self)
        return None


_torch_handler: Callable | None = None  # of SIGCHLD, set when a loader starts its workers


@contextmanager
def worker_deaths_noticed() -> Iterator[None]:
    """While a batch is awaited, a worker's death is an error at once; elsewhere it waits for the next batch.

    PyTorch's handler of SIGCHLD stays in place for good and raises in the middle of any line: of a save, of
    the error handling itself. So it is kept aside and only used here.
    """
    global _torch_handler
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        if _torch_handler is not None:
            signal.signal(signal.SIGCHLD, _torch_handler)
            _torch_handler(signal.SIGCHLD, None)  # those that died before
        yield
    finally:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _torch_handler = handler if callable(handler) else _torch_handler


class ImageLoader(DataLoader[Batch]):
    """A DataLoader that keeps what could not be read; workers log nothing, so that no progress bar is torn.

    bad_images: the reason for each index in the data set, until `take_unreadable` is called. With
    `refuse_bad` the first one is a UserError instead; so are 20 unreadable ones in a row in training.
    """

    def __init__(self, dataset: ImageDataset, *, refuse_bad: bool, **arguments):
        super().__init__(dataset, **arguments)
        self.images, self.refuse_bad = dataset, refuse_bad
        self.bad_images: dict[int, str] = {}
        if self.num_workers:
            # multiprocessing ends what is left at exit by a SIGTERM, which workers ignore: end them before.
            atexit.register(self.close)

    def close(self) -> None:
        """End the workers; a later iteration starts new ones."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            # Not left to __del__: after an exception a traceback may still hold the iterator.
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers and self._iterator is None and dist.is_available() and dist.is_initialized():
            # A thread of the process group that is just letting go of a tensor holds a lock of the
            # interpreter, and a worker forked meanwhile waits for it for ever (CPython 3.11): let those
            # threads come to rest.
            time.sleep(0.2)
        try:
            with worker_deaths_noticed():
                batches = super().__iter__()
            while True:
                with worker_deaths_noticed():
                    batch = next(batches, None)
                if batch is None:
                    return
                if batch.unreadable:
                    self._keep(batch)
                yield batch
        except Exception as error:
            self.close()
            before, name, sentence = str(error).rpartition("common.errors.Failure: ")
            if name:  # PyTorch has put a worker's traceback before it
                raise Failure(sentence.strip(), code="data_lost") from None
            raise

    def _keep(self, batch: Batch) -> None:
        index, reason = batch.unreadable[0]
        last = unreadable(self.images.path(index), reason)
        if self.refuse_bad:
            raise UserError(f"Image {last}; fix or remove it, or count unreadable images as incorrect with "
                            "--allow_bad_images true.", code="unreadable_image")
        if batch.epoch >= 0 and (batch.targets == UNREADABLE_TARGET).any():
            raise Failure(f"None of {ATTEMPTS} images in a row can be read: {last}; check the disk and "
                          "the data path.", code="unreadable_image")
        self.bad_images |= dict(batch.unreadable)

    def take_unreadable(self) -> dict[str, str]:
        """Path -> sentence of each image that could not be read since the last call."""
        found, self.bad_images = self.bad_images, {}
        return {path: f"{unreadable(path, reason)}: it is replaced by another image in training and counts "
                "as incorrect in evaluation." for index, reason in found.items()
                for path in [self.images.path(index)]}


def make_loader(dataset: ImageDataset, options: Options, batches: Iterable, *,
                refuse_bad: bool = False) -> ImageLoader:
    """The loader over `batches` of items: workers live as long as the loader, and end with their parent.

    Its own generator keeps the base seed that every iteration draws away from the default one.
    """
    extra, workers = {}, options.num_workers
    if workers:
        # Eight files per batch on its way and some per worker: one that runs out of them ends in tracebacks.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # -1 is no limit
        needed = len(os.listdir("/dev/fd")) + 20 * workers + 32
        if 0 <= hard < needed:
            raise UserError(f"--num_workers {workers} needs {needed} open files of at most {hard}: raise the "
                            "limit (ulimit -n 4096), or use --num_workers 0.", code="open_files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed) if soft >= 0 else soft, hard))
        # A forked worker is there in 0.05 s (spawned: 3 s), shares the index and touches no accelerator.
        extra = {"persistent_workers": True, "timeout": _PATIENCE,
                 "multiprocessing_context": "fork" if sys.platform == "linux" else "spawn",
                 "worker_init_fn": partial(_start_worker, os.getpid())}
    return ImageLoader(dataset, refuse_bad=refuse_bad, batch_sampler=batches, num_workers=workers,
                       collate_fn=_whole, pin_memory=options.pin_mem and torch.cuda.is_available(),
                       generator=torch.Generator(), **extra)


def _whole(batch: Batch) -> Batch:
    """What the data set gives is a batch already."""
    return batch


def _start_worker(parent: int, worker: int) -> None:
    """One thread, no part in the run's signals, and an end with the parent.

    Launchers and Slurm signal whole groups when a run shall stop; the run finishes its update first and needs
    its workers for that.
    """
    torch.set_num_threads(1)
    gc.freeze()  # What the parent had stays out of collections: 5 % of the time, and its pages stay shared.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent != os.getppid():  # it ended while this process was being forked
            os._exit(1)
