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
    assert paths.use_code_paths(chosen, "cpu") == chosen
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


def test_attaching_draws_no_random_numbers():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    paths.code_paths("cpu")  # runs its self-test on blocks of random weights
    assert torch.equal(torch.rand(1), first)


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


def test_switched_off_nothing_is_attached_and_a_run_begun_with_it_is_told(monkeypatch, caplog):
    monkeypatch.setenv("HORNET_NATIVE", "0")
    model = timm.create_model("hornet_pico_7x7")
    assert native.attach(model) == paths.PLAIN_PATHS and all(block.runner is None for block in blocks(model))
    with caplog.at_level("WARNING", "hornet"):
        assert native.attach(model, COMPILED) == paths.PLAIN_PATHS
    assert [("kernels=compiled" in text, "HORNET_NATIVE=0" in text) for text in caplog.messages] == [(True, True)]


def test_a_resumed_run_says_which_of_its_paths_the_machine_lacks(monkeypatch, caplog):
    monkeypatch.setattr(paths, "_agrees", lambda name: False)
    with caplog.at_level("WARNING", "hornet"):
        assert paths.use_code_paths(COMPILED, "cpu")["kernels"] == "plain"
    monkeypatch.undo()  # before the fixture forgets what the real one found
    assert len(caplog.messages) == 1 and "kernels=compiled" in caplog.messages[0]
