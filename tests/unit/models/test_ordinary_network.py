"""HorNet is an ordinary PyTorch network: hooks fire, adapters train, tracers, counters and quantisers find
their layers.

With the fast CPU paths attached, as training and evaluation attach them: they step aside where somebody
looks.
"""
import fvcore.nn
import numpy as np
import pytest
import thop
import timm
import torch
from peft import LoraConfig, get_peft_model
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.models._features import FeatureHookNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn
from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models.feature_extraction import create_feature_extractor

import models
import native
from models.inspect import flops
from models.zoo import PUBLISHED
from tests.kits.trained import lively

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
PICO = ["hornet_pico_7x7", "hornet_pico_gf"]


def network(name="hornet_pico_gf", attach=True, **kwargs):
    """A small model in which every branch shows, on this machine's fast paths."""
    model = lively(name, 10, **kwargs)
    if attach:
        native.attach(model)
    return model


def called(model):
    """Every module that computes something: no containers that are only indexed, no identities."""
    return [(name, module) for name, module in model.named_modules()
            if not isinstance(module, (nn.ModuleList, nn.Identity))]


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in PUBLISHED), ("hornet_pico_gf", torch.float16)])
def test_every_module_of_the_published_models_fires_its_hooks(name, dtype):
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.1)
    model, seen = model.to_empty(device="cpu").to(dtype), []  # what it computes does not matter here
    native.attach(model)
    for label, module in called(model):
        module.register_forward_hook(lambda *_, label=label: seen.append(label))
    for training in (True, False):
        with torch.set_grad_enabled(training):
            model.train(training)(torch.zeros(1, 3, 32, 32, dtype=dtype))
    assert sorted(seen) == sorted(2 * [label for label, _ in called(model)])


@pytest.mark.parametrize("name", PICO)
def test_a_hook_on_a_single_module_fires_and_what_it_returns_is_used_and_a_replaced_layer_too(name):
    model, x = network(name).train(), torch.randn(1, 3, 32, 32)
    exact = model(x)
    for label, module in called(model)[1:]:
        outputs, gradients = [], []
        with module.register_forward_hook(lambda _, args, out: outputs.append(out)):
            watched = model(x)
        torch.testing.assert_close(watched, exact, rtol=1e-4, atol=1e-5)
        with module.register_forward_hook(lambda _, args, out: out + torch.randn_like(out)):
            assert not torch.equal(model(x), watched), label
        with module.register_full_backward_hook(lambda *_: gradients.append(1)):
            model(x).sum().backward()
        assert len(outputs) == 1 and gradients, label
    model.stages[1][0].pwconv1 = nn.Sequential(model.stages[1][0].pwconv1, nn.Tanh())
    assert not torch.allclose(model(x), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PICO)
def test_lora_adapters_get_gradients_and_are_merged(name):
    model, x = network(name), torch.randn(2, 3, 64, 64)
    layers = r".*(proj_in|proj_out|pws\.\d+|pwconv1|pwconv2|head)"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=layers))
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    assert len(adapters) == 2 * (4 * 4 + 10 + 1)  # two matrices at 4 layers per block, 10 `pws` and the head
    for adapter in adapters:
        nn.init.normal_(adapter, std=0.1)
    adapted.train()(x).square().sum().backward()
    assert all(adapter.grad.any() for adapter in adapters)
    wanted, merged = adapted.eval()(x), adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PICO)
def test_torch_fx_and_compile_take_the_whole_graph(name, training):
    model = network(name, drop_path_rate=0.3).train(training)
    x, draws = torch.randn(2, 3, 64, 48), torch.rand(2, model.num_drop_draws)
    exact, traced = model(x, draws), torch.fx.symbolic_trace(model)
    for graph in (traced, torch.compile(model, backend="eager", fullgraph=True)):
        torch.testing.assert_close(graph(x, draws), exact, rtol=1e-4, atol=1e-5)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert called >= {label for label, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d, nn.LayerNorm)}


def test_linear_layers_are_quantised_dynamically():
    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"
    model, x = network(), torch.randn(2, 3, 64, 64)
    exact = model(x)
    mapping = torch.ao.quantization.QConfigMapping().set_object_type(nn.Linear, default_dynamic_qconfig)
    by_graph = convert_fx(prepare_fx(network(attach=False), mapping, (x,)))
    for quantised in (quantize_dynamic(model, {nn.Linear}), by_graph):
        kinds = [type(m).__module__ for m in quantised.modules() if type(m).__name__ == "Linear"]
        assert len(kinds) == 9 and all("quantized.dynamic" in kind for kind in kinds)
        assert 0 < (quantised(x) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", PICO)
def test_timm_and_torchvision_get_the_features(name):
    x, model, getter = torch.randn(2, 3, 64, 96), network(name), network(name, attach=False, features_only=True)
    assert (getter.feature_info.channels(), getter.feature_info.reduction()) == ([8, 16, 32, 64], [4, 8, 16, 32])
    with torch.no_grad():
        wanted = model.forward_intermediates(x, intermediates_only=True)
        for extractor in (
                getter, FeatureGraphNet(network(name, attach=False), (0, 1, 2, 3)),
                FeatureHookNet(network(name), (0, 1, 2, 3), no_rewrite=True),
                create_feature_extractor(network(name, attach=False), [f"stages.{i}" for i in range(4)])):
            outputs = extractor.eval()(x)
            outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
            for got, want in zip(outputs, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_grad_cam_explains_it():
    model, x = network("hornet_pico_7x7"), torch.randn(2, 3, 64, 64)
    for layer in (model.stages[2], model.stages[3][-1], model.stages[2][0].norm1):
        with GradCAM(model=model, target_layers=[layer]) as cam:
            heat = cam(input_tensor=x, targets=[ClassifierOutputTarget(1)] * 2)
        assert heat.shape == (2, 64, 64) and np.isfinite(heat).all() and heat.max() > 0


def test_counters_find_the_operations():
    """thop counts norms too, fvcore knows no fft: both stay near ours."""
    model, x = network("hornet_nano_7x7"), torch.randn(1, 3, 64, 64)
    ours = flops(model, 64)
    counted = fvcore.nn.FlopCountAnalysis(network("hornet_nano_7x7"), x).unsupported_ops_warnings(False)
    assert counted.total() == pytest.approx(ours, rel=0.05)
    assert counted.by_module()["stages.2.1.gnconv.dwconv"] > 0
    assert thop.profile(model, (x,), verbose=False)[0] == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("name", PICO)
def test_vmap_and_functional_gradients(name):
    model, x = network(name), torch.randn(3, 2, 3, 32, 32)
    exact = model(x.flatten(0, 1)).unflatten(0, (3, 2))
    torch.testing.assert_close(torch.vmap(model)(x), exact, rtol=1e-4, atol=1e-5)
    parameters = {label: p.detach() for label, p in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().mean()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, 0])
    model(x[:1, 0]).square().mean().backward()
    for label, parameter in model.named_parameters():
        torch.testing.assert_close(per_sample[label][0], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_pruned_it_runs(last):
    model, x = network(), torch.randn(2, 3, 64, 64)
    wanted = model.forward_intermediates(x, indices=[last], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([last]) == [last]
    torch.testing.assert_close(model(x), wanted.mean((2, 3)))
    model.reset_classifier(5)
    assert model.train()(x, torch.rand(2, model.num_drop_draws)).shape == (2, 5) and model.num_features == wanted.shape[1]


def test_keywords_of_timms_and_deits_training_scripts():
    model = timm.create_model("hornet_pico_7x7", pretrained=False, num_classes=7, drop_rate=0.2, drop_path_rate=0.1,
                              drop_block_rate=None, img_size=64, global_pool="avg", output_stride=32)
    assert model.head_drop.p == 0.2 and model.drop_rate == 0.2
    x, draws = torch.randn(2, 3, 64, 96), torch.ones(2, model.num_drop_draws)
    assert not torch.equal(model.train()(x, draws), model(x, draws))
    model = models.hornet.hornet_pico_7x7(drop_block_rate=None, global_pool="")
    assert model(x).shape == (2, 1000, 2, 3)  # without pooling there is an output at each position
    for classes, pool, shape in ((0, "", (2, 64, 2, 3)), (4, "avg", (2, 4)), (0, None, (2, 64))):
        model.reset_classifier(classes, pool)
        assert model(x).shape == shape and model.num_classes == classes
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(4, "max")
