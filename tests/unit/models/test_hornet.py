"""How the networks behave: inputs, precisions, drop path, checkpointing, frozen parts, torch.hub."""
import copy

import pytest
import timm
import torch
from timm.models import group_parameters

import hubconf
import models
from models.gnconv import global_filter
from models.hornet import keep_factors
from tests.kits.docs import ROOT
from tests.kits.trained import lively

PICO = ["hornet_pico_7x7", "hornet_pico_gf"]
PARTS = [f"{kind}.{i}" for kind in ("downsample_layers", "stages") for i in range(4)] + ["norm", "head"]


@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize("size", [(32, 32), (33, 61), (224, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_size_and_precision_is_finite(name, size, dtype):
    with torch.no_grad():
        logits = lively(name).to(dtype)(torch.randn(2, 3, *size, dtype=dtype))
    assert logits.shape == (2, 4) and logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("arguments, x, words", [
    ({}, torch.zeros(1, 3, 31, 64), r"\(1, 3, 31, 64\)"), ({}, torch.zeros(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
    ({}, torch.zeros(3, 64, 64), r"\(3, 64, 64\)"), ({}, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
    (dict(unknown=1), None, "unknown"), (dict(orders=(2, 3)), None, "four values"),
    (dict(orders=(2, 3, 4, 9)), None, "order 9"), (dict(global_pool="max"), None, "global_pool 'max'"),
    (dict(drop_path_rate=1.0), None, "drop_path_rate 1.0"), (dict(drop_rate=1.5), None, "1.5"),
    (dict(drop_block_rate=0.1), None, "drop_block_rate 0.1"), (dict(output_stride=8), None, "output_stride 8")])
def test_what_it_cannot_take_is_refused_by_name(arguments, x, words):
    with pytest.raises((ValueError, TypeError), match=words):
        timm.create_model("hornet_pico_gf", **arguments)(x)


def test_initial_values_and_what_timm_and_torch_hub_ask_for():
    model = timm.create_model("hornet_nano_gf", layer_scale_init_value=0.25, head_init_scale=0.0)
    assert (model.stages[3][0].gamma2 == 0.25).all() and (model.head.weight == 0).all()
    assert float(model.stages[2][0].gnconv.dwconv.complex_weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    groups = group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert groups[0][0] == "downsample_layers.0.0.weight"
    assert all(callable(getattr(hubconf, name)) for name in models.MODEL_NAMES)
    assert torch.hub.load(str(ROOT), "hornet_pico_gf", source="local", num_classes=4).head.out_features == 4


def test_drop_path_follows_the_given_draws_or_its_own():
    """A branch is kept when its draw is at least the rate, and then scaled by 1 / (1 - rate)."""
    draws = torch.tensor([[0.0, 0.0, 0.16, 0.17, 0.33, 0.34, 0.49, 0.5]])
    factors = keep_factors(torch.zeros(1, 3, 1, 1), draws, 0.5, 8)
    torch.testing.assert_close(factors[0], torch.tensor([[1, 1], [0, 1.2], [0, 1.5], [0, 2]]))
    own = keep_factors(torch.zeros(4000, 3, 1, 1), None, 0.6, 8).flatten(1)
    torch.testing.assert_close(own.mean(0), torch.ones(8), atol=0.1, rtol=0)
    torch.testing.assert_close((own == 0).float().mean(0)[1::2], torch.tensor([0, 0.2, 0.4, 0.6]), atol=0.03, rtol=0)
    model, x, kept = lively(drop_path_rate=0.5).train(), torch.randn(2, 3, 32, 32), torch.full((2, 8), 0.999)
    draws = torch.stack([kept[0], torch.full((8,), 0.2)])  # of rates 0, 1/6, 1/3, 1/2: drops all of the last two blocks
    with torch.no_grad():
        all_kept, out = model(x, kept), model(x, draws)
        for block in (model.stages[2][0], model.stages[3][0]):
            block.gamma1.zero_(), block.gamma2.zero_()
        torch.testing.assert_close(out, torch.stack([all_kept[0], model(x, kept)[1]]))
    with pytest.raises(ValueError, match=r"\(2, 8\) is needed"):
        model(x, torch.ones(2, 7))
    assert torch.equal(model.eval()(x, torch.zeros(2, 8)), model(x))


@pytest.mark.parametrize("name", PICO)
def test_gradient_checkpointing_changes_nothing(name):
    model, x = lively(name, drop_path_rate=0.5).train(), torch.randn(4, 3, 48, 32)
    draws, results = torch.rand(4, 8), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        loss = model(x, draws).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *results))


# Cosines to the exact gradients. Under float16 products beyond its range are float32: 0.995 to 1.000 for five inputs each.
# In bfloat16 they use up its eight bits, and no limit means anything: 0.25 to 0.99 for 24 inputs, and -0.99 to 1.00 with the
# published rounding, x * (scale * gate). With ordinary products both roundings give 0.99989 to 0.99996 for 36 inputs.
@pytest.mark.parametrize("name, dtype, factor, limit", [
    ("hornet_pico_7x7", torch.float16, 36, 0.99), ("hornet_pico_gf", torch.float16, 24, 0.99),
    ("hornet_pico_7x7", torch.bfloat16, 1, 0.9995), ("hornet_pico_gf", torch.bfloat16, 1, 0.9995)])
def test_autocast_trains_accurately_even_where_gated_products_leave_float16(name, dtype, factor, limit):
    """The residual stream and the filter are float32.

    (The backward pass runs outside autocast, as it should: inside, its own products would be made in
    float16.)
    """
    torch.manual_seed(0)
    model, largest = timm.create_model(name, num_classes=10, layer_scale_init_value=0.5), []
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "proj_in" in key or "pws" in key or key.endswith("dwconv.weight") or "post_norm.weight" in key:
                parameter.mul_(factor)
    for stage in model.stages:
        stage[0].gnconv.proj_out.register_forward_hook(lambda _, args, out: largest.append(args[0].abs().max().item()))
    x, gradients = 10 * torch.randn(2, 3, 64, 64), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            features = model.forward_features(x)
            loss = model.forward_head(features).float().square().mean()
        assert features.dtype == global_filter(x.to(dtype), torch.randn(3, 4, 3, 2)).dtype == torch.float32
        gradients.append(torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert (max(largest) > 65504) is (factor > 1) and torch.cosine_similarity(*gradients, dim=0) > limit


@pytest.mark.parametrize("parts, frozen", [
    ("backbone", PARTS[:-1]), ("stem", PARTS[:1]), ("stem,stages.0-2", PARTS[:3] + PARTS[4:7]),
    ("stages.1", ["downsample_layers.1", "stages.1"])])
def test_frozen_parts_have_no_gradient_and_drop_nothing(parts, frozen):
    model, x = lively(drop_path_rate=0.9), torch.randn(2, 3, 64, 64)
    model.freeze(parts)
    for network in (model, copy.deepcopy(model)):
        network.eval().train()(x).sum().backward()
        for name in PARTS:
            module = network.get_submodule(name)
            assert all(each.training is (name not in frozen) for each in module.modules())
            assert all((p.grad is None) is (name in frozen) for p in module.parameters())
    if parts == "backbone":
        assert torch.equal(model(x), model.eval()(x))
