"""What a GPU would be asked to do, on tensors that have a device and no memory: nothing mixes devices, nothing makes
the host wait, mixed precision is where it belongs.

Backward passes look for a CUDA context, so they are on the meta device.
"""
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import engine
from benchmarks.cases import noise, product_update
from common.outcome import Outcome
from datasets.dataset import Batch
from datasets.device import Prepare
from launch.process import Process
from models.dft import use_matrix_filter
from models.zoo import MODEL_NAMES
from optim.build import build_loss
from optim.ema import Ema
from optim.update import Update
from plan import Classification
from tests.kits.devices import HostWaits, Launches, NoHostReads, fake_cuda, to_cuda
from tests.kits.options import data_options
from tests.kits.toy import Alone

CUDA, PICO = torch.device("cuda"), ["hornet_pico_7x7", "hornet_pico_gf"]


class Positions(np.ndarray):
    """Numbers that stay on the host, where a tensor would become a fake one."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


def batch(count: int) -> Batch:
    return noise(count, 64)._replace(positions=np.arange(count).view(Positions))


BATCHES = [batch(4)] * 8  # made outside of `fake_cuda`


def parts(model: nn.Module, device: torch.device, **changes):
    """What a training is made of, on `device`: (task, Update)."""
    options = data_options(clip_grad=1.0, epochs=1, warmup_epochs=0, **changes)
    task = SimpleNamespace(
        model=model, prepare=Prepare(options, device, 1000), criterion=build_loss(options), seed=0,
        drop_draws=model.num_drop_draws, autocast_dtype=None, batches=lambda epoch, first: BATCHES)
    task.losses = partial(Classification.losses, task)
    return task, product_update(model, options)


@pytest.mark.parametrize("name, dtype, matrices", [
    *[(name, torch.bfloat16, False) for name in MODEL_NAMES],
    *[(name, dtype, matrices) for name in PICO for dtype, matrices in (
        (torch.bfloat16, True), (torch.float16, False), (torch.float16, True), (None, False), (None, True))]])
def test_every_model_computes_in_mixed_precision_with_a_float32_residual_stream(name, dtype, matrices):
    model, seen = timm.create_model(name, drop_path_rate=0.2, depths=(1, 1, 1, 1)).train(), {}
    use_matrix_filter(model, matrices)
    with fake_cuda(dtype), NoHostReads(), torch.no_grad():
        to_cuda(model)
        for layer in ("gnconv.proj_in", "gnconv.dwconv", "pwconv1", "norm2"):
            module = model.get_submodule(f"stages.2.0.{layer}")
            module.register_forward_hook(lambda _, args, out, layer=layer: seen.update({layer: out.dtype}))
        features = model.forward_features(torch.empty(2, 3, 64, 96, device="cuda"))
        logits = model.forward_head(features)
    inner = dtype or torch.float32
    assert seen == {"gnconv.proj_in": inner, "pwconv1": inner, "norm2": torch.float32,
                    "gnconv.dwconv": inner if model.cfg.filters[2] == "conv" else torch.float32}
    assert features.dtype == torch.float32 and (logits.device.type, logits.dtype) == ("cuda", inner)


@pytest.mark.parametrize("mixup, options", [
    (0.8, {}), (0.0, {"use_amp": True, "amp_dtype": "fp16"}), (0.0, {"clip_by": "agc"}), (0.0, {"clip_by": "value"})],
    ids=["bf16", "loss scaling", "agc", "value"])
def test_an_epoch_leaves_the_host_alone_but_for_its_reports(monkeypatch, mixup, options):
    """Preparation, forward, loss, fused AdamW with clipping, finiteness, EMA: only the engine's Readback may bring
    something to the host, and is asked to wait every `print_freq` (3) updates. Nothing is done tensor by tensor."""
    model, waits = timm.create_model("hornet_pico_gf", drop_path_rate=0.2), []

    def backward(update, loss):  # of the engine; gradients are put in
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        update._loss += loss.detach()
        for p in update.parameters:
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(Update, "backward", backward)
    readback = SimpleNamespace(add=lambda values, context: None, arrived=lambda wait: waits.append(wait) or ())
    monkeypatch.setattr(engine, "Readback", lambda: readback)
    monkeypatch.setattr(engine._Meter, "sums_over_ranks", lambda meter: [0.0] * 6)
    with fake_cuda(torch.bfloat16), NoHostReads(), Launches() as launches:
        task, update = parts(to_cuda(model), CUDA, mixup=mixup, cutmix=mixup, update_freq=2, **options)
        loop = engine.Loop(model=model, task=task, update=update, watch=None, process=Alone(), updates_per_epoch=4,
                           print_freq=3)
        progress = engine.train_one_epoch(loop, engine.Observer(), epoch=0)
        assert update.optimizer.param_groups[0]["fused"] and not update.host_reads
    assert waits == [False, False, False, True, False] and progress.outcome is Outcome.DONE
    assert launches.total < 2600 or "agc" in options.values()  # timm clips by it tensor by tensor


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_evaluation_tallies_stay_on_the_device_until_the_end(monkeypatch, dtype):
    monkeypatch.setattr(engine._Tally, "result", lambda tally, name: SimpleNamespace(
        images=None, where=(tally.counts.device.type, tally.loss.dtype)))
    monkeypatch.setattr(Process, "all_reduce_", lambda self, tensor, op="sum": 0)
    model = timm.create_model("hornet_pico_7x7")
    with fake_cuda(dtype), NoHostReads():
        to_cuda(model)
        evaluation = engine.Evaluation(Prepare(data_options(), CUDA), CUDA, columns=[1, 2], process=Alone())
        results = engine.evaluate([("", model), ("_ema", model)], BATCHES[:2], evaluation)
    assert [result.where for result in results] == [("cuda", torch.float64)] * 2


@pytest.mark.parametrize("harm", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.nonzero(),
                                  lambda x: bool(x.any()), lambda x: torch.empty(2).copy_(x[0]), lambda x: x.to("cpu")])
def test_a_read_and_a_tensor_of_another_device_would_be_noticed(harm):
    with fake_cuda(), NoHostReads():
        x = torch.empty(2, 2, device="cuda")
        with pytest.raises(HostWaits):
            harm(x)
        with pytest.raises(RuntimeError, match="(?i)device"):
            x + torch.zeros(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PICO)
def test_backward_and_update_on_the_meta_device(name, dtype):
    model = timm.create_model(name, drop_path_rate=0.2).to("meta", dtype).train()
    if name.endswith("gf"):
        use_matrix_filter(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with NoHostReads():
        model(torch.empty(2, 3, 64, 64, device="meta", dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        Ema(model, 0.9).update(torch.empty((), device="meta", dtype=torch.bool))
    assert all(p.grad.dtype == dtype and p.grad.is_meta for p in model.parameters())
