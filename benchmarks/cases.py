"""What is measured: evaluation, training steps, the optimizer's update, and the family of ten."""
import contextlib
import copy
import resource
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn

import models  # noqa: F401  registers the architectures with timm
import native
from benchmarks.reference import PlainUpdate, plain_model
from benchmarks.timing import Row, interleave, peak_bandwidth, peak_flops, rows
from models.inspect import complexity
from models.zoo import VARIANTS
from native.paths import runner_of
from native.runner import product_dtype
from optim.ema import Ema
from optim.update import Update, UpdateConfig

F32, BF16 = torch.float32, torch.bfloat16
CASES = ("reference bf16", "plain", "plain bf16", "fast", "fast bf16")


@dataclass
class Setting:
    """How to measure; `clock` "cpu" counts only this process' time, for a machine shared with others. `only`
    names those of CASES to run beside the reference, all if empty."""

    batch: int = 8
    repeats: int = 9
    clock: str = "wall"
    size: int | None = None
    only: tuple[str, ...] = ()

    def time(self, cases: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        """Seconds of each call of the chosen cases, in turns."""
        chosen = {name: call for name, call in cases.items() if not self.only or name in ("reference", *self.only)}
        return interleave(chosen, self.repeats, self.clock)


def autocast(dtype: torch.dtype):
    """Autocast on the CPU for bfloat16, nothing for float32."""
    return torch.autocast("cpu", dtype, enabled=dtype != F32)


def _trio(name: str, drop_path: float = 0.0) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The reference, the product in plain PyTorch and the product on this machine's paths, with equal
    weights."""
    torch.manual_seed(0)
    plain, reference = timm.create_model(name, drop_path_rate=drop_path), plain_model(name, 1000, drop_path)
    with torch.no_grad():
        for label, parameter in plain.named_parameters():
            if "gamma" in label:
                parameter.fill_(0.1)
    reference.load_state_dict(plain.state_dict())
    fast = copy.deepcopy(plain)
    native.attach(fast)  # freed memory is kept from here on, for the reference too
    return reference, plain, fast


def _finish(found: list[Row], flops: float, clock: str, differences: dict[str, float]) -> list[Row]:
    limits = {dtype: product_dtype(dtype) for dtype in (F32, BF16)}
    peaks = {dtype: peak_flops(dtype, clock) for dtype in set(limits.values())}
    for row in found:
        limit = limits[BF16 if "bf16" in row.case else F32]
        row.limit, row.share = str(limit).removeprefix("torch."), flops / (row.median / 1e3) / peaks[limit]
        row.difference = differences.get(row.case)
    return found


def evaluation(name: str, setting: Setting) -> list[Row]:
    """Forward passes in evaluation; differences are of logits, from the float32 reference."""
    size = setting.size or VARIANTS[name].input_size
    reference, plain, fast = (model.eval() for model in _trio(name))
    x = torch.randn(setting.batch, 3, size, size)
    logits: dict[str, torch.Tensor] = {}

    def case(label: str, model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), autocast(dtype):
                logits[label] = model(x).float()
        return call

    runner = runner_of(fast)
    with native.packed(fast):
        packed32 = dict(getattr(runner, "packed", {}))
    with native.packed(fast, dtype=BF16):
        packed16 = dict(getattr(runner, "packed", {}))

    def with_packed(weights: dict, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:  # packing itself is done once per evaluation and left out
            if runner is not None:
                runner.packed = weights
            call()
        return run

    cases = {"reference": case("reference", reference, F32), "reference bf16": case("reference bf16", reference, BF16),
             "plain": case("plain", plain, F32), "plain bf16": case("plain bf16", plain, BF16),
             "fast": with_packed(packed32, case("fast", fast, F32)),
             "fast bf16": with_packed(packed16, case("fast bf16", fast, BF16))}
    times = setting.time(cases)
    differences = {label: float((each - logits["reference"]).abs().max()) for label, each in logits.items()}
    found = rows(f"evaluate {name}", times, setting.batch, "img", "reference")
    return _finish(found, 2 * setting.batch * complexity(plain, size).flops, setting.clock, differences)


def training(name: str, setting: Setting) -> list[Row]:
    """Forward, backward, AdamW, with drop path 0.2; differences are of the first loss."""
    size = setting.size or VARIANTS[name].input_size
    reference, plain, fast = (model.train() for model in _trio(name, 0.2))
    x, labels = torch.randn(setting.batch, 3, size, size), torch.arange(setting.batch)
    draws = torch.rand(setting.batch, plain.num_drop_draws)
    losses: dict[str, float] = {}

    def case(label: str, model: nn.Module, dtype: torch.dtype, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def call() -> None:
            with autocast(dtype):
                loss = nn.functional.cross_entropy(model(x, draws), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(label, float(loss.detach()))
        return call

    slow = dict(lr=1e-6, foreach=False, fused=False)
    cases = {}
    for label, model, settings in (("reference", reference, slow), ("plain", plain, dict(lr=1e-6, fused=True)),
                                   ("fast", fast, dict(lr=1e-6, fused=True))):
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, **settings)
        cases[label] = case(label, model, F32, optimizer)
        cases[f"{label} bf16"] = case(f"{label} bf16", model, BF16, optimizer)
    times = setting.time(cases)
    differences = {label: abs(value - losses["reference"]) for label, value in losses.items()}
    found = rows(f"train {name}", times, setting.batch, "img", "reference")
    return _finish(found, 6 * setting.batch * complexity(plain, size).flops, setting.clock, differences)


class _Constant:
    """A schedule that changes nothing."""

    def apply(self, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Leave learning rate and weight decay."""


def optimizer(name: str, setting: Setting) -> list[Row]:
    """Clipping, AdamW and EMA on every tensor of a model; the share is of a pass over memory that reads
    gradient, weight, two moments and average and writes the last four."""
    one, other = timm.create_model(name), timm.create_model(name)
    native.attach(other)  # freed memory is kept, for the reference too
    gradients = [torch.randn_like(p) * 1e-3 for p in one.parameters()]
    plain = PlainUpdate(one, copy.deepcopy(one))
    adamw = torch.optim.AdamW(other.parameters(), lr=4e-3, weight_decay=0.05, fused=True)
    update = Update(other, adamw, _Constant(), UpdateConfig(clip_grad=1.0), ema=Ema(other, 0.9999))

    def give(model: nn.Module) -> None:
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient

    def product() -> None:
        give(other)
        update.step(0)

    def reference() -> None:
        give(one)
        plain.step()

    found = rows(f"update {name}", interleave({"reference": reference, "product": product}, 2 * setting.repeats,
                                              setting.clock), 1, "update", "reference")
    floor = 9 * 4 * sum(p.numel() for p in one.parameters()) / peak_bandwidth(setting.clock)
    for row in found:
        row.share, row.limit = floor / (row.median / 1e3), "bandwidth"
    return found


def family_member(name: str, setting: Setting, train: bool) -> float:
    """Pictures per second of one model on this machine's paths, evaluating or training, in float32."""
    model = timm.create_model(name, drop_path_rate=0.0)
    native.attach(model)
    size = setting.size or VARIANTS[name].input_size
    x = torch.randn(setting.batch, 3, size, size)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        model.train()(x).square().mean().backward()
        adamw.step()
        adamw.zero_grad()

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(x)

    with contextlib.nullcontext() if train else native.packed(model):
        times = interleave({"": step if train else forward}, setting.repeats, setting.clock)[""]
    return setting.batch / sorted(times)[len(times) // 2]


def report_member(name: str, setting: Setting, train: bool, threads: int, answers) -> None:
    """`family_member` in a process of its own: puts (pictures per second, GiB above an idle start) into
    `answers`."""
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    speed = family_member(name, setting, train)
    answers.put((speed, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20))
