"""Weights come in: both namings, wrappers, EMA, 22k heads, other sizes, and clear refusals."""
import argparse
import json
import logging

import pytest
import timm
import torch

import models
from config.options import ImageSettings
from models.weights import (
    fit_to_model,
    identify,
    load_for_model,
    published_names,
    select_weights,
    to_openmmlab,
)
from models.zoo import synsets
from tests.kits.errors import refused
from tests.kits.fill import PARITY, parity_tensor

STATE_DICTS = json.loads((PARITY / "state_dicts.json").read_text())


def make(name="hornet_pico_gf", num_classes=10, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def weights_of(model, seed=0):
    return {key: torch.from_numpy(parity_tensor(key, tuple(value.shape), seed))
            for key, value in model.state_dict().items()}


def saved(tmp_path, content, name="file.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", STATE_DICTS)
def test_namings_convert_both_ways_bit_for_bit(name):
    """On tensors that hold their own number, so that a swapped pair would show."""
    state = {key: torch.full((1,) * len(shape), i).expand(shape) for i, (key, shape) in enumerate(STATE_DICTS[name])}
    there = to_openmmlab(state)
    back = published_names(there)
    assert list(back) == list(state) and all(back[key] is state[key] for key in state)
    assert len(there) == len(state) and not set(there) & set(state)
    assert identify({key: torch.empty(shape, device="meta") for key, shape in STATE_DICTS[name]}) == name
    assert {"backbone.downsample_layers.0.0.weight", "backbone.norm3.weight", "head.fc.bias",
            "backbone.stages.2.17.gamma1.weight", "backbone.stages.0.0.gnconv.projs.0.weight",
            "backbone.stages.0.0.norm1.weight"} <= set(there)


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s}, lambda s: {"module": s}, lambda s: s, lambda s: {"state_dict": to_openmmlab(s)},
    lambda s: {"model": {"module." + k: v for k, v in s.items()}},
    lambda s: {"model": {"encoder.module._orig_mod." + k: v for k, v in s.items()}},
    lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1.0), "scaler": {}},
])
def test_every_kind_of_file_loads_to_the_same_values(tmp_path, wrap):
    state = weights_of(make())
    model = make(seed=1)
    report = load_for_model(model, saved(tmp_path, wrap(state)), prefix="encoder.")
    assert same(model, state)
    assert (report.loaded, report.missing, report.unexpected) == (len(state), (), ())


@pytest.mark.parametrize("entries,file_name,options,expected", [
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


@pytest.mark.parametrize("checkpoint,options,named", [
    ({"model": {"w": torch.zeros(1)}}, dict(weights="ema"), "model_ema"), ({"epoch": 1}, {}, "epoch"),
    ({"model": {"w": torch.zeros(1)}}, dict(model_key="net"), "net"), ([1], {}, "list"), ({}, {}, "a.pth"),
])
def test_no_weights_is_one_sentence(checkpoint, options, named):
    with refused("missing_weights", named):
        select_weights(checkpoint, "a.pth", **options)
    with refused("invalid_value", "best"):
        select_weights({}, "a.pth", weights="best")


@pytest.mark.parametrize("class_names", [None, "1k", "few"])
def test_22k_head_gives_the_rows_of_the_wanted_classes(tmp_path, class_names):
    source = make(num_classes=10459)
    state = weights_of(source)
    wanted = list(synsets(1000))[::-40] if class_names == "few" else list(synsets(1000))
    model = make(num_classes=len(wanted), seed=1)
    load_for_model(model, saved(tmp_path, {"model": state}), class_names=class_names and wanted)
    rows = [synsets(10459).index(name) for name in wanted]
    assert torch.equal(model.head.weight, state["head.weight"][rows])
    assert torch.equal(model.head.bias, state["head.bias"][rows])


def test_classes_are_matched_by_name(tmp_path):
    state = weights_of(make(num_classes=3))
    path = saved(tmp_path, {"model": state, "classes": ["cat", "dog", "owl"]})
    model = make(num_classes=3, seed=1)
    load_for_model(model, path, class_names=["owl", "cat", "dog"])
    assert torch.equal(model.head.bias, state["head.bias"][[2, 0, 1]])
    with refused("other_classes", "eel"):
        load_for_model(model, path, class_names=["cat", "dog", "eel"])
    fresh = make(num_classes=3, seed=1).head.weight
    model = make(num_classes=3, seed=1)
    load_for_model(model, path, class_names=["cat", "dog", "eel"], new_head=True)
    assert torch.equal(model.head.weight, fresh) and torch.equal(model.norm.weight, state["norm.weight"])


def test_another_head_is_an_error_unless_a_new_one_is_wanted(tmp_path):
    path = saved(tmp_path, {"model": weights_of(make(num_classes=7))})
    with refused("other_classes", "--nb_classes 7", "10", "--finetune"):
        load_for_model(make(), path)
    report = load_for_model(make(), path, new_head=True)
    assert report.missing == ("head.weight", "head.bias") and not report.unexpected
    assert not load_for_model(make(num_classes=0), path).missing
    headless = {name: value for name, value in weights_of(make()).items() if not name.startswith("head.")}
    with refused("other_classes", "10", "--allow_partial"):
        load_for_model(make(), saved(tmp_path, {"model": headless}))
    assert load_for_model(make(), path, allow_partial=True).missing == ("head.weight", "head.bias")


def test_filters_are_resized_to_the_models_grid():
    small, large = (timm.create_model("hornet_base_gf" + tail, num_classes=0, depths=(1, 1, 1, 1), width=8)
                    for tail in ("", "_img384"))
    state = weights_of(small)
    fitted = fit_to_model(state, large)
    key = "stages.2.0.gnconv.dwconv.complex_weight"
    assert fitted[key].shape[1:] == (24, 13, 2) and state[key].shape[1:] == (14, 8, 2)
    for corner in ((0, 0), (-1, 0), (0, -1), (-1, -1)):
        torch.testing.assert_close(fitted[key][:, *corner], state[key][:, *corner])
    # at 384 the large model then computes what the small one does by resizing on the fly
    small.load_state_dict(state), large.load_state_dict({k: v for k, v in fitted.items() if "head" not in k})
    x = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        torch.testing.assert_close(large.eval()(x), small.eval()(x), atol=1e-5, rtol=1e-5)


def test_another_model_is_named_and_the_limit_is_95_percent_of_tensors(tmp_path, caplog):
    state, model = weights_of(make(num_classes=0)), make(num_classes=0)
    keys, other = list(state), {"conv1.weight": torch.zeros(3)}
    few = len(keys) // 20
    for content, named in ((weights_of(make("hornet_nano_7x7")), "hornet_nano_7x7"), (other, "loaded 0"),
                           ({key: state[key] for key in keys[few + 1:]}, f"missing {few + 1}")):
        with refused("other_model", named, "--allow_partial true"):
            load_for_model(model, saved(tmp_path, {"model": content}))
    assert load_for_model(model, saved(tmp_path, {"model": other}), allow_partial=True).unexpected == ("conv1.weight",)
    with caplog.at_level(logging.INFO, logger="hornet"):
        report = load_for_model(model, saved(tmp_path, {"model": {key: state[key] for key in keys[few:]}}))
    assert len(report.missing) == few
    assert f"loaded {len(keys) - few}, missing {few} (downsample_layers.0.0.weight" in caplog.text


def test_pretrained_and_load_from_a_folder_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    reference = make("hornet_tiny_7x7", num_classes=1000)
    state = weights_of(reference)
    saved(tmp_path, {"model": state}, "hornet_tiny_7x7.pth")
    assert same(timm.create_model("hornet_tiny_7x7", pretrained=True, cache_dir=tmp_path), state)
    monkeypatch.setenv("HORNET_CACHE", str(tmp_path))
    trained = models.load("hornet_tiny_7x7")
    assert same(trained.model, state) and trained.settings == ImageSettings() and trained.classes[0] == "n01440764"
    own = timm.create_model("hornet_tiny_7x7", pretrained=True, num_classes=5, in_chans=1)
    assert own.head.weight.shape == (5, 512) and own.head.weight.std() < 0.03  # new
    torch.testing.assert_close(own.downsample_layers[0][0].weight,
                               state["downsample_layers.0.0.weight"].sum(1, keepdim=True))
    features = timm.create_model("hornet_tiny_7x7", pretrained=True, features_only=True)
    assert torch.equal(features.model.stages[3][1].gamma2, state["stages.3.1.gamma2"])
