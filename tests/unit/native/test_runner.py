"""The fast paths compute what plain PyTorch computes, gradients included, and step aside where they would be
seen.
"""
import copy
import pickle
import platform
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import models  # noqa: F401 - registers the models with timm
import native
from models.gnconv import GnConv, global_filter
from models.hornet import Block
from native import kernels, runner
from tests.kits.devices import Launches

if kernels.library() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)
# Products by oneDNN or by the default library, compiled kernels or plain PyTorch, more flags of the compiler.
RUNNERS = {"onednn": (True, False), "compiled": (False, True), "both": (True, True)}
if platform.machine() in ("x86_64", "AMD64"):  # what CPUs without AVX-512 compile, also where this one has it
    RUNNERS["narrow vectors"] = True, True, "-mno-avx512f"


@pytest.fixture(params=RUNNERS.values(), ids=RUNNERS)
def fast(request, monkeypatch):
    onednn, compiled, *flags = request.param
    if flags:
        monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, *flags))
        monkeypatch.setattr(kernels, "library", cache(kernels.library.__wrapped__))
    return runner.BlockRunner(onednn, compiled)


def gradients(block, x, keep):
    x = x.clone().requires_grad_()
    out = block(x, keep)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("shape", [(2, 48, 14, 14), (1, 40, 9, 17), (3, 16, 7, 7), (2, 8, 4, 30)])
@pytest.mark.parametrize("kernel_size,spatial", [(7, "conv"), (5, "conv"), (3, "conv"), (7, (5, 3)), (7, "own grid")])
def test_a_block_equals_float64(fast, shape, kernel_size, spatial):
    torch.manual_seed(0)
    spatial = (shape[2], shape[3] // 2 + 1) if spatial == "own grid" else spatial
    plain = Block(GnConv(shape[1], 3, kernel_size, filter=spatial))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(plain)
    ours.runner = fast
    plain.double()
    x, some = torch.randn(shape), torch.tensor([[1.25, 0.0], [0.0, 1.25], [1.25, 1.25]])[:shape[0]]
    for keep in (None, some, torch.zeros_like(some)):  # every parameter has a gradient, if only zero
        assert fast(ours, x, keep) is not NotImplemented
        for got, want in zip(gradients(ours, x, keep), gradients(plain, x.double(), keep), strict=True):
            largest = max(1.0, float(want.detach().abs().max()))
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 * largest)


def test_gelu_over_its_whole_range():
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])
    exact = x.double().requires_grad_()
    want = F.gelu(exact)
    assert float((kernels.gelu(x) - want).abs().div(x.abs().clamp(min=1)).max()) < 4e-7
    want[:100_001].sum().backward()
    kernels.gelu(x, with_slope=True)
    assert float((x - exact.grad)[:100_001].abs().max()) < 1e-6
    assert kernels.gelu(torch.tensor([float("nan")] * 3)).isnan().all()


def pair(name, fast):
    """A model on the runner `fast`, and an equal one in plain PyTorch."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10, layer_scale_init_value=0.5)
    ours = copy.deepcopy(plain)
    for module in ours.modules():
        if isinstance(module, Block):
            module.runner = fast
    return ours, plain


@pytest.mark.parametrize("name, product_dtype", [
    ("hornet_pico_7x7", None), ("hornet_pico_gf", None), ("hornet_pico_7x7", torch.float32)])
def test_bfloat16_and_packed_weights_are_as_close_to_float32_as_plain_pytorch(monkeypatch, fast, name, product_dtype):
    """Also on a CPU without bfloat16 instructions, whose products are float32, in training and packed."""
    if product_dtype:
        monkeypatch.setattr(runner, "product_dtype", lambda dtype: product_dtype)
    ours, plain = pair(name, fast)
    x, found = torch.randn(4, 3, 64, 64), []
    for model, enabled in ((plain, False), (plain, True), (ours, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x).float()
        found.append([out.detach(), *torch.autograd.grad(out.square().mean(), [*model.parameters()])])
    exact, *others = found
    distance = [sum(float((a - b).norm() / (1e-6 + b.norm())) for a, b in zip(each, exact)) for each in others]
    assert distance[1] < 1.3 * distance[0]
    for dtype, limit in ((torch.bfloat16, 0.05), (torch.float32, 1e-4)):
        half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), half, native.packed(ours, dtype=dtype):
            assert bool(fast.packed) == fast.onednn
            for _ in range(2):
                torch.testing.assert_close(ours(x).float(), exact[0], rtol=0, atol=limit * float(exact[0].abs().max()))
    with torch.no_grad():
        for parameter in (*ours.parameters(), *plain.parameters()):
            parameter.mul_(1.1)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


def test_compiled_results_do_not_depend_on_threads():
    x, taps, results, threads = torch.randn(3, 9, 10, 24), torch.randn(49, 24), [], torch.get_num_threads()
    for count in (threads + 1, threads):
        torch.set_num_threads(count)
        out, kept = kernels.depthwise(x, taps, taps[0])
        results.append([out, *kernels.depthwise_backward(out, *kept)])
    assert all(map(torch.equal, *results))


class _Subclass(torch.Tensor):
    pass


CHANGES = {
    "a forward pre-hook inside": lambda b: b.gnconv.pws[0].register_forward_pre_hook(lambda *_: None),
    "a backward hook inside": lambda b: b.gnconv.register_full_backward_hook(lambda *_: None),
    "a hook in a new dictionary": lambda b: setattr(b.norm1, "_forward_hooks", {0: lambda *_: None}),
    "a replaced forward": lambda b: setattr(b.pwconv1, "forward", lambda x: x),
    "a layer without bias": lambda b: setattr(b, "pwconv1", nn.Linear(32, 128, bias=False)),
    "a parametrised layer": lambda b: nn.utils.parametrizations.weight_norm(b.pwconv1),
    "a parameter of another type": lambda b: setattr(b.pwconv1, "weight", nn.Parameter(
        b.pwconv1.weight.detach().as_subclass(_Subclass))),
    "a dilated convolution": lambda b: setattr(b.gnconv.proj_in, "dilation", (2, 2)),
    "an added module": lambda b: b.add_module("adapter", nn.Identity()),
    "a float64 layer": lambda b: b.pwconv2.double(),
    "another filter": lambda b: setattr(b.gnconv.dwconv, "fourier", global_filter),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_steps_aside_for_a_changed_block(change):
    """At each call: also after `attach`, and back again."""
    block, x, fast = timm.create_model("hornet_pico_gf").stages[2][0], torch.randn(1, 32, 4, 4), runner.BlockRunner()
    before = copy.deepcopy(block)
    assert fast(block, x, None) is not NotImplemented
    change(block)
    assert fast(block, x, None) is NotImplemented is not fast(before, x, None)


def test_it_steps_aside_for_modes_transforms_and_types():
    block, fast = timm.create_model("hornet_pico_7x7").stages[1][0], runner.BlockRunner()
    x, seen = torch.randn(2, 16, 8, 8), []

    def note(x):
        seen.append(fast(block, x, None))
        return x

    torch.vmap(note)(x[None])
    torch.func.grad(lambda x: note(x).sum())(x)
    torch.func.jvp(note, (x,), (x,))
    for mode, *arguments in ((Launches,), (torch.device, "cpu"), (torch.autocast, "cpu", torch.float16),
                             (nn.modules.module.register_module_forward_hook, print),
                             (block.norm2.register_forward_pre_hook, print)):
        with mode(*arguments):
            note(x)
    # The last one is for a float32 block.
    for other in (x.double(), x.half(), x.to("meta"), x.as_subclass(_Subclass), x[:0], x.bfloat16()):
        note(other)
    assert len(seen) == 14 and all(out is NotImplemented for out in seen)
    assert fast(block, x, None) is not NotImplemented


def test_a_model_pickled_where_there_were_kernels_runs_where_there_are_none(monkeypatch):
    ours, plain = pair("hornet_pico_gf", runner.BlockRunner())
    monkeypatch.setattr(kernels, "library", lambda: None)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), plain(x))
