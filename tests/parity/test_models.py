"""The models equal the published ones: names, shapes, order, parameters, FLOPs, logits and features."""
import json

import numpy as np
import pytest
import timm
import torch

import models
from models.hornet import CONFIGS
from models.inspect import complexity
from models.zoo import PUBLISHED, VARIANTS
from tests.kits.fill import PARITY, parity_input, parity_tensor

STATE_DICTS = json.loads((PARITY / "state_dicts.json").read_text())
PARAMETERS = {
    "hornet_tiny_7x7": 22_409_512, "hornet_tiny_gf": 22_991_848, "hornet_small_7x7": 49_528_264,
    "hornet_small_gf": 50_401_768, "hornet_base_7x7": 87_256_680, "hornet_base_gf": 88_421_352,
    "hornet_base_gf_img384": 92_099_560, "hornet_large_7x7": 194_542_504, "hornet_large_gf": 196_289_512,
    "hornet_large_gf_img384": 201_806_824}
GFLOPS = {
    "hornet_tiny_7x7": 3.976, "hornet_tiny_gf": 3.896, "hornet_small_7x7": 8.826, "hornet_small_gf": 8.706,
    "hornet_base_7x7": 15.583, "hornet_base_gf": 15.423, "hornet_large_7x7": 34.8, "hornet_large_gf": 34.7,
    "hornet_large_gf_img384": 101.8}


def on_meta(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def filled(name: str, **kwargs):
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict({key: torch.from_numpy(parity_tensor(key, tuple(value.shape)))
                           for key, value in model.state_dict().items()})
    return model


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_names_shapes_and_order(name):
    found = [[key, list(value.shape)] for key, value in on_meta(name).state_dict().items()]
    assert found == STATE_DICTS[name]


def test_every_published_architecture_is_there():
    assert set(STATE_DICTS) == set(PARAMETERS) == set(PUBLISHED)
    assert list(models.MODEL_NAMES[:10]) == list(PUBLISHED)
    assert set(models.MODEL_NAMES) <= set(timm.list_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_flops(name):
    size = complexity(on_meta(name), VARIANTS[name].input_size)
    assert size.params == PARAMETERS[name] == PUBLISHED[name].params
    if name in GFLOPS:
        assert size.flops == pytest.approx(GFLOPS[name] * 1e9, rel=0.005)
        assert PUBLISHED[name].flops == pytest.approx(GFLOPS[name] * 1e9, rel=1e-12)


def test_parameters_with_the_22k_head():
    millions = {name: complexity(on_meta(name, num_classes=10459), 224).params / 1e6
                for name in ("hornet_large_7x7", "hornet_large_gf", "hornet_large_gf_img384")}
    assert {name: round(value) for name, value in millions.items()} == {
        "hornet_large_7x7": 209, "hornet_large_gf": 211, "hornet_large_gf_img384": 216}


@pytest.mark.parametrize("stored", [
    "hornet_tiny_7x7_192x256", "hornet_tiny_7x7_224x224", "hornet_tiny_gf_224x224", "hornet_tiny_gf_288x288",
    pytest.param("hornet_base_gf_img384_384x384", marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_logits_and_features(stored, memory_format):
    name, size = stored.rsplit("_", 1)
    height, width = map(int, size.split("x"))
    expected = np.load(PARITY / "logits" / f"{stored}.npz")
    images = torch.from_numpy(parity_input(2, height, width)).contiguous(memory_format=memory_format)
    model = filled(name)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model(images)
    # An exact formulation is 50 times closer than the tolerance that the data was stored for.
    assert np.abs(features.numpy() - expected["features"]).max() < 1e-4
    assert np.abs(logits.numpy() - expected["logits"]).max() < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["hornet_tiny_7x7", "hornet_tiny_gf"])
def test_logits_on_a_gpu_in_true_float32_and_finite_in_half_precision(name):
    expected = np.load(PARITY / "logits" / f"{name}_224x224.npz")["logits"]
    model, images = filled(name).cuda(), torch.from_numpy(parity_input(2, 224, 224)).cuda()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.no_grad():
            assert np.abs(model(images).cpu().numpy() - expected).max() < 1e-4
            for dtype, limit in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
                with torch.autocast("cuda", dtype):
                    assert np.abs(model(images).float().cpu().numpy() - expected).max() < limit * np.abs(expected).max()
            assert model.half()(images.half()).isfinite().all()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def test_a_wrong_scale_would_be_noticed():
    expected = np.load(PARITY / "logits" / "hornet_tiny_7x7_224x224.npz")
    model = filled("hornet_tiny_7x7", scale=1 / 3 + 0.001)
    with torch.no_grad():
        logits = model(torch.from_numpy(parity_input(2, 224, 224)))
    assert np.abs(logits.numpy() - expected["logits"]).max() > 1e-4


def test_small_models_have_the_published_structure():
    tiny, pico = STATE_DICTS["hornet_tiny_gf"], on_meta("hornet_pico_gf", num_classes=1000).state_dict()
    assert CONFIGS["hornet_pico_gf"].orders == CONFIGS["hornet_tiny_gf"].orders
    first_blocks = [key for key, _ in tiny if not key.startswith("stages.") or key.split(".")[2] == "0"]
    assert list(pico) == first_blocks
