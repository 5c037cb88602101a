"""The training loop: the same numbers however an update is split, what observers hear, non-finite updates."""
import copy
import math

import pytest
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

import models  # noqa: F401  (registers the networks)
from common.outcome import Outcome
from engine import Observer
from tests.kits.processes import in_processes
from tests.kits.toy import CLASSES, Alone, train, training

CONFIGS = {"norm": dict(clip_grad=0.4), "agc": dict(clip_grad=0.05, clip_by="agc"),
           "value": dict(clip_grad=0.02, clip_by="value"), "none": {}}
FP16 = dict(use_amp=True, amp_dtype="fp16")


def run(update_freq, config):
    """Weights, average and figures after two epochs, with drop path, in float64."""
    state = training(update_freq=update_freq, **CONFIGS[config])
    summaries = [train(state, epoch).figures for epoch in range(2)]
    return state.task.model.state_dict(), state.update.ema.module.state_dict(), summaries[-1]


@pytest.mark.parametrize("config", CONFIGS)
def test_accumulation_changes_nothing(config):
    *whole, summary = run(1, config)
    for update_freq in (2, 4):
        *split, figures = run(update_freq, config)
        torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-10)
        # The engine's own sums are of float32 values.
        for name in ("loss", "grad_norm", "class_acc"):
            assert figures[name] == pytest.approx(summary[name], rel=1e-5)


class Wrapped(DistributedDataParallel):
    """Knows when gradients would be reduced, and has no peers."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("mode, reduced", [("step", [False, False, True]), ("official", [True, True, True])])
def test_gradients_are_reduced_only_at_the_last_micro_batch(mode, reduced):
    state, seen = training(clip_grad=1.0, clip_mode=mode, wrap=Wrapped), []
    for last in (False, False, True):
        with state.update.micro_batch(last):
            seen.append(state.model.require_backward_grad_sync)
    assert seen == reduced


class Recorder(Observer):
    """Keeps what the engine tells and, where `loop` is given, a copy of all that training changes after each
    update."""

    def __init__(self, loop=None):
        self.loop, self.update = loop, -1
        self.phases, self.progress, self.records, self.states, self.finite = [], [], [], [], []

    def on_phase(self, phase, update):
        self.update = update
        self.phases.append((phase, update))

    def after_update(self, update, stats, sums):
        self.finite.append(bool(stats.finite))
        if self.loop is not None:
            parts = self.loop.task.model, self.loop.update.ema.module, self.loop.update.optimizer
            *weights, optimizer = (part.state_dict() for part in parts)
            self.states.append(copy.deepcopy([*weights, optimizer["state"]]))

    def on_progress(self, progress):
        self.progress.append(progress)

    def on_nonfinite(self, record):
        self.records.append(record)


def test_what_an_observer_hears():
    state, recorder = training(update_freq=2), Recorder()
    progress = train(state, observer=recorder)
    micro, figures = ["data", "forward", "backward"], progress.figures
    assert recorder.phases == [(phase, update) for update in range(4) for phase in micro + micro + ["step"]]
    assert [p.next_update for p in recorder.progress] == [2, 4] and recorder.progress[-1] == progress
    recent = [p.recent_loss for p in recorder.progress]
    assert figures["loss"] == pytest.approx(sum(recent) / 2)
    assert recent[0] == pytest.approx(recorder.progress[0].figures["loss"])
    assert figures["lr"] == pytest.approx(state.update.schedule.lr(3)) and 0 <= figures["class_acc"] <= 100
    assert 0 <= figures["data_wait"] <= 1 and figures["images_per_second"] > 0


def test_fp16_trains_like_full_precision():
    losses = []
    for autocast in (None, torch.float16):
        torch.manual_seed(0)
        model = timm.create_model("hornet_pico_7x7", num_classes=CLASSES, drop_path_rate=0.2)
        state = training(model=model, dtype=torch.float32, clip_grad=1.0, **(FP16 if autocast else {}))
        state.task.prepare = lambda b: (torch.nn.functional.interpolate(b.images, (32, 32)), b.targets)
        state.task.autocast_dtype = autocast
        losses.append([train(state, epoch).figures["loss"] for epoch in range(2)])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def assert_equal_states(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def poisoned(updates, rank=0, process=None, policy="skip", kind="loss", on_device=False, **changes):
    """Train with a bad image in the last micro-batch of some updates, on one rank only: the progress, the
    recorder and the loss scale. Bad is an infinite image, an infinite loss with a finite gradient ("value"),
    which gradients do not carry over, or a finite loss whose "gradient" is not."""
    process = process or Alone()
    wrap = None if process.world_size == 1 else DistributedDataParallel
    loop = training(process, wrap=wrap, mode=policy, **{"dtype": torch.float32, "warmup_steps": -1, **changes})
    if on_device:  # obey the flag as on an accelerator, where nobody reads it first
        loop.update.host_reads = False
    recorder, task = Recorder(loop), loop.task
    prepare, criterion = task.prepare, task.criterion

    def bad():
        return recorder.update in updates and process.rank == rank

    def spoiled(b):
        images, targets = prepare(b)
        if kind == "loss" and bad():
            images[0] = float("inf")
        return images, targets

    def worse(logits, targets):
        more = {"loss": 0, "value": float("inf"), "gradient": (logits - logits).abs().sum().sqrt()}[kind]
        return criterion(logits, targets) + (more if bad() else 0)
    task.prepare, task.criterion = spoiled, worse
    return train(loop, observer=recorder), recorder, loop.update.scaler.scale.item()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("changes", [
    {}, dict(on_device=True), dict(opt="adam", on_device=True), dict(clip_grad=0.1, on_device=True),
    dict(dtype=torch.float64), dict(opt="sgd"), dict(opt="lamb"), dict(clip_grad=0.1), dict(update_freq=2),
    dict(clip_grad=0.1, clip_by="agc"), dict(clip_grad=1.0, clip_mode="official", update_freq=2)], ids=str)
def test_nothing_changes(changes, kind):
    progress, seen, _ = poisoned({0, 2}, kind=kind, **changes)
    assert seen.finite == [False, True, False, True]
    assert_equal_states(seen.states[1], seen.states[2])
    start = training(dtype=changes.get("dtype", torch.float32)).task.model.state_dict()
    assert_equal_states(seen.states[0][:2], [start, start])
    assert progress.nonfinite == 2 and progress.outcome is Outcome.DONE
    assert math.isfinite(progress.figures["loss"])  # the mean is over the applied updates
    assert all(torch.isfinite(value).all() for value in seen.states[-1][0].values())


def test_one_rank_of_two(tmp_path):
    for kind, *results in zip(("loss", "gradient", "value"), *in_processes(_poisoned_second_rank, 2, tmp_path)):
        for finite, states, _ in results:
            assert finite == [True, False, True, True], kind
            assert_equal_states(states[0], states[1])
            assert_equal_states(states[-1], results[0][1][-1])
        assert [records[0]["reproduced"] for _, _, records in results] == [False, True]


def _poisoned_second_rank(process):
    seen = [poisoned({1}, 1, process, kind=kind, clip_grad=1.0)[1] for kind in ("loss", "gradient", "value")]
    return [(each.finite, each.states, each.records) for each in seen]


@pytest.mark.parametrize("policy,updates,outcome,last", [
    ("stop", {2}, Outcome.FAILED, 3), ("skip", {2}, Outcome.DONE, 4), ("rollback", {2}, Outcome.ROLLED_BACK, 3),
    ("skip", {1, 2, 3}, Outcome.ROLLED_BACK, 4), ("skip", {0, 1, 3}, Outcome.DONE, 4)])
def test_how_the_epoch_ends(policy, updates, outcome, last):
    progress = poisoned(updates, policy=policy)[0]
    assert (progress.outcome, progress.next_update) == (outcome, last)


@pytest.mark.parametrize("changes", [{}, dict(on_device=True), dict(opt="lamb"), dict(dtype=torch.float64),
                                     dict(clip_grad=0.3, clip_by="value")], ids=str)
def test_loss_scaling_changes_only_the_range(changes):
    changes = {"clip_grad": 0.3, **changes}
    (_, plain, _), (_, scaled, scale) = (poisoned((), **changes, **more) for more in ({}, FP16))
    assert scale == 65536
    torch.testing.assert_close(plain.states[-1][0], scaled.states[-1][0], rtol=2e-4, atol=2e-5)


def test_overflow_halves_the_scale_and_skips():
    _, seen, scale = poisoned({1}, kind="gradient", **FP16)
    assert seen.finite == [True, False, True, True] and not seen.records and scale == 32768
