"""What is measured: evaluation and whole updates of the network, loading images against the usual chain, the
start on a data set of ImageNet's size."""
import argparse
import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

import native
from benchmarks.reference import PlainHorNet, PlainUpdate
from benchmarks.timing import Row, interleave, rows
from common.devices import PhaseClock, autocast
from config.options import Options
from datasets.dataset import Batch, ImageDataset
from datasets.device import Prepare
from datasets.index import IndexCache, Rows, Source
from datasets.readers import open_reader
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import Erasing, eval_transform, train_transform
from engine import drop_draws
from models.zoo import VARIANTS
from optim.build import build_loss, build_optimizer
from optim.ema import Ema
from optim.schedule import Schedule
from optim.update import Update

CASES = ("reference bf16", "plain", "plain bf16", "fast", "fast bf16")
OPTIONS = Options(clip_grad=1.0, lr=1e-5, epochs=1, warmup_epochs=0)


def noise(images: int, side: int) -> Batch:
    """A batch of noise, with as many erased pixels as the published recipe has on average."""
    numbers, places = torch.arange(images), torch.arange(0, images * side ** 2, 24)
    return Batch(torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8), numbers, numbers, numbers,
                 torch.empty(0), 0, erased=(places, torch.randn(len(places), 3)))


def product_update(model: nn.Module, options: Options = OPTIONS) -> Update:
    """The product's own clipping, fused AdamW and EMA."""
    return Update(model, build_optimizer(model, options, lambda name: 1.0), Schedule(options, 100), options,
                  ema=Ema(model, 0.9999))


def steps(model: nn.Module, batch: Batch, device: torch.device,
          dtype: torch.dtype | None) -> dict[str, Callable[[PhaseClock], Tensor]]:
    """A whole update that marks its phases and gives the loss, and a forward pass that gives the logits.

    Preparation, forward, backward, clipping, AdamW and EMA; those of the reference in its own formulation. An
    odd batch, whose images make no pairs, is not mixed.
    """
    options = replace(OPTIONS, mixup=0.0, cutmix=0.0) if len(batch.images) % 2 else OPTIONS
    prepare, criterion = Prepare(options, device, 1000), build_loss(options)
    update = PlainUpdate(model) if isinstance(model, PlainHorNet) else product_update(model)
    draws = getattr(getattr(model, "model", model), "num_drop_draws", 0)
    pixels = prepare.normalise(batch.images).permute(0, 3, 1, 2)

    def train(clock: PhaseClock) -> Tensor:
        clock.begins("prepare")
        images, targets = prepare(batch)
        clock.begins("forward")
        with autocast(device, dtype):
            logits = model.train()(images, **drop_draws(draws, 0, 0, batch, device))
        loss = criterion(logits.float(), targets)
        clock.begins("backward")
        update.backward(loss)
        clock.begins("update")
        update.step(0)
        return loss.detach()

    def evaluate(clock: PhaseClock) -> Tensor:
        clock.begins("forward")
        with torch.no_grad(), autocast(device, dtype):
            return model.eval()(pixels).float()
    return {"train": train, "evaluate": evaluate}


def network(name: str, args: argparse.Namespace, work: str) -> list[Row]:
    """Evaluation or training (drop path 0.2) of the reference, and of the product with equal weights.

    Plain: as on a device without fast paths; fast: on this machine's, in evaluation with weights packed
    before. Differences are of logits, or of the first loss, from the float32 reference.
    """
    torch.manual_seed(0)
    plain = timm.create_model(name, drop_path_rate=0.2, layer_scale_init_value=0.1)
    networks = {"reference": PlainHorNet(plain), "plain": plain, "fast": copy.deepcopy(plain)}
    native.attach(networks["fast"])  # freed memory is kept from here on, for the reference too
    size, cases = args.size or VARIANTS[name].input_size, {}
    batch, cpu = noise(args.batch, size), torch.device("cpu")
    with contextlib.ExitStack() as packed:
        for case in ("reference", *args.only):
            model = copy.deepcopy(networks[case.split()[0]])
            dtype = torch.bfloat16 if "bf16" in case else None
            if work == "evaluate":
                packed.enter_context(native.packed(model.eval(), dtype=dtype or torch.float32))
            cases[case] = partial(steps(model, batch, cpu, dtype)[work], PhaseClock(cpu))
        first = {case: call() for case, call in cases.items()}
        times = interleave(cases, args.repeats, args.clock)
    found = rows(f"{work} {name}", times, args.batch, "img")
    for row in found:
        row["largest difference"] = (first[row["case"]] - first["reference"]).abs().max().item()
    return found


def loading(repeats: int, clock: str, images: int = 24) -> list[Row]:
    """From JPEG files of 500x375 to normalised batches on the CPU, one process.

    Against torchvision's and timm's usual chain (float32 ToTensor, Normalize and collate). Mixing is left out
    on both sides. `pillow` is the product without its compiled decoder; `pixels` in a row's name stops at the
    uint8 batch that workers hand over.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "images", "class")
        folder.mkdir(parents=True)
        for number in range(images):  # smooth, with noise
            smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 32), (375, 500), mode="bicubic")[0]
            noisy = smooth + torch.empty_like(smooth).uniform_(-0.05, 0.05)
            to_pil_image(noisy.clamp(0, 1)).save(folder / f"{number}.JPEG", quality=92)
        times = [interleave(_cases(f"{root}/images", training), repeats, clock) for training in (True, False)]
    return [row for work, each in zip(("load for training", "load for evaluation"), times)
            for row in rows(work, each, images, "img")]


def _cases(root: str, training: bool) -> dict[str, Callable[[], object]]:
    options = Options(mixup=0.0, cutmix=0.0)
    usual = ImageFolder(root, create_transform(
        224, is_training=training, color_jitter=0.4, auto_augment=options.aa, interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", crop_pct=0.875))
    reader = open_reader(Source.of(root), IndexCache(write=False))
    transform = train_transform(options) if training else eval_transform(224)
    part = ImageDataset(reader, reader.labels, transform, 224, erasing=Erasing() if training else None)
    prepare: Callable = Prepare(options, "cpu", 1) if training else Prepare(options, "cpu")

    def pixels(epochs: Iterator[int]) -> Batch:
        epoch = next(epochs)
        return part.__getitems__([(epoch, i, i) if training else i for i in range(len(part))])

    def product(epochs: Iterator[int]) -> object:
        return prepare(pixels(epochs))

    return {"reference": lambda: torch.utils.data.default_collate([usual[i] for i in range(len(usual))]),
            "pillow": partial(mock.patch("native.jpeg", lambda: None)(product), count()),
            "product": partial(product, count()), "product, pixels": partial(pixels, count())}


def start_up(repeats: int, clock: str, images: int = 1_281_167) -> list[Row]:
    """The second start on `images` in 1000 class folders up to the first batch's paths.

    The class folders are real, the files are only in the index: a second start looks at folders alone.
    """
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as cache:
        classes, listed = [f"n{number:08d}" for number in range(1000)], Rows()
        for name in classes:
            Path(data, name).mkdir()
        for number in range(images):
            listed.add(classes[number % 1000], f"{classes[number % 1000]}_{number}.JPEG")
        source = Source.of(data)
        listed.index(source, "class folders", ["", *classes]).write(IndexCache(cache).path("folders", source))

        def start() -> None:
            reader = open_reader(Source.of(data), IndexCache(cache, write=False))
            for _, index, _ in next(iter(GlobalBatchSampler(len(reader), 4096, 128, 4, 0, 8))):
                reader.name(index)

        times = interleave({"second start": start}, repeats, clock)
    return rows(f"start on {images:,} images", times, images, "images")
