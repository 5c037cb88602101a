"""The data set that workers run, and the loader around it: uint8 batches in one shared buffer, keyed draws."""
import atexit
import ctypes
import gc
import os
import signal
import sys
import time
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Callable, Iterator, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.errors import UserError
from common.random import key, reseed, seeded
from common.log import logger
from native.jpeg import NeedsPillow, available, picture_of
from datasets.images import BadImage, show
from datasets.transforms import Erasing

UNREADABLE_TARGET = -100
_ATTEMPTS = 20


class Batch(NamedTuple):
    """images uint8 (B, H, W, 3); targets, indices (in the data set) and positions (global, within the epoch; -1 in
    evaluation) int64 (B,); boxes to erase int32 (B, recount, 4) as top, left, height, width (0 = none); bad bool (B,):
    in training the image was replaced, in evaluation it is black and its target -100; epoch (-1 in evaluation)."""

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor
    boxes: torch.Tensor
    bad: torch.Tensor
    epoch: int


class Reader(Protocol):
    """A source of images: `image(i)` gives RGB or raises BadImage; `labels` are positions in `classes`."""

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...
    def path(self, index: int) -> str: ...
    def image(self, index: int) -> Image.Image: ...


@runtime_checkable
class EncodedReader(Protocol):
    """A reader that can also give an image's bytes undecoded; raises BadImage."""

    def encoded(self, index: int) -> bytes: ...


class ImageDataset(Dataset):
    """Images of a reader with their logit positions, transformed; takes a micro-batch's items, gives a Batch.

    targets: int64 (N,), -1 for images of no class, which are left out; indices count what is left.
    `compiled` False keeps JPEGs out of the compiled helper (datasets/fast.py); the pixels are the same.
    """

    def __init__(self, reader: Reader, targets: np.ndarray, transform: Callable[[Image.Image], np.ndarray], size: int,
                 *, seed: int = 0, erasing: Erasing | None = None):
        self.compiled = isinstance(reader, EncodedReader)
        if self.compiled:
            available()  # Built and tested here, once, so that forked workers inherit it.
        kept = targets >= 0
        self._kept = None if kept.all() else np.flatnonzero(kept)
        self.targets = targets if self._kept is None else targets[self._kept]
        self.reader, self.transform, self.size, self.seed, self.erasing = reader, transform, size, seed, erasing

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        """Where image `index` comes from, for reports."""
        return self.reader.path(self._place(index))

    def image(self, index: int) -> Image.Image:
        """Image `index` as RGB; raises BadImage."""
        return self.reader.image(self._place(index))

    def _place(self, index: int) -> int:
        return index if self._kept is None else int(self._kept[index])

    def __getitem__(self, item) -> Batch:
        return self.__getitems__([item])

    def __getitems__(self, items: list) -> Batch:
        """A Batch from (epoch, index, position) tuples in training or plain indices in evaluation."""
        count, size = len(items), self.size
        images = torch.empty(count, size, size, 3, dtype=torch.uint8)
        if get_worker_info() is not None:
            images.share_memory_()  # While still empty: filled in place, it need not be copied on its way out.
        boxes = np.zeros((count, self.erasing.count if self.erasing else 1, 4), dtype=np.int32)
        targets, bad, pixels = np.empty(count, dtype=np.int64), np.zeros(count, dtype=bool), images.numpy()
        items = [item if isinstance(item, tuple) else (-1, item, -1) for item in items]
        indices, positions = torch.tensor([item[1:] for item in items], dtype=torch.int64).T.contiguous()
        with seeded(0) if items[0][0] >= 0 else nullcontext():
            for row, (epoch, index, _) in enumerate(items):
                if epoch >= 0:
                    targets[row], bad[row] = self._train(epoch, index, pixels[row], boxes[row])
                else:
                    targets[row], bad[row] = self._evaluate(index, pixels[row])
        return Batch(images, torch.from_numpy(targets), indices, positions, torch.from_numpy(boxes),
                     torch.from_numpy(bad), items[0][0])

    def _train(self, epoch: int, index: int, pixels: np.ndarray, boxes: np.ndarray) -> tuple[int, bool]:
        chosen = index
        for attempt in range(_ATTEMPTS):
            try:
                self._fill(chosen, key(self.seed, "augment", epoch, index), pixels, boxes)
                return self.targets[chosen], chosen != index
            except BadImage as error:
                logger.warning("unreadable image %s (%s), replaced by another", show(self.path(chosen)), error)
                chosen = key(self.seed, "replace", epoch, index, attempt) % len(self)
        raise UserError(f"{_ATTEMPTS} images in a row are unreadable, the last is {show(self.path(chosen))}; check "
                        "the disk and the data path.")

    def _evaluate(self, index: int, pixels: np.ndarray) -> tuple[int, bool]:
        try:
            self._fill(index, None, pixels)
        except BadImage:
            pixels[:] = 0
            return UNREADABLE_TARGET, True
        return self.targets[index], False

    def _fill(self, index: int, draws: int | None, pixels: np.ndarray, boxes: np.ndarray | None = None) -> None:
        """Image `index` to `pixels`, with draws seeded by `draws`; raises BadImage."""
        for image in self._images(index):
            try:
                if draws is not None:
                    reseed(draws)
                pixels[:] = self.transformed(image, index)
                if boxes is not None and self.erasing is not None:
                    boxes[:] = self.erasing.boxes(self.size, self.size)
                return
            except NeedsPillow:
                continue

    def _images(self, index: int) -> Iterator[Image.Image]:
        """The image to be decoded by the compiled helper, if that can be; then, asked for again, Pillow's."""
        if self.compiled and available():
            image = picture_of(self.reader.encoded(self._place(index)))
            if image is not None:
                yield image
        yield self.image(index)

    def transformed(self, image: Image.Image, index: int) -> np.ndarray:
        """The transform's pixels; an error in it names the image."""
        try:
            return self.transform(image)
        except NeedsPillow:
            raise
        except Exception as error:
            raise RuntimeError(f"transforming {show(self.path(index))} failed: {error}") from error


class ImageLoader(DataLoader):
    """A DataLoader that names unreadable images: `bad_images` maps the dataset index to the times it was met; with
    `refuse_bad` (evaluation) the first one is a UserError, raised in the main process so that it is one sentence."""

    def __init__(self, dataset: ImageDataset, *, refuse_bad: bool, **arguments):
        super().__init__(dataset, **arguments)
        self.refuse_bad = refuse_bad
        self.bad_images: dict[int, int] = {}
        if self.num_workers:
            # multiprocessing ends what is left at exit by one SIGTERM, which workers let pass: end them before.
            atexit.register(_close, weakref.ref(self))

    def close(self) -> None:
        """End the workers; a later iteration starts new ones."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            # Not left to __del__: after an exception a traceback may still hold the iterator.
            iterator._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        try:
            if self.num_workers and self._iterator is None and dist.is_available() and dist.is_initialized():
                # A thread of the process group that is just letting go of a tensor holds a lock of the interpreter, and
                # a worker forked meanwhile waits for it for ever (CPython 3.11): let those threads come to rest.
                time.sleep(0.2)
            for batch in super().__iter__():
                if batch.bad.any():
                    self._note(batch.indices[batch.bad].tolist())
                yield batch
        except UserError as error:
            # From a worker it arrives wrapped in a traceback; its last line is the sentence.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.errors.UserError: ")) from None

    def _note(self, indices: list[int]) -> None:
        for index in indices:
            self.bad_images[index] = self.bad_images.get(index, 0) + 1
        if self.refuse_bad:
            try:
                self.dataset.image(indices[0])
                reason = "readable at a second try"
            except BadImage as error:
                reason = str(error)
            raise UserError(f"Image {show(self.dataset.path(indices[0]))} cannot be read ({reason}); mend it, or "
                            "count unreadable images as wrong with --allow_bad_images true.")


def make_loader(dataset: ImageDataset, options, batch_sampler, *, refuse_bad: bool = False) -> ImageLoader:
    """The loader over `batch_sampler`: workers live as long as the loader, and end with their parent.

    Its own generator keeps the base seed that every iteration draws away from the default one.
    """
    workers, method = options.num_workers, getattr(options, "worker_start", None) or _start_method()
    extra = dict(persistent_workers=True, timeout=getattr(options, "loader_timeout", None) or 300,
                 worker_init_fn=partial(_start_worker, os.getpid() if method == "fork" else None),
                 multiprocessing_context=method) if workers else {}
    return ImageLoader(dataset, refuse_bad=refuse_bad, batch_sampler=batch_sampler, collate_fn=_as_is,
                         num_workers=workers, pin_memory=options.pin_mem and torch.cuda.is_available(),
                         generator=torch.Generator(), **extra)


def _close(reference: weakref.ref) -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def _as_is(batch: Batch) -> Batch:
    return batch


def _start_method() -> str:
    # A forked worker is there in 0.05 s (spawned: 3 s) and shares the index; it never touches an accelerator.
    return "fork" if sys.platform == "linux" else "spawn"


def _start_worker(parent: int | None, worker: int) -> None:
    """One thread, no part in the run's signals, and an end with the parent.

    Launchers and Slurm signal whole groups when a run shall stop; the run finishes its update first and needs its
    workers for that, so they let SIGTERMs pass for ten seconds from the first on (a group's and its launcher's come
    together) and end at a later one, or when the parent is gone.
    """
    torch.set_num_threads(1)
    gc.freeze()  # What the parent had stays out of collections: 5 % of the time, and its pages stay shared.
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    seen = []

    def terminate(number, frame):
        seen.append(time.monotonic())
        if seen[-1] - seen[0] > 10:
            os._exit(143)

    signal.signal(signal.SIGTERM, terminate)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent not in (None, os.getppid()):  # it ended while this process was being forked
            os._exit(1)
