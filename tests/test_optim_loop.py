"""The training loop: stopping and going on at an update, what observers hear, reduced precision."""
import copy

import pytest
import timm
import torch

import models  # noqa: F401  (registers the networks)
from engine import Observer, train_one_epoch
from optim.build import load_optimizer_state
from tests.kits.toy import CLASSES, training


class Stopper(Observer):
    """Stops after some updates, and writes down what it hears."""

    def __init__(self, after=()):
        self.after, self.phases, self.progress = set(after), [], []

    def on_phase(self, phase, update):
        self.phases.append((phase, update))

    def after_update(self, update, stats):
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
        train_one_epoch(undisturbed, epoch)
    first = training(**settings)
    first.observer = Stopper([4 + stop])
    train_one_epoch(first, 0)
    progress = train_one_epoch(first, 1)
    assert (progress.request, progress.next_update) == ("interrupted", 5 + stop)
    second = training(**settings)  # only what a checkpoint holds is taken over
    second.plain.load_state_dict(first.plain.state_dict())
    second.update.ema.load_state_dict(first.update.ema.state_dict())
    load_optimizer_state(second.update.optimizer, first.update.optimizer.state_dict())
    progress = train_one_epoch(second, 1, progress.next_update - 4)
    assert (progress.request, progress.next_update) == ("", 8)
    assert_bits(bits(undisturbed), bits(second))


def test_what_an_observer_hears():
    state = training(update_freq=2)
    state.observer = stopper = Stopper()
    progress = train_one_epoch(state, 0)
    micro = ["data", "forward", "backward"]
    assert stopper.phases == [(phase, update) for update in range(4) for phase in micro + micro + ["step"]]
    assert [p.next_update for p in stopper.progress] == [2, 4]
    assert stopper.progress[-1] == progress and progress.request == ""
    recent = [p.recent_loss for p in stopper.progress]
    assert progress.loss == pytest.approx(sum(recent) / 2) and recent[0] == pytest.approx(stopper.progress[0].loss)
    assert progress.lr == pytest.approx(state.update.schedule.lr(3)) and progress.class_acc is not None
    assert 0 <= progress.data_wait <= 1 and progress.images_per_second > 0


def test_a_stop_after_the_last_update_leaves_the_epoch_complete():
    state = training()
    state.observer = Stopper([3])
    assert train_one_epoch(state, 0).request == ""


@pytest.mark.parametrize("dtype,scaling", [(torch.bfloat16, False), (torch.float16, True)])
def test_reduced_precision_trains_like_full(dtype, scaling):
    losses = []
    for autocast, config in ((None, {}), (dtype, dict(loss_scaling=scaling))):
        torch.manual_seed(0)
        model = timm.create_model("hornet_pico_7x7", num_classes=CLASSES, drop_path_rate=0.2)
        state = training(model=model, dtype=torch.float32, config=dict(clip_grad=1.0, **config))
        state.prepare = lambda b: (torch.nn.functional.interpolate(b.images, (32, 32)), b.targets)
        state.autocast_dtype = autocast
        losses.append([train_one_epoch(state, epoch).loss for epoch in range(2)])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
