"""The models equal the published ones: names, shapes, order, logits and features."""
import json
import math

import numpy as np
import pytest
import timm
import torch

from models.zoo import PUBLISHED
from tests.kits.fill import PARITY, parity_input
from tests.kits.trained import filled

STATE_DICTS = json.loads((PARITY / "state_dicts.json").read_text())


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_names_shapes_and_order(name):
    with torch.device("meta"):
        found = [[key, list(value.shape)] for key, value in timm.create_model(name).state_dict().items()]
    assert found == STATE_DICTS[name]
    assert sum(math.prod(shape) for _, shape in found) == PUBLISHED[name].params


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
