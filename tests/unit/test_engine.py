"""The two loops: the same numbers however an update is split, non-finite updates; an evaluation counts each image once
on any number of ranks, as by hand."""
import copy
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from common.outcome import Outcome
from engine import Evaluation, Observer, evaluate
from tests.kits.processes import in_processes
from tests.kits.toy import Alone, Toy, batch, train, training

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
    """Keeps what the engine tells, and a copy of all that training changes after each update."""

    def __init__(self, loop):
        self.loop, self.update, self.records, self.states, self.finite = loop, -1, [], [], []

    def on_phase(self, phase, update):
        self.update = update

    def after_update(self, update, stats, sums):
        self.finite.append(bool(stats.finite))
        parts = self.loop.task.model, self.loop.update.ema.module, self.loop.update.optimizer
        *weights, optimizer = (part.state_dict() for part in parts)
        self.states.append(copy.deepcopy([*weights, optimizer["state"]]))

    def on_nonfinite(self, record):
        self.records.append(record)


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


# ------------------------------------------------------------------------------------------- the evaluation

COUNTS, BAD = (23, 2), (3, 11)  # images of an evaluation, and those that cannot be read


def prepare(b):
    return b.images, torch.where((b.indices == BAD[0]) | (b.indices == BAD[1]), -100, b.targets)


def score(process, counts=COUNTS, expected=0):
    """Of two networks, for each number of images; with 2 of them on three ranks one has none."""
    found = []
    for count in counts:
        own = range(process.rank, count, process.world_size)
        batches = [batch(own[i:i + 4], [-1] * len(own[i:i + 4])) for i in range(0, len(own), 4)]
        found.append(evaluate([("a", Toy(1)), ("b", Toy(2))], batches, Evaluation(
            prepare, torch.device("cpu"), outputs=True, process=process, expected=expected or count)))
    return found


@torch.no_grad()
def by_hand(seed, count):
    """(hits1, hits5, losses of the images that can be read)."""
    images, targets = prepare(batch(range(count), [-1] * count))
    logits = Toy(seed).eval()(images)
    best, readable = logits.argsort(1, descending=True), targets >= 0
    return ((best[:, 0] == targets).sum(), (best[:, :5] == targets[:, None]).sum(),
            torch.nn.functional.cross_entropy(logits[readable].double(), targets[readable], reduction="none"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_counts_are_those_by_hand_on_any_number_of_ranks_even_without_images(tmp_path, world_size):
    for found in [score(Alone())] if world_size == 1 else in_processes(score, world_size, tmp_path):
        for count, results in zip(COUNTS, found):
            for seed, result in enumerate(results, start=1):
                hits1, hits5, losses = by_hand(seed, count)
                assert (result.hits1, result.hits5, result.images, result.bad) == (hits1, hits5, count, count - len(losses))
                assert result.loss == pytest.approx(losses.mean().item(), rel=1e-6)
                assert result.outputs.nll.sum() == pytest.approx(losses.sum().item(), rel=1e-6)
                assert result.acc1 == pytest.approx(100 * hits1 / count)
                assert list(result.outputs.indices) == list(range(count)) and result.outputs.probabilities.shape == (count, 5)
                assert (result.outputs.top[:, 0] == result.outputs.targets).sum() == hits1


def test_a_missing_image_is_an_error():
    with pytest.raises(RuntimeError, match="23 .* 24"):
        score(Alone(), expected=24)


def test_reduced_precision_is_used_where_it_is_asked_for():
    exact, reduced = (evaluate([("a", Toy(1))], [batch(range(3), [-1] * 3)], Evaluation(
        prepare, torch.device("cpu"), autocast_dtype=dtype))[0].loss for dtype in (None, torch.bfloat16))
    assert exact != reduced == pytest.approx(exact, rel=0.05)


class Leaver(Observer):
    def __init__(self, process):
        self.process = process

    def leaves_evaluation(self):
        return self.process.rank == 1


def left(process):
    return evaluate([("a", Toy(1))], [batch(range(3), [-1] * 3)], Evaluation(
        prepare, torch.device("cpu"), process=process, observer=Leaver(process)))


def test_an_evaluation_that_one_rank_leaves_has_no_result_on_any(tmp_path):
    assert in_processes(left, 2, tmp_path) == [[], []]
