"""The same global batch gives the same training, however it is split over micro-batches and processes."""
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from engine import train_one_epoch
from tests.kits.toy import Alone, in_processes, training

CONFIGS = {"norm": dict(clip_grad=0.4), "agc": dict(clip_grad=0.05, clip_by="agc"),
           "value": dict(clip_grad=0.02, clip_by="value"), "none": {}}


def run(process, update_freq, config="norm", epochs=2):
    """Weights and EMA after `epochs`, with drop path, in float64."""
    wrap = None if process.world_size == 1 else lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True)
    state = training(process, update_freq=update_freq, config=CONFIGS[config], wrap=wrap)
    summaries = [train_one_epoch(state, epoch) for epoch in range(epochs)]
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
