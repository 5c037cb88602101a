"""How the networks behave: inputs, precisions, drop path, feature extraction, heads, export."""
import importlib.util
import io
import pickle
from pathlib import Path

import pytest
import timm
import torch

import models
from models import gnconv
from models.hornet import keep_factors

PICO = ["hornet_pico_7x7", "hornet_pico_gf"]


def pico(name="hornet_pico_gf", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


def alive(model):
    """Layer scale starts at 1e-6, so that a fresh network hardly shows what its blocks do."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.fill_(0.5)
    return model


@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize("size", [(32, 32), (33, 61), (224, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_size_and_precision_is_finite(name, size, dtype):
    model = alive(pico(name)).eval().to(dtype)
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *size, dtype=dtype))
    assert logits.shape == (2, 10) and logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_residual_stream_and_the_filter_in_float32(monkeypatch, name, dtype):
    def watching(x, weight):
        out = exact_filter(x, weight)
        seen.append(out.dtype)
        return out

    seen, model, exact_filter = [], alive(pico(name)).eval(), gnconv.global_filter
    monkeypatch.setattr(gnconv, "global_filter", watching)
    x = torch.randn(2, 3, 64, 64)
    exact = model(x)
    with torch.autocast("cpu", dtype):
        features = model.forward_features(x)
        mixed = model(x)
        mixed.float().sum().backward()
    assert features.dtype == torch.float32 and set(seen) <= {torch.float32}
    assert len(seen) == (6 if name.endswith("gf") else 0)
    assert (mixed.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("x,words", [
    (torch.zeros(1, 3, 31, 64), "at least 32x32 pixels, not 31x64"),
    (torch.zeros(1, 1, 64, 64), r"\(batch, 3, height, width\), not \(1, 1, 64, 64\)"),
    (torch.zeros(3, 64, 64), "batch, 3, height, width"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point input, not torch.uint8"),
])
def test_bad_input_gives_one_clear_sentence(x, words):
    with pytest.raises(ValueError, match=words):
        pico()(x)


@pytest.mark.parametrize("kwargs", [dict(unknown=1), dict(dropp_path_rate=0.1)])
def test_unknown_arguments_are_errors(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        pico(**kwargs)


@pytest.mark.parametrize("kwargs,words", [
    (dict(drop_path_rate=1.0), "drop_path_rate 1.0"), (dict(orders=(2, 3)), "four values"),
    (dict(orders=(2, 3, 4, 9)), "order 9"), (dict(depths=3), "four values")])
def test_bad_arguments_give_one_clear_sentence(kwargs, words):
    with pytest.raises(ValueError, match=words):
        pico(**kwargs)


def test_architecture_options_and_silence(capfd):
    model = pico(orders=(3, 3, 3, 3), width=16, depths=(1, 2, 1, 1), scale=1.0, kernel_size=5)
    assert [stage[0].gnconv.order for stage in model.stages] == [3, 3, 3, 3]
    assert model.num_drop_draws == 10 and model.stages[0][0].gnconv.dwconv.kernel_size == (5, 5)
    assert capfd.readouterr() == ("", "")


def test_initial_values():
    model = pico(layer_scale_init_value=0.25, head_init_scale=0.0)
    assert (model.stages[3][0].gamma2 == 0.25).all() and (model.head.weight == 0).all()
    assert "stages.0.0.gamma1" not in pico(layer_scale_init_value=0).state_dict()
    weight = timm.create_model("hornet_nano_gf").stages[2][0].gnconv.dwconv.complex_weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1) and weight.dtype == torch.float32


def test_drop_path_follows_the_given_draws():
    model = alive(pico(drop_path_rate=0.5)).train()
    assert model.num_drop_draws == 8
    x = torch.randn(4, 3, 32, 32)
    kept = model(x, torch.ones(4, 8) * 0.999)
    # rates 0, 1/6, 1/3, 1/2: draws of 0.2 drop both branches of the last two blocks only
    draws = torch.full((4, 8), 0.999)
    draws[1] = 0.2
    out = model(x, draws)
    torch.testing.assert_close(out[[0, 2, 3]], kept[[0, 2, 3]])
    assert (out[1] - kept[1]).abs().max() > 1e-3
    with torch.no_grad():
        for block in (model.stages[2][0], model.stages[3][0]):
            block.gamma1.zero_(), block.gamma2.zero_()
    without = model(x, torch.full((4, 8), 0.999))
    torch.testing.assert_close(out[1], without[1])
    # a branch is kept when its draw is at least the rate, and then scaled by 1 / (1 - rate)
    draws = torch.tensor([[0.0, 0.0, 0.16, 0.17, 0.33, 0.34, 0.49, 0.5]]).expand(4, 8)
    factors = keep_factors(x, draws, 0.5, 8)
    torch.testing.assert_close(factors[0], torch.tensor([[1, 1], [0, 1.2], [0, 1.5], [0, 2]]))
    with pytest.raises(ValueError, match=r"\(4, 8\) is needed"):
        model(x, torch.ones(4, 7))
    assert torch.equal(model.eval()(x, torch.zeros(4, 8)), model(x))


def test_drop_path_draws_by_itself_with_the_right_rate():
    factors = keep_factors(torch.zeros(4000, 3, 1, 1), None, 0.6, 8).flatten(1)
    torch.testing.assert_close(factors.mean(0), torch.ones(8), atol=0.1, rtol=0)
    dropped = (factors == 0).float().mean(0)[1::2]
    torch.testing.assert_close(dropped, torch.tensor([0, 0.2, 0.4, 0.6]), atol=0.03, rtol=0)


@pytest.mark.parametrize("name", PICO)
def test_gradient_checkpointing_changes_nothing(name):
    model, x = alive(pico(name, drop_path_rate=0.5)).train(), torch.randn(4, 3, 48, 32)
    draws, results = torch.rand(4, 8), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        loss = model(x, draws).square().sum()
        loss.backward()
        results.append([loss] + [p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", PICO)
def test_memory_formats_and_batches_agree(name):
    model, x = alive(pico(name)).eval(), torch.randn(3, 3, 64, 40)
    with torch.no_grad():
        out = model(x)
        assert torch.equal(out, model(x.contiguous(memory_format=torch.channels_last)))
        torch.testing.assert_close(out[1:2], model(x[1:2]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out, model.to(memory_format=torch.channels_last)(x), atol=1e-5, rtol=1e-5)


def test_features_equal_the_forward_pass():
    model, x = alive(pico()).eval(), torch.randn(1, 3, 64, 64)
    final, outputs = model.forward_intermediates(x, indices=[1, 3])
    assert torch.equal(final, outputs[1]) and torch.equal(final, model.forward_features(x))
    pooled = model.forward_head(final, pre_logits=True)
    assert pooled.shape == (1, 64) and torch.equal(model.get_classifier()(pooled), model(x))
    assert len(model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)) == 1


def test_timm_groups_cover_every_parameter_in_order():
    from timm.models import group_parameters
    model = pico()
    groups = group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert groups[0][0] == "downsample_layers.0.0.weight"


def test_torch_hub_offers_every_model():
    root = Path(__file__).parents[3]
    for name in PICO:
        assert torch.hub.load(str(root), name, source="local", num_classes=4).head.out_features == 4
    spec = importlib.util.spec_from_file_location("hubconf", root / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(callable(getattr(module, name)) for name in models.MODEL_NAMES)


@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_train_in_half_precision(monkeypatch, name, dtype):
    """Gated products beyond 65504, float16's end, and yet finite, accurate logits and gradients.

    (The backward pass runs outside autocast, as it should: inside, its own products would be made in
    float16.)
    """
    largest = []

    def watching(x, gate, scale):
        largest.append(float((scale * x * gate).detach().abs().max()))
        return scale * x * gate

    def gradients(**autocast):
        model.zero_grad()
        with torch.autocast("cpu", **autocast):
            loss = model(x).float().square().mean()
        loss.backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    model, x = alive(pico(name)), 10 * torch.randn(2, 3, 64, 64)
    monkeypatch.setattr(gnconv, "gated", watching)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "proj_in" in key or "pws" in key or key.endswith("dwconv.weight") or "post_norm.weight" in key:
                parameter.mul_(24 if name.endswith("gf") else 36)
    exact = gradients(enabled=False)
    assert max(largest) > 65504
    mixed = gradients(dtype=dtype)
    assert mixed.isfinite().all() and torch.cosine_similarity(exact, mixed, dim=0) > 0.97


def test_pickles_and_copies():
    model = alive(pico()).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    torch.save(model.state_dict(), io.BytesIO())
