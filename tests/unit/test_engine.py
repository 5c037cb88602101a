"""The training loop: the same numbers on any split, stopping and resuming, what observers hear, non-finite
updates."""
import copy

import pytest
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

import models  # noqa: F401  (registers the networks)
from common.outcome import Outcome
from engine import Observer
from optim.finite import NonfinitePolicy
from tests.kits.toy import CLASSES, Alone, Toy, in_processes, train, training

CONFIGS = {"norm": dict(clip_grad=0.4), "agc": dict(clip_grad=0.05, clip_by="agc"),
           "value": dict(clip_grad=0.02, clip_by="value"), "none": {}}


def run(process, update_freq, config="norm", epochs=2):
    """Weights and EMA after `epochs`, with drop path, in float64."""
    wrap = None if process.world_size == 1 else DistributedDataParallel
    state = training(process, update_freq=update_freq, config=CONFIGS[config], wrap=wrap)
    summaries = [train(state, epoch) for epoch in range(epochs)]
    return dict(weights=state.plain.state_dict(), ema=state.update.ema.state_dict(), loss=summaries[-1].loss,
                acc=summaries[-1].class_acc, norm=summaries[-1].grad_norm)


def assert_same(a, b, tolerance=1e-10):
    for part in ("weights", "ema"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=tolerance, atol=tolerance)
    # The engine's own sums are float32; hits are whole numbers.
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["norm"] == pytest.approx(b["norm"], rel=1e-5)
    assert a["acc"] == b["acc"]


@pytest.mark.parametrize("config", CONFIGS)
def test_accumulation_changes_nothing(config):
    whole = run(Alone(), 1, config)
    for update_freq in (2, 4):
        assert_same(whole, run(Alone(), update_freq, config))


def test_two_processes_equal_one(tmp_path):
    whole = run(Alone(), 1)
    for update_freq in (1, 2, 4):
        for result in in_processes(run, 2, tmp_path / str(update_freq), update_freq):
            assert_same(whole, result)


def test_four_processes_equal_one(tmp_path):
    for result in in_processes(run, 4, tmp_path, 2):
        assert_same(run(Alone(), 1), result)


def test_gradients_are_reduced_only_at_the_last_micro_batch(tmp_path):
    for seen in in_processes(_reductions, 2, tmp_path):
        assert seen == {"step": [False, False, True], "official": [True, True, True]}


def _reductions(process):
    seen = {}
    for mode in ("step", "official"):
        config = dict(clip_grad=1.0, clip_mode=mode)
        state = training(process, update_freq=2, config=config, wrap=DistributedDataParallel)
        flags = []
        for last in (False, False, True):
            with state.update.micro_batch(last):
                flags.append(state.model.require_backward_grad_sync)
        seen[mode] = flags
    return seen


class Stopper(Observer):
    """Stops after some updates, and writes down what it hears."""

    def __init__(self, after=()):
        self.after, self.phases, self.progress = set(after), [], []

    def on_phase(self, phase, update):
        self.phases.append((phase, update))

    def after_update(self, update, stats, sums):
        return update in self.after

    def on_progress(self, progress):
        self.progress.append(copy.copy(progress))


def bits(state):
    return copy.deepcopy([state.plain.state_dict(), state.update.ema.state_dict()])


def assert_bits(a, b):
    assert all(torch.equal(x[name], y[name]) for x, y in zip(a, b) for name in x)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_stopped_and_gone_on_by_another_process_gives_the_same_bits(stop):
    settings = dict(dtype=torch.float32, update_freq=2, config=dict(clip_grad=0.5))
    undisturbed = training(**settings)
    for epoch in range(2):
        train(undisturbed, epoch)
    first = training(**settings)
    train(first, 0)
    progress = train(first, 1, observer=Stopper([4 + stop]))
    assert (progress.outcome, progress.next_update) == (Outcome.PAUSED, 5 + stop)
    second = training(**settings)  # only what a checkpoint holds is taken over
    second.plain.load_state_dict(first.plain.state_dict())
    second.update.ema.load_state_dict(first.update.ema.state_dict())
    second.update.optimizer.load_state_dict(first.update.optimizer.state_dict())
    progress = train(second, 1, progress.next_update - 4)
    assert (progress.outcome, progress.next_update) == (Outcome.DONE, 8)
    assert_bits(bits(undisturbed), bits(second))


def test_what_an_observer_hears():
    state = training(update_freq=2)
    stopper = Stopper()
    progress = train(state, observer=stopper)
    micro = ["data", "forward", "backward"]
    assert stopper.phases == [(phase, update) for update in range(4) for phase in micro + micro + ["step"]]
    assert [p.next_update for p in stopper.progress] == [2, 4]
    assert stopper.progress[-1] == progress and progress.outcome is Outcome.DONE
    recent = [p.recent_loss for p in stopper.progress]
    assert progress.loss == pytest.approx(sum(recent) / 2)
    assert recent[0] == pytest.approx(stopper.progress[0].loss)
    assert progress.lr == pytest.approx(state.update.schedule.lr(3)) and progress.class_acc is not None
    assert 0 <= progress.data_wait <= 1 and progress.images_per_second > 0


def test_a_stop_after_the_last_update_leaves_the_epoch_complete():
    assert train(training(), observer=Stopper([3])).outcome is Outcome.DONE


@pytest.mark.parametrize("dtype,scaling", [(torch.bfloat16, False), (torch.float16, True)])
def test_reduced_precision_trains_like_full(dtype, scaling):
    losses = []
    for autocast, config in ((None, {}), (dtype, dict(loss_scaling=scaling))):
        torch.manual_seed(0)
        model = timm.create_model("hornet_pico_7x7", num_classes=CLASSES, drop_path_rate=0.2)
        state = training(model=model, dtype=torch.float32, config=dict(clip_grad=1.0, **config))
        state.task.prepare = lambda b: (torch.nn.functional.interpolate(b.images, (32, 32)), b.targets)
        state.task.autocast_dtype = autocast
        losses.append([train(state, epoch).loss for epoch in range(2)])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class Recorder(Observer):
    """Keeps what the engine tells, and a copy of everything that training changes after each update."""

    def __init__(self, loop):
        self.records, self.states, self.finite, self.training, self.update = [], [], [], loop, -1

    def on_phase(self, phase, update):
        self.update = update

    def after_update(self, update, stats, sums):
        self.finite.append(bool(stats.finite))
        self.states.append(snapshot(self.training))
        return False

    def on_nonfinite(self, record):
        self.records.append(record)


def snapshot(state):
    return copy.deepcopy({"weights": state.plain.state_dict(), "ema": state.update.ema.state_dict(),
                          "optimizer": state.update.optimizer.state_dict()["state"]})


def assert_equal_states(a, b):
    for part in ("weights", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    assert a["optimizer"].keys() == b["optimizer"].keys()
    for index, values in a["optimizer"].items():
        assert all(torch.equal(value, b["optimizer"][index][name]) for name, value in values.items())


def poisoned(updates, rank, process, policy="skip", kind="loss", epochs=1, **changes):
    """Train with a bad image in the last micro-batch of some updates, on one rank only."""
    wrap = None if process.world_size == 1 else DistributedDataParallel
    changes = {"dtype": torch.float32, "warmup_steps": -1, **changes}
    on_device = changes.pop("on_device", False)
    state = training(process, wrap=wrap, policy=NonfinitePolicy(policy), **changes)
    if on_device:  # obey the flag as on an accelerator, where nobody reads it first
        state.update.host_reads = False
    recorder, task = Recorder(state), state.task
    prepare, criterion = task.prepare, task.criterion

    def bad():
        return recorder.update in updates and process.rank == rank

    def spoil(b):
        images, targets = prepare(b)
        if kind == "loss" and bad():
            images[0] = float("inf")
        return images, targets

    task.prepare = spoil
    if kind == "gradient":  # a finite loss whose gradient is not
        task.criterion = lambda logits, targets: criterion(logits, targets) + (
            (logits - logits).abs().sum().sqrt() if bad() else 0)
    if kind == "value":  # an infinite loss with a finite gradient, which gradients do not carry over
        task.criterion = lambda logits, targets: criterion(logits, targets) + (
            float("inf") if bad() else 0)
    progress = [train(state, epoch, observer=recorder) for epoch in range(epochs)]
    return dict(progress=progress[-1], records=recorder.records, states=recorder.states,
                finite=recorder.finite)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("changes", [{}, dict(on_device=True), dict(opt="adam", on_device=True),
                                     dict(config=dict(clip_grad=0.1), on_device=True),
                                     dict(dtype=torch.float64), dict(opt="sgd"), dict(opt="lamb"),
                                     dict(config=dict(clip_grad=0.1)), dict(update_freq=2),
                                     dict(config=dict(clip_grad=0.1, clip_by="agc")),
                                     dict(config=dict(clip_grad=1.0, clip_mode="official"), update_freq=2)],
                         ids=str)
def test_nothing_changes(changes, kind):
    result = poisoned({0, 2}, 0, Alone(), kind=kind, **changes)
    assert result["finite"] == [False, True, False, True]
    assert_equal_states(result["states"][1], result["states"][2])
    undisturbed = poisoned(set(), 0, Alone(), **changes)
    assert_equal_weights_start(result["states"][0], undisturbed)
    assert result["progress"].nonfinite == 2 and result["progress"].outcome is Outcome.DONE
    assert result["progress"].loss == result["progress"].loss  # the mean is over the applied updates
    assert all(torch.isfinite(value).all() for value in result["states"][-1]["weights"].values())


def assert_equal_weights_start(state, undisturbed):
    """The first update was refused: weights and EMA are still the initial ones."""
    toy = Toy().to(next(iter(state["weights"].values())).dtype)
    for part in ("weights", "ema"):
        assert all(torch.equal(value, toy.state_dict()[name]) for name, value in state[part].items())
    assert not torch.equal(undisturbed["states"][0]["weights"]["head.weight"], toy.head.weight)


@pytest.mark.parametrize("kind", ["loss", "gradient", "value"])
def test_one_rank_of_two(tmp_path, kind):
    results = in_processes(_poisoned_second_rank, 2, tmp_path, kind)
    for result in results:
        assert result["finite"] == [True, False, True, True]
        assert_equal_states(result["states"][0], result["states"][1])
        assert_equal_states(result["states"][-1], results[0]["states"][-1])
    assert [result["records"][0]["reproduced"] for result in results] == [False, True]


def _poisoned_second_rank(process, kind):
    return poisoned({1}, 1, process, kind=kind, config=dict(clip_grad=1.0))


def test_the_record_names_the_place_and_the_images():
    record, = poisoned({1}, 0, Alone(), update_freq=2)["records"]
    assert record["update"] == 1 and record["epoch"] == 0 and record["action"] == "skip"
    assert record["first_module"] == "stem" and record["module_type"] == "Conv2d" and record["reproduced"]
    assert record["learning_rate"] > 0 and record["loss_scale"] == 1.0 and record["loss"] != record["loss"]
    assert len(record["images"]) == len(record["indices"]) == 16
    assert record["images"][0] == f"image{record['indices'][0]}.JPEG"


@pytest.mark.parametrize("policy,updates,outcome,last", [
    ("stop", {2}, Outcome.FAILED, 3), ("skip", {2}, Outcome.DONE, 8),
    ("rollback", {2}, Outcome.ROLLED_BACK, 3),
    ("skip", {1, 2, 3}, Outcome.ROLLED_BACK, 4), ("skip", {0, 1, 3}, Outcome.DONE, 4)])
def test_how_the_epoch_ends(policy, updates, outcome, last):
    progress = poisoned(updates, 0, Alone(), policy=policy)["progress"]
    assert progress.outcome is outcome
    assert progress.next_update == min(last, 4)


@pytest.mark.parametrize("changes", [{}, dict(on_device=True), dict(opt="lamb"), dict(dtype=torch.float64),
                                     dict(config=dict(clip_grad=0.3, clip_by="value"))], ids=str)
def test_loss_scaling_changes_only_the_range(changes):
    plain = poisoned(set(), 0, Alone(), **changes)
    config = {**changes.pop("config", dict(clip_grad=0.3)), "loss_scaling": True}
    scaled = poisoned(set(), 0, Alone(), config=config, **changes)
    if "clip_by" not in config:
        plain = poisoned(set(), 0, Alone(), config=dict(clip_grad=0.3), **changes)
    assert scaled["progress"].loss_scale == 65536
    for name, value in plain["states"][-1]["weights"].items():
        torch.testing.assert_close(value, scaled["states"][-1]["weights"][name], rtol=2e-4, atol=2e-5)


def test_overflow_halves_the_scale_and_skips():
    result = poisoned({1}, 0, Alone(), kind="gradient", config=dict(loss_scaling=True))
    assert result["finite"] == [True, False, True, True] and not result["records"]
    assert result["progress"].loss_scale == 32768
