"""The fast paths compute what plain PyTorch computes, gradients included."""
import json
import platform

import numpy as np
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models  # noqa: F401 - registers the models with timm
from models.gnconv import PLAIN, Operators
from native import kernels as native
from native import operators as cpu
from native import paths as kernels
from tests.kits.fill import PARITY, parity_input, parity_tensor

PATHS = [pytest.param(dict(linear="onednn", kernels="plain", allocator="default"), id="onednn"),
         pytest.param(dict(linear="default", kernels="compiled", allocator="default"), id="compiled"),
         pytest.param(dict(linear="onednn", kernels="compiled", allocator="default"), id="both")]


@pytest.fixture
def ops(request):
    paths = request.param
    if paths["kernels"] == "compiled" and native.library() is None:
        pytest.skip("no C++ compiler")
    if paths["linear"] == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    return kernels.operators(paths)


def _grads(fn, *leaves, dtype=torch.float32):
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    out = fn(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def _compare(name, ops: Operators, leaves, tolerance=1e-4, **kwargs):
    def call(operators, *tensors):
        return name(operators, *tensors) if callable(name) else getattr(operators, name)(*tensors, **kwargs)

    fast = _grads(lambda *t: call(ops, *t), *leaves)
    exact = _grads(lambda *t: call(PLAIN, *t), *leaves, dtype=torch.float64)
    for got, want in zip(fast, exact, strict=True):
        assert got.shape == want.shape
        largest = max(1.0, float(want.detach().abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("ops", PATHS, indirect=True)
@pytest.mark.parametrize("shape", [(2, 14, 14, 48), (1, 9, 17, 40), (3, 7, 7, 20), (2, 4, 30, 8)])
def test_each_operator_equals_float64(ops, shape):
    torch.manual_seed(0)
    channels = shape[-1]
    x, w = torch.randn(shape), lambda *size: torch.randn(size) * 0.2
    _compare("linear", ops, (x, w(3 * channels, channels, 1, 1), w(3 * channels)))
    _compare("linear", ops, (x, w(5, channels), w(5)))
    _compare("linear_gelu", ops, (3 * x, w(2 * channels, channels), w(2 * channels)))
    _compare("layer_norm", ops, (x, w(channels), w(channels)), eps=1e-6)
    _compare("depthwise", ops, (x, w(channels, 1, 7, 7), w(channels)))
    _compare("depthwise", ops, (x, w(channels, 1, 3, 3)), bias=None)
    half = channels // 2
    _compare("global_local", ops, (x, w(half, 1, 3, 3), w(half, shape[1], shape[2] // 2 + 1, 2)))
    _compare("global_local", ops, (x, w(half, 1, 3, 3), w(half, 5, 3, 2)))
    _compare("patch_conv", ops, (x, w(12, channels, 2, 2), w(12)))

    def recursion(operators, x, first, bias, second, bias2):
        return operators.recursion(x[..., :4], torch.cat((x, x, x, x), -1)[..., 1:23],
                                   [(first, bias), (second, bias2)])
    _compare(recursion, ops, (x, w(6, 4, 1, 1), w(6), w(12, 6), w(12)))


@pytest.mark.parametrize("ops", PATHS, indirect=True)
def test_depthwise_takes_a_channel_slice(ops):
    x = torch.randn(2, 10, 12, 32)
    weight, bias = torch.randn(20, 1, 7, 7), torch.randn(20)
    torch.testing.assert_close(ops.depthwise(x[..., 12:], weight, bias), PLAIN.depthwise(x[..., 12:], weight, bias),
                               rtol=1e-5, atol=1e-4)


def test_gelu_over_its_whole_range():
    if native.library() is None:
        pytest.skip("no C++ compiler")
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])
    want = torch.nn.functional.gelu(x.double())
    assert float((native.gelu(x) - want).abs().div(x.abs().clamp(min=1)).max()) < 4e-7
    inner = x[:100_001].clone().requires_grad_()
    torch.nn.functional.gelu(inner.double()).sum().backward()
    slope = inner.detach().clone()
    native.gelu(slope, with_slope=True)
    assert float((slope - inner.grad).abs().max()) < 1e-6
    assert native.gelu(torch.tensor([float("nan")] * 3)).isnan().all()


def _pair(name, paths, **kwargs):
    torch.manual_seed(0)
    fast = timm.create_model(name, num_classes=10, layer_scale_init_value=0.5, **kwargs)
    plain = timm.create_model(name, num_classes=10, layer_scale_init_value=0.5, **kwargs)
    plain.load_state_dict(fast.state_dict())
    fast.set_operators(kernels.operators(paths))
    return fast, plain


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", ["hornet_pico_7x7", "hornet_pico_gf", "hornet_nano_gf"])
@pytest.mark.parametrize("drops", ["some", "all", "none"])
def test_training_step_equals_the_plain_one(name, paths, drops):
    fast, plain = _pair(name, paths, drop_path_rate=0.4)
    x = torch.randn(4, 3, 64, 96)
    draws = {"some": torch.rand(4, fast.num_drop_draws), "all": torch.zeros(4, fast.num_drop_draws),
             "none": torch.full((4, fast.num_drop_draws), 0.99)}[drops]
    for model in (fast, plain):
        model.train()(x, draws).square().mean().backward()
    for (label, got), want in zip(fast.named_parameters(), plain.parameters()):
        assert got.grad is not None, label
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5 * float(1 + want.grad.abs().max()),
                                   msg=lambda text: f"{label}: {text}")


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", ["hornet_pico_7x7", "hornet_pico_gf"])
def test_bfloat16_autocast_is_as_close_to_float32_as_the_plain_one(name, paths):
    fast, plain = _pair(name, paths)
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
    monkeypatch.setattr(cpu, "product_dtype", lambda dtype: torch.float32)
    test_bfloat16_autocast_is_as_close_to_float32_as_the_plain_one("hornet_pico_7x7", PATHS[2].values[0])
    fast, plain = _pair("hornet_pico_7x7", PATHS[2].values[0])
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), kernels.packed(fast, dtype=torch.bfloat16):
        found, exact = fast(x).float(), plain(x).float()
    assert all(matrix.dtype == torch.float32 for _, matrix, *_ in fast.ops.packed.values())
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


def test_autocast_leaves_products_in_the_type_chosen_for_them(monkeypatch):
    monkeypatch.setattr(cpu, "product_dtype", lambda dtype: torch.float32)
    seen = set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
                seen.update(argument.dtype for argument in arguments)
            return function(*arguments, **(keywords or {}))

    x, weight, bias = torch.randn(6, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randn(5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Watching():
        assert cpu.product(x, weight, bias, onednn=False).dtype == torch.bfloat16
    assert seen == {torch.float32}


@pytest.mark.parametrize("paths", PATHS)
def test_packed_weights_give_the_same_logits_and_are_dropped_afterwards(paths):
    fast, plain = _pair("hornet_pico_gf", paths)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), kernels.packed(fast):
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
        model, _ = _pair("hornet_pico_gf", kernels.code_paths("cpu"))
        for _ in range(2):
            model.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
                with kernels.packed(model):
                    if evaluates:
                        model.eval()(x)
            model.train()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("name", ["hornet_tiny_7x7_224x224", "hornet_tiny_7x7_192x256", "hornet_tiny_gf_288x288"])
def test_published_logits_on_this_machines_paths(name):
    stored = np.load(PARITY / "logits" / f"{name}.npz")
    model_name, size = name.rsplit("_", 1)
    model = timm.create_model(model_name).eval()
    model.load_state_dict({key: torch.from_numpy(parity_tensor(key, tuple(value.shape)))
                           for key, value in model.state_dict().items()})
    kernels.accelerate(model, {**kernels.code_paths("cpu"), "allocator": "default"})
    x = torch.from_numpy(parity_input(2, *map(int, size.split("x"))))
    with torch.inference_mode(), kernels.packed(model):
        assert float((model(x) - torch.from_numpy(stored["logits"])).abs().max()) < 1e-5


def test_paths_are_plain_data_and_repeatable():
    paths = kernels.code_paths("cpu")
    assert json.loads(json.dumps(paths)) == paths == kernels.code_paths("cpu")
    assert kernels.use_code_paths(paths, "cpu") == paths
    assert kernels.use_code_paths({}, "cpu") == kernels.PLAIN_PATHS
    assert kernels.operators(kernels.PLAIN_PATHS) is PLAIN


def test_a_path_that_is_wrong_is_not_used(monkeypatch):
    class Wrong(cpu.CpuOperators):
        def layer_norm(self, x, weight, bias, eps):
            return super().layer_norm(x, weight, bias, eps) * 1.01

    monkeypatch.setattr(cpu, "CpuOperators", Wrong)
    kernels._agrees.cache_clear()
    try:
        assert kernels.code_paths("cpu")["kernels"] == "plain"
    finally:
        kernels._agrees.cache_clear()


def test_without_a_compiler_everything_stays_plain(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    kernels._agrees.cache_clear()
    try:
        assert kernels.code_paths("cpu")["kernels"] == "plain"
    finally:
        native.library.cache_clear()
        kernels._agrees.cache_clear()


def test_compiled_results_do_not_depend_on_threads():
    if native.library() is None:
        pytest.skip("no C++ compiler")
    fast, _ = _pair("hornet_pico_7x7", PATHS[1].values[0])
    x, results = torch.randn(3, 9, 10, 24), []
    weight, before = torch.randn(24, 1, 7, 7), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(_grads(fast.ops.depthwise, x, weight, torch.randn(24, generator=torch.Generator())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have one width of vectors")
def test_kernels_for_narrower_vectors_equal_float64(monkeypatch):
    """What CPUs without AVX-512 compile, also where this one has it."""
    if native.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512f"))
    native.library.cache_clear()
    try:
        for shape in ((2, 14, 14, 48), (1, 9, 17, 40), (3, 7, 7, 20)):
            test_each_operator_equals_float64(kernels.operators(PATHS[2].values[0]), shape)
    finally:
        native.library.cache_clear()
