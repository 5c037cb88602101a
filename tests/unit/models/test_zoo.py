"""The rows of models/zoo.py agree with the registry, the recipes, README and the class lists."""
import hashlib
import re

import pytest
import timm
import torch
import yaml
from timm.data import ImageNetInfo

import models
from models.inspect import flops
from models.zoo import MODEL_NAMES, PUBLISHED, VARIANTS, default_classes, synsets
from tests.kits.docs import ROOT


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parameters_flops_and_input_size_are_those_of_the_model(name):
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == variant.params
    assert flops(model, variant.input_size) == pytest.approx(variant.flops, rel=0.005)
    config = timm.get_pretrained_cfg(name)
    assert config.input_size == (3, variant.input_size, variant.input_size)
    assert config.url == (variant.files[0].url if variant.files else "")


def test_names_and_published_files():
    own = {name for name in timm.list_models("hornet*") if timm.model_entrypoint(name).__module__ == "models.hornet"}
    assert own == set(MODEL_NAMES) == set(models.MODEL_NAMES) and list(PUBLISHED) == list(MODEL_NAMES[:10])
    for path in (ROOT / "recipes").glob("hornet_*.yaml"):  # recipes are named after the model that they train
        assert yaml.safe_load(path.read_text())["model"] == re.sub("_(in22k|ft1k_384)$", "", path.stem) + (
            "_img384" if path.stem == "hornet_large_gf_ft1k_384" else "")
    assert [len(row.files) for row in PUBLISHED.values()] == [2] * 6 + [0, 1, 1, 1]
    assert all("openmmlab" in row.files[0].url for row in PUBLISHED.values() if row.top1)
    # As checked against the published lists: a letter that changes here is a dead link or another model.
    lines = "".join(f"{file.name} {file.url} {file.sha256_prefix}\n" for row in PUBLISHED.values() for file in row.files)
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "d57918501dbf7a0a"


def test_class_lists():
    names = synsets(10459)
    assert len(set(names)) == 10459 and set(synsets(1000)) <= set(names)
    assert (names[10450], names[10458]) == ("n02085782", "n04399382")
    assert list(synsets(1000)) == ImageNetInfo("imagenet-1k").label_names()
    assert synsets(10) is None and default_classes(3) == ["0", "1", "2"]


def test_readmes_table_is_made_of_the_rows():
    lines = ["| model | parameters | FLOPs | top-1 | top-5 |", "|---|---|---|---|---|"]
    for name, row in PUBLISHED.items():
        accuracy = " ".join(f"{value:.2f} |" if value else "|" for value in (row.top1, row.top5))
        title, flops = name + (" (22k)" if row.classes == 10459 else ""), row.flops / 1e9
        lines.append(f"| {title} | {row.params:,} | {flops:.{1 if flops > 20 else 2}f} G | {accuracy}")
    assert "\n".join(lines) in (ROOT / "README.md").read_text("utf-8"), "\n".join(lines)
