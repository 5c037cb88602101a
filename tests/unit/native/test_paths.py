"""Which paths a machine takes, what a run saves of it, and what happens where they are missing."""
import copy
import json

import pytest
import timm
import torch

import models  # noqa: F401 - registers the models with timm
import native
from models.hornet import Block
from native import kernels, paths, runner

COMPILED = dict(linear="default", kernels="compiled", allocator="default")


@pytest.fixture(autouse=True)
def asked_again():
    """What a process finds out once, forgotten before and after."""
    for cached in (paths._agrees, kernels.library):
        cached.cache_clear()
    yield
    for cached in (paths._agrees, kernels.library):
        cached.cache_clear()


def blocks(model):
    return [module for module in model.modules() if isinstance(module, Block)]


def test_paths_are_plain_data_and_repeatable():
    chosen = paths.code_paths("cpu")
    assert json.loads(json.dumps(chosen)) == chosen == paths.code_paths("cpu")
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    paths._agrees.cache_clear()
    assert paths.use_code_paths(chosen, "cpu") == chosen  # its self-test draws weights, not from our numbers
    assert torch.equal(torch.rand(1), first)
    assert paths.use_code_paths({}, "cpu") == paths.PLAIN_PATHS
    assert paths.code_paths("cuda") == paths.use_code_paths(chosen, "cuda") == paths.PLAIN_PATHS


def test_attach_gives_every_block_the_paths_of_the_run():
    model = timm.create_model("hornet_pico_7x7")
    chosen = native.attach(model)
    assert chosen == paths.code_paths("cpu")
    if chosen["kernels"] == "compiled":
        assert len({id(block.runner) for block in blocks(model)}) == 1 and blocks(model)[0].runner.compiled
        average = copy.deepcopy(model)
        assert paths.runner_of(average) is not paths.runner_of(model)
    assert native.attach(model, paths.PLAIN_PATHS) == paths.PLAIN_PATHS
    assert all(block.runner is None for block in blocks(model))


def test_a_path_that_is_wrong_is_not_used(monkeypatch):
    class Wrong(runner.BlockRunner):
        def layer_norm(self, *args):
            return super().layer_norm(*args) * 1.01

    monkeypatch.setattr(paths, "BlockRunner", Wrong)
    assert paths.code_paths("cpu")["kernels"] == "plain"


def test_without_a_compiler_everything_stays_plain(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert paths.code_paths("cpu")["kernels"] == "plain"


@pytest.mark.parametrize("switched_off", [True, False])
def test_a_resumed_run_says_which_of_its_paths_it_cannot_take(monkeypatch, caplog, switched_off):
    model = timm.create_model("hornet_pico_7x7")
    with monkeypatch.context() as changes:  # ends before the fixture forgets what the real one found
        if switched_off:
            changes.setenv("HORNET_NATIVE", "0")
            assert native.attach(model) == paths.PLAIN_PATHS
        else:
            changes.setattr(paths, "_agrees", lambda name: False)
        with caplog.at_level("WARNING", "hornet"):
            assert native.attach(model, COMPILED) == paths.PLAIN_PATHS
    assert all(block.runner is None for block in blocks(model))
    message, = caplog.messages
    assert "kernels=compiled" in message and ("HORNET_NATIVE=0" in message) == switched_off
