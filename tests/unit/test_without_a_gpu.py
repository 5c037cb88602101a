"""What a GPU would be asked to do, on tensors that have a device and no memory: nothing mixes devices, nothing makes
the host wait, mixed precision is where it belongs.

Backward passes look for a CUDA context, so they are on the meta device.
"""
import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import engine
from common.outcome import Outcome
from common.random import key
from datasets.dataset import Batch
from datasets.device import EvalPrepare, TrainPrepare
from datasets.transforms import Erasing
from launch.process import Process
from models.dft import use_matrix_filter
from models.zoo import MODEL_NAMES
from optim.build import build_loss, build_optimizer
from optim.ema import Ema
from optim.schedule import Schedule
from optim.update import Update
from tests.kits.devices import HostWaits, Launches, NoHostReads, fake_cuda, to_cuda
from tests.kits.options import data_options
from tests.kits.toy import Alone

CUDA, PICO = torch.device("cuda"), ["hornet_pico_7x7", "hornet_pico_gf"]


class Positions(np.ndarray):
    """Numbers that stay on the host, where a tensor would become a fake one."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


def batch(count: int, size: int = 64) -> Batch:
    """Black images; every second one has a box to erase."""
    boxes = np.array([[2, 3, 20, 10], [0, 0, 0, 0]] * (count // 2), dtype=np.int32)[:, None]
    return Batch(torch.zeros(count, size, size, 3, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64),
                 torch.arange(count), np.arange(count).view(Positions), torch.from_numpy(boxes), 0,
                 erased=Erasing().fill(boxes, [key(0, "erase", 0, i) for i in range(count)], size, size))


BATCHES = [batch(4)] * 8  # made outside of `fake_cuda`


def parts(model: nn.Module, device: torch.device, **changes):
    """What a training is made of, on `device`: (task, Update)."""
    options = data_options(clip_grad=1.0, opt="adamw", epochs=1, warmup_epochs=0, drop_path=0.2, **changes)
    prepare, criterion = TrainPrepare(options, 1000, device), build_loss(options)

    def losses(model, batch, update):
        images, targets = prepare(batch)
        logits = model(images, **engine.drop_draws(model.num_drop_draws, 0, update, batch, images.device))
        return criterion(engine.full_precision(logits), targets), None

    update = Update(model, build_optimizer(model, options), Schedule(options, 4), options, ema=Ema(model, 0.99))
    return SimpleNamespace(model=model, losses=losses, batches=lambda epoch, first: BATCHES), update


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_computes_in_bfloat16_with_a_float32_residual_stream(name):
    model, seen = timm.create_model(name, drop_path_rate=0.2, depths=(1, 1, 1, 1)).train(), {}
    with fake_cuda(torch.bfloat16), NoHostReads(), torch.no_grad():
        to_cuda(model)
        for layer in ("gnconv.proj_in", "gnconv.dwconv", "pwconv1", "norm2"):
            module = model.get_submodule(f"stages.2.0.{layer}")
            module.register_forward_hook(lambda _, args, out, layer=layer: seen.update({layer: out.dtype}))
        features = model.forward_features(torch.empty(2, 3, 64, 64, device="cuda"))
        logits = model.forward_head(features)
    filtered = model.cfg.filters[2] != "conv"
    assert seen == {"gnconv.proj_in": torch.bfloat16, "pwconv1": torch.bfloat16, "norm2": torch.float32,
                    "gnconv.dwconv": torch.float32 if filtered else torch.bfloat16}
    assert features.dtype == torch.float32 and (logits.device.type, logits.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize("dtype, inner", [(None, torch.float32), (torch.float16, torch.float16),
                                          (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize("matrices", [False, True])
def test_other_precisions_and_the_filter_as_matrices(name, dtype, inner, matrices):
    model, seen = timm.create_model(name).eval(), []
    use_matrix_filter(model, matrices)
    with fake_cuda(dtype), NoHostReads(), torch.no_grad():
        to_cuda(model).stages[1][0].pwconv1.register_forward_hook(lambda *given: seen.append(given[2].dtype))
        assert model(torch.empty(2, 3, 64, 96, device="cuda")).shape == (2, 1000)
    assert seen == [inner]


@pytest.mark.parametrize("mixup, options", [
    (0.8, {}), (0.0, {"use_amp": True, "amp_dtype": "fp16"}), (0.0, {"clip_by": "agc"}), (0.0, {"clip_by": "value"})],
    ids=["bf16", "loss scaling", "agc", "value"])
def test_an_epoch_leaves_the_host_alone_but_for_its_reports(monkeypatch, mixup, options):
    """Preparation, forward, loss, fused AdamW with clipping, finiteness, EMA: only the engine's Readback may bring
    something to the host, and is asked to wait every `print_freq` (3) updates."""
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
    with fake_cuda(torch.bfloat16), NoHostReads():
        task, update = parts(to_cuda(model), CUDA, mixup=mixup, cutmix=mixup, update_freq=2, **options)
        loop = engine.Loop(model=model, task=task, update=update, watch=None, process=Alone(), updates_per_epoch=4,
                           print_freq=3)
        progress = engine.train_one_epoch(loop, engine.Observer(), epoch=0)
        assert update.optimizer.param_groups[0]["fused"] and not update.host_reads
    assert waits == [False, False, False, True, False] and progress.outcome is Outcome.DONE


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_evaluation_tallies_stay_on_the_device_until_the_end(monkeypatch, dtype):
    monkeypatch.setattr(engine._Tally, "result", lambda tally, name: (tally.counts.device.type, tally.loss.dtype))
    model = timm.create_model("hornet_pico_7x7")
    images_of = batch(6)
    with fake_cuda(dtype), NoHostReads():
        to_cuda(model)
        evaluation = engine.Evaluation(EvalPrepare(data_options(), CUDA), CUDA, columns=[1, 2], process=Alone())
        monkeypatch.setattr(Process, "all_reduce_", lambda self, tensor, op="sum": 0)
        results = [engine._Tally(evaluation) for _ in range(2)]
        with torch.no_grad():
            for images, targets in [evaluation.prepare(images_of)] * 2:
                for tally in results:
                    tally.add(engine.full_precision(model.eval()(images)), targets, torch.arange(6))
        assert [tally.result("") for tally in results] == [("cuda", torch.float64)] * 2


@pytest.mark.parametrize("harm", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.nonzero(),
                                  lambda x: bool(x.any()), lambda x: torch.empty(2).copy_(x[0]), lambda x: x.to("cpu")])
def test_a_read_would_be_noticed(harm):
    with fake_cuda(), NoHostReads(), pytest.raises(HostWaits):
        harm(torch.empty(2, 2, device="cuda"))


def test_a_tensor_of_another_device_would_be_noticed():
    with fake_cuda(), pytest.raises(RuntimeError, match="(?i)device"):
        torch.empty(2, device="cuda") + torch.zeros(2)


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


@pytest.mark.parametrize("name, most", [("hornet_pico_7x7", 900), ("hornet_pico_gf", 1000)])
def test_operations_of_an_update_do_not_grow_with_the_batch(name, most):
    counts = [launches(name, batch(count)) for count in (2, 64)]
    assert counts[0].total == counts[1].total < most, counts[0].count


def launches(name: str, images: Batch) -> Launches:
    """Of an update of two micro-batches: mixing, erasing, forward and backward on the meta device; clipping, fused AdamW
    and EMA under `fake_cuda`."""
    found = Launches()
    model = timm.create_model(name, drop_path_rate=0.2).train()
    task, update = parts(copy.deepcopy(model).to("meta"), torch.device("meta"), update_freq=2)
    with found:
        for _ in range(2):
            update.backward(task.losses(task.model, images, 0)[0])
    with fake_cuda():
        _, update = parts(to_cuda(model), CUDA, update_freq=2)
        for step in range(2):  # the first one makes the optimizer's state
            for p in update.parameters:
                p.grad = torch.empty_like(p)
            with found if step else nullcontext():
                update.step(step)
    return found
