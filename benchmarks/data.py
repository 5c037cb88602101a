"""Loading pictures against the usual chain, and the start on a data set of ImageNet's size."""
import gc
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import ImageFolder

from benchmarks.timing import CLOCKS, Row, interleave, rows
from config.parse import Options
from datasets.dataset import ImageDataset
from datasets.device import EvalPrepare, TrainPrepare
from datasets.folders import Folders, read
from datasets.readers import Index, IndexCache, Strings, save_index
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import Erasing, eval_transform, train_transform

IMAGENET = 1_281_167
PRIVATE = re.compile(r"Private_Dirty:\s+(\d+) kB")


def loading(repeats: int, clock: str, pictures: int = 24) -> list[Row]:
    """From JPEG files of 500x375 to normalised batches on the CPU, one process, against torchvision's and
    timm's usual chain (float32 ToTensor, Normalize and collate). Mixing is left out on both sides. `pillow`
    is the product without its compiled helper; `pixels` in a row's name stops at the uint8 batch that workers
    hand over."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "pictures" / "class"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(pictures):
            coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            noise = rng.integers(-12, 13, (375, 500, 3))
            smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int64)
            pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.JPEG", quality=92)
        reader = read(str(folder.parent), IndexCache(str(Path(root) / "cache")))
        found = []
        gc.collect()
        gc.freeze()  # as in the loader's workers
        for work, training in (("load for training", True), ("load for evaluation", False)):
            cases = _cases(str(folder.parent), reader, training)
            found += rows(work, interleave(cases, repeats, clock), pictures, "img", "reference")
        gc.unfreeze()
    return found


def _cases(root: str, reader: Folders, training: bool) -> dict[str, Callable[[], object]]:
    options = Options(mixup=0.0, cutmix=0.0)
    usual = create_transform(224, is_training=True, color_jitter=0.4, auto_augment=options.aa, interpolation="bicubic",
                             re_prob=0.25, re_mode="pixel", re_count=1) if training else \
        create_transform(224, is_training=False, interpolation="bicubic", crop_pct=0.875)
    dataset = ImageFolder(root, usual)
    prepare: Callable = TrainPrepare(options, 1, "cpu") if training else EvalPrepare(options, "cpu")

    def ours(compiled: bool, prepared: bool) -> Callable[[], object]:
        part = ImageDataset(reader, reader.labels, train_transform(options) if training else eval_transform(224), 224,
                              erasing=Erasing(0.25, 1) if training else None)
        epochs = count()

        def call() -> object:
            epoch = next(epochs)
            with nullcontext() if compiled else mock.patch("native.jpeg", return_value=None):
                batch = part.__getitems__([(epoch, i, i) if training else i for i in range(len(part))])
            return prepare(batch) if prepared else batch

        return call

    return {"reference": lambda: torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))]),
            "pillow": ours(False, True), "product": ours(True, True), "product, pixels": ours(True, False)}


def start_up(repeats: int, clock: str, pictures: int = IMAGENET) -> list[Row]:
    """The second start on `pictures` in 1000 class folders up to the first batch's picture numbers and paths,
    and what 10,000 look-ups in a forked worker take and cost in private memory. The class folders are real,
    the files are only in the index: a second start looks at folders, not at files."""
    with tempfile.TemporaryDirectory() as root:
        data, cache = os.path.join(root, "train"), os.path.join(root, "cache")
        classes = [f"n{number:08d}" for number in range(1000)]
        for name in classes:
            os.makedirs(os.path.join(data, name))
        labels = np.sort(np.arange(pictures) % 1000).astype(np.int32)
        names = Strings.of([f"{classes[label]}_{number}.JPEG" for number, label in enumerate(labels.tolist())])
        empty = Index.of(data, classes, labels=[], names=[], seen=["", *classes], left_out={})
        save_index(IndexCache(cache).path("folders", data), replace(empty, labels=labels, names=names))

        def start() -> Folders:
            reader = read(data, IndexCache(cache, write=False))
            sampler = GlobalBatchSampler(len(reader), 4096, 128, 4, 0, 8)
            for _, index, _ in next(iter(sampler)):
                reader.name(index)
            return reader

        work = f"start on {pictures:,} pictures"
        found = rows(work, interleave({"second start": start}, repeats, clock), pictures, "pictures", "second start")
        answers = multiprocessing.get_context("fork").SimpleQueue()
        child = multiprocessing.get_context("fork").Process(target=_look_up, args=(start(), clock, answers))
        child.start()
        child.join()
        seconds, kilobytes = answers.get()
    return found + rows(work, {f"10,000 look-ups in a worker, +{kilobytes / 1000:.1f} MB private": [seconds]}, 10_000,
                        "look-ups", f"10,000 look-ups in a worker, +{kilobytes / 1000:.1f} MB private")


def _look_up(reader: Folders, clock: str, answers) -> None:
    status = Path("/proc/self/smaps_rollup")
    chosen, now = np.random.default_rng(0).permutation(len(reader))[:10_000].tolist(), CLOCKS[clock]
    before, start = int(PRIVATE.search(status.read_text())[1]), now()
    for index in chosen:
        reader.name(index), int(reader.labels[index])
    seconds = now() - start
    answers.put((seconds, int(PRIVATE.search(status.read_text())[1]) - before))

