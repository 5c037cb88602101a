"""Which paths a machine takes, what a run saves of it, and what happens where they are missing."""
import copy
import json
from functools import cache

import pytest
import timm
import torch

import models  # noqa: F401 - registers the models with timm
import native
from models.hornet import Block
from native import kernels, paths, runner

COMPILED = dict(linear="default", kernels="compiled", allocator="default")


@pytest.fixture(autouse=True)
def asked_again(monkeypatch):
    """What a process finds out once is found out again."""
    for place, name in ((paths, "_agrees"), (kernels, "library")):
        monkeypatch.setattr(place, name, cache(getattr(place, name).__wrapped__))


@pytest.fixture
def model():
    return timm.create_model("hornet_pico_7x7")


def runners(model):
    return {module.runner for module in model.modules() if isinstance(module, Block)}


def test_paths_are_plain_data_repeatable_and_those_of_every_block(model):
    chosen = paths.code_paths("cpu")
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    paths._agrees.cache_clear()
    assert json.loads(json.dumps(chosen)) == chosen == paths.use_code_paths(chosen, "cpu")
    assert torch.equal(torch.rand(1), first)  # its self-test draws weights, not from our numbers
    assert paths.use_code_paths({}, "cpu") == paths.PLAIN_PATHS
    assert paths.code_paths("cuda") == paths.use_code_paths(chosen, "cuda") == paths.PLAIN_PATHS
    assert native.attach(model) == chosen
    if chosen["kernels"] == "compiled":
        assert len(runners(model)) == 1 and paths.runner_of(model).compiled
        assert paths.runner_of(copy.deepcopy(model)) is not paths.runner_of(model)
    assert native.attach(model, paths.PLAIN_PATHS) == paths.PLAIN_PATHS and runners(model) == {None}


@pytest.mark.parametrize("compiler", [True, False])
def test_a_path_that_is_incorrect_or_cannot_be_built_is_not_used(monkeypatch, compiler):
    class Incorrect(runner.BlockRunner):
        def layer_norm(self, *args):
            return super().layer_norm(*args) * 1.01

    if compiler:
        monkeypatch.setattr(paths, "BlockRunner", Incorrect)
    else:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
    assert paths.code_paths("cpu")["kernels"] == "plain"


@pytest.mark.parametrize("switched_off", [True, False])
def test_a_resumed_run_says_which_of_its_paths_it_cannot_take(monkeypatch, logged, model, switched_off):
    if switched_off:
        monkeypatch.setenv("HORNET_NATIVE", "0")
        assert native.attach(model) == paths.PLAIN_PATHS
    else:
        monkeypatch.setattr(paths, "_agrees", lambda name: False)
    assert native.attach(model, COMPILED) == paths.PLAIN_PATHS and runners(model) == {None}
    message, = logged.messages
    assert "kernels=compiled" in message and ("HORNET_NATIVE=0" in message) == switched_off
