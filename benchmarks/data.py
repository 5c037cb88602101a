"""Loading images against the usual chain, and the start on a data set of ImageNet's size."""
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import ImageFolder

from benchmarks.timing import Row, interleave, rows
from config.options import Options
from datasets.dataset import ImageDataset
from datasets.device import EvalPrepare, TrainPrepare
from datasets.index import IndexCache, Rows, Source
from datasets.readers import open_reader
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import Erasing, eval_transform, train_transform

IMAGENET = 1_281_167


def loading(repeats: int, clock: str, images: int = 24) -> list[Row]:
    """From JPEG files of 500x375 to normalised batches on the CPU, one process.

    Against torchvision's and timm's usual chain (float32 ToTensor, Normalize and collate). Mixing is left out
    on both sides. `pillow` is the product without its compiled decoder; `pixels` in a row's name stops at the
    uint8 batch that workers hand over.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images" / "class"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int64)
            pixels = np.clip(smooth + rng.integers(-12, 13, (375, 500, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.JPEG", quality=92)
        found = []
        for work, training in (("load for training", True), ("load for evaluation", False)):
            cases = _cases(str(folder.parent), training)
            found += rows(work, interleave(cases, repeats, clock), images, "img")
    return found


def _cases(root: str, training: bool) -> dict[str, Callable[[], object]]:
    options = Options(mixup=0.0, cutmix=0.0)
    usual = ImageFolder(root, create_transform(
        224, is_training=training, color_jitter=0.4, auto_augment=options.aa, interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", crop_pct=0.875))
    reader = open_reader(Source.of(root), IndexCache(write=False))
    transform = train_transform(options) if training else eval_transform(224)
    prepare: Callable = TrainPrepare(options, 1, "cpu") if training else EvalPrepare(options, "cpu")

    def ours(compiled: bool, prepared: bool) -> Callable[[], object]:
        part = ImageDataset(reader, reader.labels, transform, 224, erasing=Erasing() if training else None)
        epochs = count()

        def call() -> object:
            epoch = next(epochs)
            with nullcontext() if compiled else mock.patch("native.jpeg", return_value=None):
                batch = part.__getitems__([(epoch, i, i) if training else i for i in range(len(part))])
            return prepare(batch) if prepared else batch
        return call

    return {"reference": lambda: torch.utils.data.default_collate([usual[i] for i in range(len(usual))]),
            "pillow": ours(False, True), "product": ours(True, True), "product, pixels": ours(True, False)}


def start_up(repeats: int, clock: str, images: int = IMAGENET) -> list[Row]:
    """The second start on `images` in 1000 class folders up to the first batch's paths.

    The class folders are real, the files are only in the index: a second start looks at folders alone.
    """
    with tempfile.TemporaryDirectory() as root:
        data, cache = os.path.join(root, "train"), os.path.join(root, "cache")
        classes = [f"n{number:08d}" for number in range(1000)]
        for name in classes:
            os.makedirs(os.path.join(data, name))
        rows_found = Rows()
        for number in range(images):
            rows_found.add(classes[number % 1000], f"{classes[number % 1000]}_{number}.JPEG")
        source = Source.of(data)
        os.makedirs(cache)
        index = rows_found.index(source, "class folders", ["", *classes])
        index.write(IndexCache(cache).path("folders", source))

        def start() -> None:
            reader = open_reader(Source.of(data), IndexCache(cache, write=False))
            for _, index, _ in next(iter(GlobalBatchSampler(len(reader), 4096, 128, 4, 0, 8))):
                reader.name(index)

        times = interleave({"second start": start}, repeats, clock)
    return rows(f"start on {images:,} images", times, images, "images")
