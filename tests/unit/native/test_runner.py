"""The fast paths compute what plain PyTorch computes, gradients included, and step aside where they would be
seen.
"""
import copy
import pickle
import platform

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models  # noqa: F401 - registers the models with timm
import native
from models.gnconv import global_filter, interleave
from native import kernels, paths, runner
from tests.kits.fill import PARITY, parity_input, parity_tensor

PATHS = [pytest.param(dict(linear="onednn", kernels="plain", allocator="default"), id="onednn"),
         pytest.param(dict(linear="default", kernels="compiled", allocator="default"), id="compiled"),
         pytest.param(dict(linear="onednn", kernels="compiled", allocator="default"), id="both")]
BOTH = PATHS[2].values[0]


@pytest.fixture
def fast(request):
    chosen = request.param
    if chosen["kernels"] == "compiled" and kernels.library() is None:
        pytest.skip("no C++ compiler")
    if chosen["linear"] == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    return runner.BlockRunner(chosen["linear"] == "onednn", chosen["kernels"] == "compiled")


def layer(weight, bias=None):
    """A module that holds these tensors as they are, so that gradients reach them."""
    module = nn.Module()
    module.weight, module.bias = weight, bias
    return module


def gradients(call, *leaves, dtype=torch.float32):
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    out = call(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def compare(ours, plain, *leaves, tolerance=1e-4):
    exact = gradients(plain, *leaves, dtype=torch.float64)
    for got, want in zip(gradients(ours, *leaves), exact, strict=True):
        assert got.shape == want.shape
        largest = max(1.0, float(want.detach().abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * largest)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("fast", PATHS, indirect=True)
@pytest.mark.parametrize("shape", [(2, 14, 14, 48), (1, 9, 17, 40), (3, 7, 7, 20), (2, 4, 30, 8)])
def test_each_operation_equals_float64(fast, shape):
    torch.manual_seed(0)
    channels, f32 = shape[-1], torch.float32
    x, half = torch.randn(shape), shape[-1] // 2

    def w(*size):
        return torch.randn(size) * 0.2

    for gelu in (False, True):
        compare(lambda x, w, b: fast.linear(x, layer(w, b), f32, gelu),
                lambda x, w, b: F.gelu(F.linear(x, w, b)) if gelu else F.linear(x, w, b),
                3 * x, w(2 * channels, channels), w(2 * channels))
    compare(lambda *t: fast.layer_norm(*t, 1e-6, f32), lambda x, w, b: F.layer_norm(x, (channels,), w, b, 1e-6),
            x, w(channels), w(channels))
    compare(lambda x, w, b: fast.depthwise(x, layer(w, b), 0.3, f32),
            lambda x, w, b: 0.3 * nhwc(F.conv2d(nchw(x), w, b, padding=3, groups=channels)),
            x, w(channels, 1, 7, 7), w(channels))
    compare(lambda x, w: fast.depthwise(x, layer(w), 1.0, f32),
            lambda x, w: nhwc(F.conv2d(nchw(x), w, padding=1, groups=channels)), x, w(channels, 1, 3, 3))
    for grid in ((shape[1], shape[2] // 2 + 1), (5, 3)):
        def plain(x, w, spectrum):
            local, remote = nchw(x).chunk(2, dim=1)
            return nhwc(interleave(F.conv2d(local, w, padding=1, groups=half), global_filter(remote, spectrum)))
        compare(lambda *t: fast.global_local(*t, f32), plain, x, w(half, 1, 3, 3), w(half, *grid, 2))

    def recursion(x, first, bias, second, bias2):
        q = torch.cat((x, x, x, x), -1)[..., 1:23]
        return fast.recursion(x[..., :4], q, [layer(first, bias), layer(second, bias2)], x.dtype)

    def formula(x, first, bias, second, bias2):
        q = torch.cat((x, x, x, x), -1)[..., 1:23].split((4, 6, 12), -1)
        return F.linear(F.linear(x[..., :4] * q[0], first, bias) * q[1], second, bias2) * q[2]
    compare(recursion, formula, x, w(6, 4), w(6), w(12, 6), w(12))


def test_gelu_over_its_whole_range():
    if kernels.library() is None:
        pytest.skip("no C++ compiler")
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])
    want = F.gelu(x.double())
    assert float((kernels.gelu(x) - want).abs().div(x.abs().clamp(min=1)).max()) < 4e-7
    inner = x[:100_001].clone().requires_grad_()
    F.gelu(inner.double()).sum().backward()
    slope = inner.detach().clone()
    kernels.gelu(slope, with_slope=True)
    assert float((slope - inner.grad).abs().max()) < 1e-6
    assert kernels.gelu(torch.tensor([float("nan")] * 3)).isnan().all()


def pair(name, chosen, **kwargs):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10, layer_scale_init_value=0.5, **kwargs)
    fast = copy.deepcopy(plain)
    paths.set_paths(fast, chosen)
    return fast, plain


@pytest.mark.parametrize("chosen", PATHS)
@pytest.mark.parametrize("name", ["hornet_pico_7x7", "hornet_pico_gf", "hornet_nano_gf"])
@pytest.mark.parametrize("drops", ["some", "all", "none"])
def test_training_step_equals_the_plain_one(name, chosen, drops):
    fast, plain = pair(name, chosen, drop_path_rate=0.4)
    x = torch.randn(4, 3, 64, 96)
    draws = {"some": torch.rand(4, fast.num_drop_draws), "all": torch.zeros(4, fast.num_drop_draws),
             "none": torch.full((4, fast.num_drop_draws), 0.99)}[drops]
    for model in (fast, plain):
        model.train()(x, draws).square().mean().backward()
    for (label, got), want in zip(fast.named_parameters(), plain.parameters()):
        assert got.grad is not None, label
        tolerance = 1e-5 * float(1 + want.grad.abs().max())
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=tolerance, msg=lambda text: f"{label}: {text}")


@pytest.mark.parametrize("chosen", PATHS)
@pytest.mark.parametrize("name", ["hornet_pico_7x7", "hornet_pico_gf"])
def test_bfloat16_autocast_is_as_close_to_float32_as_the_plain_one(name, chosen):
    fast, plain = pair(name, chosen)
    x = torch.randn(4, 3, 64, 64)
    grads = []
    for model, enabled in ((plain, False), (plain, True), (fast, True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x)
        out.float().square().mean().backward()
        grads.append([out.float(), *(p.grad.clone() for p in model.parameters())])
    distance = [sum(float(((a - b).norm() / (1e-6 + b.norm())).detach()) for a, b in zip(each, grads[0]))
                for each in grads[1:]]
    assert distance[1] < 1.3 * distance[0]


def test_bfloat16_products_of_a_cpu_without_instructions_for_them(monkeypatch):
    """They are computed in float32, and so are as good as any, in training and with packed weights."""
    monkeypatch.setattr(runner, "product_dtype", lambda dtype: torch.float32)
    test_bfloat16_autocast_is_as_close_to_float32_as_the_plain_one("hornet_pico_7x7", BOTH)
    fast, plain = pair("hornet_pico_7x7", BOTH)
    x = torch.randn(2, 3, 64, 64)
    packed = native.packed(fast, dtype=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), packed:
        found, exact = fast(x).float(), plain(x).float()
        matrices = [entry[1] for entry in paths.runner_of(fast).packed.values() if entry[1].ndim == 2]
    assert matrices and all(matrix.dtype == torch.float32 for matrix in matrices)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("chosen", PATHS)
def test_packed_weights_give_the_same_logits_and_are_dropped_afterwards(chosen):
    fast, plain = pair("hornet_pico_gf", chosen)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), native.packed(fast):
        assert bool(paths.runner_of(fast).packed) == (chosen["linear"] == "onednn")
        for _ in range(2):
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for model in (fast, plain):
            for parameter in model.parameters():
                parameter.mul_(1.1)
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


def test_an_evaluation_between_two_steps_changes_no_bit_of_training():
    x, grads = torch.randn(2, 3, 64, 64), []
    for evaluates in (False, True):
        model, _ = pair("hornet_pico_gf", paths.code_paths("cpu"))
        for _ in range(2):
            model.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
                with native.packed(model):
                    if evaluates:
                        model.eval()(x)
            model.train()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("name", [
    "hornet_tiny_7x7_224x224", "hornet_tiny_7x7_192x256", "hornet_tiny_gf_288x288"])
def test_published_logits_on_this_machines_paths(name):
    stored = np.load(PARITY / "logits" / f"{name}.npz")
    model_name, size = name.rsplit("_", 1)
    model = timm.create_model(model_name).eval()
    model.load_state_dict({key: torch.from_numpy(parity_tensor(key, tuple(value.shape)))
                           for key, value in model.state_dict().items()})
    paths.set_paths(model, {**paths.code_paths("cpu"), "allocator": "default"})
    x = torch.from_numpy(parity_input(2, *map(int, size.split("x"))))
    with torch.inference_mode(), native.packed(model):
        assert float((model(x) - torch.from_numpy(stored["logits"])).abs().max()) < 1e-5


def test_compiled_results_do_not_depend_on_threads():
    if kernels.library() is None:
        pytest.skip("no C++ compiler")
    fast, x, results = runner.BlockRunner(False, True), torch.randn(3, 9, 10, 24), []
    weight, bias, before = torch.randn(24, 1, 7, 7), torch.randn(24), torch.get_num_threads()

    def depthwise(x, weight, bias):
        return fast.depthwise(x, layer(weight, bias), 1.0, torch.float32)

    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(gradients(depthwise, x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="others have one width of vectors")
def test_kernels_for_narrower_vectors_equal_float64(monkeypatch):
    """What CPUs without AVX-512 compile, also where this one has it."""
    if kernels.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-mno-avx512f"))
    kernels.library.cache_clear()
    try:
        for shape in ((2, 14, 14, 48), (1, 9, 17, 40), (3, 7, 7, 20)):
            test_each_operation_equals_float64(runner.BlockRunner(), shape)
    finally:
        kernels.library.cache_clear()


class _Subclass(torch.Tensor):
    pass


class _MyLinear(nn.Linear):
    pass


CHANGES = {
    "a forward hook inside": lambda b: b.norm1.register_forward_hook(lambda *_: None),
    "a forward pre-hook inside": lambda b: b.gnconv.pws[0].register_forward_pre_hook(lambda *_: None),
    "a backward hook inside": lambda b: b.gnconv.register_full_backward_hook(lambda *_: None),
    "a hook on gnConv's list": lambda b: b.gnconv.pws.register_forward_hook(lambda *_: None),
    "a replaced forward": lambda b: setattr(b.pwconv1, "forward", lambda x: x),
    "a layer of another type": lambda b: setattr(b, "pwconv1", _MyLinear(16, 64)),
    "a norm without weights": lambda b: setattr(b, "norm2", nn.LayerNorm(16, elementwise_affine=False)),
    "a layer without bias": lambda b: setattr(b, "pwconv1", nn.Linear(16, 64, bias=False)),
    "a parametrised layer": lambda b: nn.utils.parametrizations.weight_norm(b.pwconv1),
    "a parameter of another type": lambda b: setattr(b.pwconv1, "weight", nn.Parameter(
        b.pwconv1.weight.detach().as_subclass(_Subclass))),
    "a dilated convolution": lambda b: setattr(b.gnconv.dwconv, "dilation", (2, 2)),
    "another padding": lambda b: setattr(b.gnconv.dwconv, "padding_mode", "circular"),
    "an added module": lambda b: b.add_module("adapter", nn.Identity()),
    "a float64 layer": lambda b: b.pwconv2.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_steps_aside_for_a_changed_block(change):
    """At each call: also after `attach`, and back again."""
    block, x = timm.create_model("hornet_pico_7x7").stages[1][0], torch.randn(1, 16, 8, 8)
    fast, before = runner.BlockRunner(), copy.deepcopy(block)
    assert fast(block, x, None) is not NotImplemented
    change(block)
    assert fast(block, x, None) is NotImplemented
    assert fast(before, x, None) is not NotImplemented


@pytest.mark.parametrize("change", ["fourier", "hook"])
def test_it_steps_aside_for_a_changed_filter(change):
    block, x = timm.create_model("hornet_pico_gf").stages[2][0], torch.randn(1, 32, 4, 4)
    assert runner.BlockRunner()(block, x, None) is not NotImplemented
    if change == "hook":
        block.gnconv.dwconv.dw.register_forward_hook(lambda *_: None)
    else:
        block.gnconv.dwconv.fourier = global_filter
    assert runner.BlockRunner()(block, x, None) is NotImplemented


def test_it_steps_aside_for_modes_transforms_and_types():
    block, fast = timm.create_model("hornet_pico_7x7").stages[1][0], runner.BlockRunner()
    x, seen = torch.randn(2, 16, 8, 8), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            return function(*arguments, **(keywords or {}))

    def note(x):
        seen.append(fast(block, x, None))
        return x

    torch.vmap(note)(x[None])
    torch.func.grad(lambda x: note(x).sum())(x)
    torch.func.jvp(note, (x,), (x,))
    with Watching():
        note(x)
    with torch.device("cpu"):  # a mode that sees every function
        note(x)
    with torch.autocast("cpu", torch.float16):
        note(x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    note(x)
    handle.remove()
    for other in (x.double(), x.half(), x.to("meta"), x.as_subclass(_Subclass), x[:0]):
        note(other)
    note(x.bfloat16())  # a float32 block
    assert len(seen) == 13 and all(out is NotImplemented for out in seen)
    assert fast(block, x, None) is not NotImplemented


def test_a_model_pickled_where_there_were_kernels_runs_where_there_are_none(monkeypatch):
    fast, plain = pair("hornet_pico_gf", PATHS[1].values[0])
    monkeypatch.setattr(kernels, "library", lambda: None)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), plain(x))
