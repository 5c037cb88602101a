"""How the networks behave: inputs, precisions, drop path, feature extraction, heads, export."""
import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters

import hubconf
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


@pytest.mark.parametrize("x,words", [
    (torch.zeros(1, 3, 31, 64), "at least 32x32 pixels, not 31x64"),
    (torch.zeros(1, 1, 64, 64), r"\(batch, 3, height, width\), not \(1, 1, 64, 64\)"),
    (torch.zeros(3, 64, 64), "batch, 3, height, width"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point input, not torch.uint8"),
])
def test_bad_input_gives_one_clear_sentence(x, words):
    with pytest.raises(ValueError, match=words):
        pico()(x)


@pytest.mark.parametrize("kwargs,error,words", [
    (dict(unknown=1), TypeError, "unknown"), (dict(drop_path_rate=1.0), ValueError, "drop_path_rate 1.0"),
    (dict(orders=(2, 3)), ValueError, "four values"), (dict(orders=(2, 3, 4, 9)), ValueError, "order 9"),
    (dict(drop_rate=1.0), ValueError, "drop_rate 1.0"), (dict(drop_block_rate=0.1), ValueError, "drop_block_rate 0.1"),
    (dict(global_pool="max"), ValueError, "global_pool 'max'"), (dict(output_stride=8), ValueError, "output_stride 8")])
def test_bad_arguments_are_refused_by_name(kwargs, error, words):
    with pytest.raises(error, match=words):
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
    """A branch is kept when its draw is at least the rate, and then scaled by 1 / (1 - rate)."""
    x, draws = torch.randn(4, 3, 32, 32), torch.tensor([[0.0, 0.0, 0.16, 0.17, 0.33, 0.34, 0.49, 0.5]]).expand(4, 8)
    factors = keep_factors(x, draws, 0.5, 8)
    torch.testing.assert_close(factors[0], torch.tensor([[1, 1], [0, 1.2], [0, 1.5], [0, 2]]))
    model = alive(pico(drop_path_rate=0.5)).train()
    assert model.num_drop_draws == 8
    kept = torch.full((4, 8), 0.999)
    draws = kept.clone()
    draws[1] = 0.2  # of rates 0, 1/6, 1/3, 1/2: drops both branches of the last two blocks
    with torch.no_grad():
        all_kept, out = model(x, kept), model(x, draws)
        torch.testing.assert_close(out[[0, 2, 3]], all_kept[[0, 2, 3]])
        for block in (model.stages[2][0], model.stages[3][0]):
            block.gamma1.zero_(), block.gamma2.zero_()
        torch.testing.assert_close(out[1], model(x, kept)[1])
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


def test_timm_groups_cover_every_parameter_in_order():
    model = pico()
    groups = group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert groups[0][0] == "downsample_layers.0.0.weight"


def test_torch_hub_offers_every_model():
    root = str(Path(__file__).parents[3])
    assert all(callable(getattr(hubconf, name)) for name in models.MODEL_NAMES)
    assert torch.hub.load(root, "hornet_pico_gf", source="local", num_classes=4).head.out_features == 4


@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_train_under_autocast(monkeypatch, name, dtype):
    """Gated products beyond 65504, float16's end, and yet finite, accurate logits and gradients: the residual
    stream and the filter are float32.

    (The backward pass runs outside autocast, as it should: inside, its own products would be made in
    float16.)
    """
    def gated(x, gate, scale):
        products.append(scale * x * gate)
        return products[-1]

    def filtered(x, weight):
        spectra.append(exact_filter(x, weight))
        return spectra[-1]

    def gradients(**autocast):
        model.zero_grad()
        with torch.autocast("cpu", **autocast):
            features = model.forward_features(x)
            loss = model.forward_head(features).float().square().mean()
        loss.backward()
        assert features.dtype == torch.float32
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    products, spectra, exact_filter = [], [], gnconv.global_filter
    model, x = alive(pico(name)), 10 * torch.randn(2, 3, 64, 64)
    monkeypatch.setattr(gnconv, "gated", gated)
    monkeypatch.setattr(gnconv, "global_filter", filtered)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "proj_in" in key or "pws" in key or key.endswith("dwconv.weight") or "post_norm.weight" in key:
                parameter.mul_(24 if name.endswith("gf") else 36)
    exact = gradients(enabled=False)
    assert max(float(each.detach().abs().max()) for each in products) > 65504
    mixed = gradients(dtype=dtype)
    # Such products leave bfloat16's eight bits little: 0.95 to 0.99 with one version of PyTorch and another.
    assert mixed.isfinite().all() and torch.cosine_similarity(exact, mixed, dim=0) > 0.94
    assert [each.dtype for each in spectra] == [torch.float32] * (4 if name.endswith("gf") else 0)


@pytest.mark.parametrize("parts, trained", [
    ("backbone", {"head"}), ("stem", {"downsample_layers.1", "downsample_layers.2", "downsample_layers.3", "stages.0",
                                      "stages.1", "stages.2", "stages.3", "norm", "head"}),
    ("stem,stages.0-2", {"downsample_layers.3", "stages.3", "norm", "head"}),
    ("stages.1", {"downsample_layers.0", "downsample_layers.2", "downsample_layers.3", "stages.0", "stages.2", "stages.3",
                  "norm", "head"})])
def test_frozen_parts_have_no_gradient_and_drop_nothing(parts, trained):
    model, x = alive(pico(drop_path_rate=0.9)), torch.randn(2, 3, 64, 64)
    model.freeze(parts)
    copied = copy.deepcopy(model)
    for network in (model, copied):
        network.eval().train()
        modes = {name: module.training for name, module in network.named_modules() if name.count(".") == 1}
        assert {name for name, mode in modes.items() if mode} == {name for name in trained if "." in name}
        network(x).sum().backward()
        assert {".".join(name.split(".")[:2 if name[0] in "ds" else 1]) for name, p in network.named_parameters()
                if p.grad is not None} == trained
    if parts == "backbone":
        assert torch.equal(model(x), model.eval()(x))
