"""A loss or gradient that is not finite: nothing changes on any rank, it is explained, and the policy decides."""
import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from engine import Observer, train_one_epoch
from optim.finite import NonfinitePolicy, diagnose
from optim.update import LossScale
from tests.kits.toy import Alone, Toy, in_processes, training


class Recorder(Observer):
    """Keeps what the engine tells, and a copy of everything that training changes after each update."""

    def __init__(self):
        self.records, self.states, self.finite, self.training = [], [], [], None

    def after_update(self, update, stats):
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
    """Train with a bad picture in the last micro-batch of some updates, on one rank only."""
    wrap = None if process.world_size == 1 else DistributedDataParallel
    changes = {"dtype": torch.float32, "warmup_steps": -1, **changes}
    on_device = changes.pop("on_device", False)
    state = training(process, wrap=wrap, policy=NonfinitePolicy(policy), **changes)
    if on_device:  # obey the flag as on an accelerator, where nobody reads it first
        state.update.host_reads = False
    recorder = state.observer = Recorder()
    recorder.training = state
    seen, prepare, criterion = {"update": -1}, state.prepare, state.criterion
    recorder.on_phase = lambda phase, update: seen.update(update=update)

    def spoil(b):
        images, targets = prepare(b)
        if kind == "loss" and seen["update"] in updates and process.rank == rank:
            images[0] = float("inf")
        return images, targets

    state.prepare = spoil
    if kind == "gradient":  # a finite loss whose gradient is not
        state.criterion = lambda logits, targets: criterion(logits, targets) + (
            (logits - logits).abs().sum().sqrt() if seen["update"] in updates and process.rank == rank else 0)
    if kind == "value":  # an infinite loss with a finite gradient, which no reduction of gradients carries over
        state.criterion = lambda logits, targets: criterion(logits, targets) + (
            float("inf") if seen["update"] in updates and process.rank == rank else 0)
    state.path_of = lambda index: f"picture{index}.JPEG"
    progress = [train_one_epoch(state, epoch) for epoch in range(epochs)]
    return dict(progress=progress[-1], records=recorder.records, states=recorder.states, finite=recorder.finite)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("changes", [{}, dict(on_device=True), dict(opt="adam", on_device=True),
                                     dict(config=dict(clip_grad=0.1), on_device=True),
                                     dict(dtype=torch.float64), dict(opt="sgd"), dict(opt="lamb"),
                                     dict(config=dict(clip_grad=0.1)), dict(update_freq=2),
                                     dict(config=dict(clip_grad=0.1, clip_by="agc")),
                                     dict(config=dict(clip_grad=1.0, clip_mode="official"), update_freq=2)], ids=str)
def test_nothing_changes(changes, kind):
    result = poisoned({0, 2}, 0, Alone(), kind=kind, **changes)
    assert result["finite"] == [False, True, False, True]
    assert_equal_states(result["states"][1], result["states"][2])
    undisturbed = poisoned(set(), 0, Alone(), **changes)
    assert_equal_weights_start(result["states"][0], undisturbed)
    assert result["progress"].nonfinite == 2 and result["progress"].request == ""
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


def test_the_record_names_the_place_and_the_pictures():
    record, = poisoned({1}, 0, Alone(), update_freq=2)["records"]
    assert record["update"] == 1 and record["epoch"] == 0 and record["action"] == "skip"
    assert record["first_module"] == "stem" and record["module_type"] == "Conv2d" and record["reproduced"]
    assert record["learning_rate"] > 0 and record["loss_scale"] == 1.0 and record["loss"] != record["loss"]
    assert len(record["pictures"]) == len(record["indices"]) == 16
    assert record["pictures"][0] == f"picture{record['indices'][0]}.JPEG"


@pytest.mark.parametrize("policy,updates,request_,last", [
    ("stop", {2}, "stop", 3), ("skip", {2}, "", 8), ("rollback", {2}, "rollback", 3),
    ("skip", {1, 2, 3}, "rollback", 4), ("skip", {0, 1, 3}, "", 4)])
def test_what_the_run_must_do(policy, updates, request_, last):
    progress = poisoned(updates, 0, Alone(), policy=policy)["progress"]
    assert progress.request == request_
    assert progress.next_update == min(last, 4)


def test_policy_gives_up():
    policy = NonfinitePolicy("skip", in_a_row=3, give_up_after=2)
    answers = [policy.decide(False) for _ in range(9)]
    assert answers == ["skip", "skip", "rollback", "skip", "skip", "rollback", "skip", "skip", "stop"]
    policy = NonfinitePolicy("skip", in_a_row=3, give_up_after=2)
    answers = [policy.decide(number % 2 == 0) for number in range(50)]
    assert answers[:41].count("skip") == 20 and "stop" not in answers[:41] and answers[41] == "stop"


def test_scale_overflows_are_not_held_against_the_run():
    policy = NonfinitePolicy("skip")
    assert [policy.decide(False, overflow=True) for _ in range(20)] == ["go"] * 20
    scale = LossScale(torch.device("cpu"), enabled=True)
    for _ in range(3):
        scale.update(torch.tensor(False))
    assert scale.scale == 8192
    restored = LossScale(torch.device("cpu"), enabled=True)
    restored.load_state_dict(scale.state_dict())
    for _ in range(restored.interval):
        restored.update(torch.tensor(True))
    assert restored.scale == 16384
    torch_own = torch.amp.GradScaler("cpu")
    torch_own.load_state_dict(scale.state_dict())
    assert torch_own.get_scale() == 8192


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


def test_diagnosis_changes_nothing_and_finds_gradients_and_weights():
    model = Toy()
    images = torch.randn(4, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    clean = diagnose(model, lambda: model(images).sum())
    assert not clean["reproduced"] and clean["first_module"] == "" and clean["parameters"] == []
    assert all(p.grad is None for p in model.parameters())
    bad = diagnose(model, lambda: (model(images) * 0).abs().sqrt().sum())
    assert bad["reproduced"] and bad["parameters"][0].startswith("head.")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.branch.weight[0, 0] = float("nan")
    broken = diagnose(model, lambda: model(images).sum())
    assert broken["first_module"] == "branch" and broken["parameters"] == ["branch.weight"]
    assert not any(module._forward_hooks for module in model.modules())
