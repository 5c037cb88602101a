"""Weights come in: both namings, wrappers, EMA, 22k heads, other sizes, and clear refusals."""
import argparse
import json

import pytest
import timm
import torch

import models
from config.options import ImageSettings
from models import weights
from models.weights import load_for_model, select_weights
from models.zoo import synsets
from tests.kits.errors import refused
from tests.kits.fill import PARITY
from tests.kits.trained import filled, lively

STATE_DICTS = json.loads((PARITY / "state_dicts.json").read_text())
STATE = lively(seed=1).state_dict()
ABC = ["cat", "dog", "owl", "eel"]


def saved(tmp_path, content, name="file.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", STATE_DICTS)
def test_namings_convert_both_ways_bit_for_bit(name):
    """On tensors that hold their own number, so that a swapped pair would show."""
    state = {key: torch.full((1,) * len(shape), i).expand(shape) for i, (key, shape) in enumerate(STATE_DICTS[name])}
    there = weights.to_openmmlab(state)
    back = weights.published_names(there)
    assert list(back) == list(state) and all(back[key] is state[key] for key in state)
    assert len(there) == len(state) and not set(there) & set(state) and weights.identify(state) == name
    assert {"backbone.downsample_layers.0.0.weight", "backbone.norm3.weight", "head.fc.bias",
            "backbone.stages.2.17.gamma1.weight", "backbone.stages.0.0.gnconv.projs.0.weight",
            "backbone.stages.0.0.norm1.weight"} <= set(there)


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s}, lambda s: {"module": s}, lambda s: s, lambda s: {"state_dict": weights.to_openmmlab(s)},
    lambda s: {"model": {"module." + k: v for k, v in s.items()}},
    lambda s: {"model": {"encoder.module._orig_mod." + k: v for k, v in s.items()}},
    lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1.0), "scaler": {}},
])
def test_every_kind_of_file_loads_to_the_same_values(tmp_path, wrap):
    model = lively()
    report = load_for_model(model, saved(tmp_path, wrap(STATE)), prefix="encoder.")
    assert same(model, STATE) and report[:3] == (len(STATE), (), ())


@pytest.mark.parametrize("entries, file_name, options, expected", [
    (("model", "model_ema"), "a.pth", {}, "model"),
    (("model", "model_ema"), "a.pth", dict(weights="ema"), "model_ema"),
    (("model", "model_ema"), "checkpoint-best-ema.pth", {}, "model_ema"),
    (("model", "model_ema"), "checkpoint-best-ema.pth", dict(weights="model"), "model"),
    (("model", "model_ema"), "checkpoint-best-ema.pth", dict(model_key="model"), "model"),
    (("model",), "checkpoint-best-ema.pth", {}, "model"),
    (("model", "module"), "a.pth", dict(model_key="module"), "module"),
    (("model_ema",), "a.pth", {}, "model_ema"),
    (("teacher", "model"), "a.pth", dict(model_key="student|teacher"), "teacher"),
])
def test_which_weights_are_taken(entries, file_name, options, expected):
    checkpoint = {key: {"w": torch.zeros(1)} for key in entries} | {"epoch": 1}
    assert select_weights(checkpoint, file_name, **options)[1] == expected
    if not options and len(entries) == 2:  # the file's own word on what scored wins
        for scored in entries:
            assert select_weights({**checkpoint, "scored": scored}, file_name)[1] == scored


@pytest.mark.parametrize("checkpoint, options, code, named", [
    ({"model": STATE}, dict(weights="ema"), "missing_weights", "model_ema"), ({"epoch": 1}, {}, "missing_weights", "epoch"),
    ({"model": STATE}, dict(model_key="net"), "missing_weights", "net"), ([1], {}, "missing_weights", "list"),
    ({}, {}, "missing_weights", "a.pth"), ({}, dict(weights="best"), "invalid_value", "best")])
def test_no_weights_is_one_sentence(checkpoint, options, code, named):
    with refused(code, named):
        select_weights(checkpoint, "a.pth", **options)


@pytest.mark.parametrize("class_names", [None, "1k", "few"])
def test_22k_head_gives_the_rows_of_the_wanted_classes(tmp_path, class_names):
    state = lively(classes=10459).state_dict()
    wanted = list(synsets(1000))[::-40] if class_names == "few" else list(synsets(1000))
    model = lively(classes=len(wanted), seed=1)
    load_for_model(model, saved(tmp_path, {"model": state}), class_names=class_names and wanted)
    rows = [synsets(10459).index(name) for name in wanted]
    assert all(torch.equal(model.state_dict()[name], state[name][rows]) for name in ("head.weight", "head.bias"))


def test_classes_are_matched_by_name_and_another_head_is_an_error_unless_a_new_one_is_wanted(tmp_path):
    path, model = saved(tmp_path, {"model": STATE, "classes": ABC}), lively()
    load_for_model(model, path, class_names=ABC[::-1])
    assert torch.equal(model.head.bias, STATE["head.bias"].flip(0))
    with refused("other_classes", "emu"):
        load_for_model(model, path, class_names=[*ABC[1:], "emu"])
    with refused("other_classes", "--nb_classes 4", "10", "--finetune"):
        load_for_model(lively(classes=10), path)
    for model, names in ((lively(), [*ABC[1:], "emu"]), (lively(classes=10), None)):
        fresh = model.head.weight.clone()
        report = load_for_model(model, path, class_names=names, new_head=True)
        assert report.missing == ("head.weight", "head.bias") and not report.unexpected
        assert torch.equal(model.head.weight, fresh) and torch.equal(model.norm.weight, STATE["norm.weight"])
    assert not load_for_model(lively(classes=0), path).missing
    headless = saved(tmp_path, {"model": {name: value for name, value in STATE.items() if not name.startswith("head.")}})
    with refused("other_classes", "4", "--allow_partial"):
        load_for_model(lively(), headless)
    assert load_for_model(lively(), headless, allow_partial=True).missing == ("head.weight", "head.bias")


def test_filters_are_resized_to_the_models_grid():
    """At 384 the large model then computes what the small one does by resizing on the fly."""
    small, large = (filled("hornet_base_gf" + tail, num_classes=0, depths=(1, 1, 1, 1), width=8) for tail in ("", "_img384"))
    large.load_state_dict(weights.fit_to_model(small.state_dict(), large))
    x = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=1e-5)


def test_another_model_is_named_and_the_limit_is_95_percent_of_tensors(tmp_path, logged):
    state, model, other = lively(classes=0).state_dict(), lively(classes=0), {"conv1.weight": torch.zeros(3)}
    keys = list(state)
    few = len(keys) // 20
    for content, named in ((lively("hornet_nano_7x7").state_dict(), "hornet_nano_7x7"), (other, "loaded 0"),
                           ({key: state[key] for key in keys[few + 1:]}, f"missing {few + 1}")):
        with refused("other_model", named, "--allow_partial true"):
            load_for_model(model, saved(tmp_path, {"model": content}))
    assert load_for_model(model, saved(tmp_path, {"model": other}), allow_partial=True).unexpected == ("conv1.weight",)
    load_for_model(model, saved(tmp_path, {"model": {key: state[key] for key in keys[few:]}}))
    assert f"loaded {len(keys) - few}, missing {few} (downsample_layers.0.0.weight" in logged.text


def test_pretrained_and_load_from_a_folder_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HORNET_CACHE", str(tmp_path))
    state = filled("hornet_tiny_7x7").state_dict()
    saved(tmp_path, {"model": state}, "hornet_tiny_7x7.pth")
    assert same(timm.create_model("hornet_tiny_7x7", pretrained=True, cache_dir=tmp_path), state)
    trained = models.load("hornet_tiny_7x7")
    assert same(trained.model, state) and trained.settings == ImageSettings() and trained.classes[0] == "n01440764"
    own = timm.create_model("hornet_tiny_7x7", pretrained=True, num_classes=5, in_chans=1)
    assert own.head.weight.shape == (5, 512) and own.head.weight.std() < 0.03  # new
    stem = state["downsample_layers.0.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(own.downsample_layers[0][0].weight, stem)
    features = timm.create_model("hornet_tiny_7x7", pretrained=True, features_only=True)
    assert torch.equal(features.model.stages[3][1].gamma2, state["stages.3.1.gamma2"])
