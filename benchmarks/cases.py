"""What is measured of the network: evaluation, training, the optimizer's update."""
import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import timm
import torch
from torch import Tensor, nn

import models  # noqa: F401  registers the models
import native
from benchmarks.reference import PlainHorNet, plain_update
from benchmarks.timing import Row, interleave, peak_bandwidth, peak_flops, rows
from config.options import Options
from models.inspect import flops
from models.zoo import VARIANTS
from native.runner import product_dtype
from optim.ema import Ema
from optim.update import Update

CASES = ("reference bf16", "plain", "plain bf16", "fast", "fast bf16")


@dataclass
class Setting:
    """How to measure; `clock` "cpu" counts only this process' time, for a machine shared with others.

    `only` names those of CASES to run beside the reference, all if empty.
    """

    batch: int = 8
    repeats: int = 9
    clock: str = "wall"
    size: int | None = None
    only: tuple[str, ...] = ()

    def images(self, name: str) -> Tensor:
        """A batch for the model `name`."""
        size = self.size or VARIANTS[name].input_size
        return torch.randn(self.batch, 3, size, size)


def step_of(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32, fused: bool = True,
            draws: Tensor | None = None) -> Callable[[], Tensor]:
    """Forward, backward and AdamW of a model in training, giving the loss; else a forward pass."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, fused=fused, foreach=False)

    def call() -> Tensor:
        half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(not model.training), half:
            out = model(x, draws).float()
        if model.training:
            out = nn.functional.cross_entropy(out, torch.arange(len(x)))
            out.backward()
            adamw.step()
            adamw.zero_grad()
        return out.detach()
    return call


def network(name: str, setting: Setting, train: bool) -> list[Row]:
    """Evaluation or training steps (drop path 0.2) of the reference, and of the product with equal weights.

    Plain: as on a device without fast paths; fast: on this machine's, in evaluation with weights packed
    before. Differences are of logits, or of the first loss, from the float32 reference.
    """
    torch.manual_seed(0)
    plain = timm.create_model(name, drop_path_rate=0.2 if train else 0.0).train(train)
    with torch.no_grad():
        for label, parameter in plain.named_parameters():
            if "gamma" in label:
                parameter.fill_(0.1)
    networks = {"reference": PlainHorNet(copy.deepcopy(plain)), "plain": plain, "fast": copy.deepcopy(plain)}
    native.attach(networks["fast"])  # freed memory is kept from here on, for the reference too
    x, cases = setting.images(name), {}
    draws = torch.rand(setting.batch, plain.num_drop_draws) if train else None
    with contextlib.ExitStack() as packed:
        for case in ("reference", *(setting.only or CASES)):
            dtype = torch.bfloat16 if "bf16" in case else torch.float32
            model = copy.deepcopy(networks[case.split()[0]]).train(train)
            if not train:
                packed.enter_context(native.packed(model, dtype=dtype))
            cases[case] = step_of(model, x, dtype, not case.startswith("reference"), draws)
        first = {case: call() for case, call in cases.items()}
        times = interleave(cases, setting.repeats, setting.clock)
    found = rows(f"{'train' if train else 'evaluate'} {name}", times, setting.batch, "img")
    work = (6 if train else 2) * setting.batch * flops(plain, x.shape[-1])
    for row in found:
        limit = product_dtype(torch.bfloat16 if "bf16" in row["case"] else torch.float32)
        row["share"] = work / (row["median"] / 1e3) / peak_flops(limit, setting.clock)
        row["limit"] = str(limit).removeprefix("torch.")
        row["difference"] = (first[row["case"]] - first["reference"]).abs().max().item()
    return found


def optimizer(name: str, setting: Setting) -> list[Row]:
    """Clipping, AdamW and EMA on every tensor of a model.

    The share is of a pass over memory that reads gradient, weight, two moments and average and writes the
    last four.
    """
    one, other = timm.create_model(name), timm.create_model(name)
    native.attach(other)  # freed memory is kept, for the reference too
    gradients = [torch.randn_like(p) * 1e-3 for p in one.parameters()]
    adamw = torch.optim.AdamW(other.parameters(), lr=4e-3, weight_decay=0.05, fused=True)
    constant = SimpleNamespace(apply=lambda optimizer, update: None)
    update = Update(other, adamw, constant, Options(clip_grad=1.0), ema=Ema(other, 0.9999))

    def case(model: nn.Module, step: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter.grad = gradient
            step()
        return call

    cases = {"reference": case(one, plain_update(one)), "product": case(other, lambda: update.step(0))}
    found = rows(f"update {name}", interleave(cases, 2 * setting.repeats, setting.clock), 1, "update")
    floor = 9 * 4 * sum(p.numel() for p in one.parameters()) / peak_bandwidth(setting.clock)
    for row in found:
        row |= {"share": floor / (row["median"] / 1e3), "limit": "bandwidth"}
    return found
