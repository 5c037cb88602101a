"""`--compile`: what is compiled computes the same, without an FFT in the graph, or is not used."""
import copy
import functools
from unittest.mock import Mock

import pytest
import timm
import torch

import main
import models  # noqa: F401 - registers the models with timm
from common.devices import float32_products
from models import compile as compiling
from models import dft
from models.gnconv import GlobalLocalFilter
from optim.finite import diagnose
from tests.kits.runs import arguments

SHAPE = (4, 3, 64, 64)


def compiled(model, shape=SHAPE, dtype=None, agree=lambda mine: mine, **more):
    return compiling.compile_blocks(model, shape, dtype, agree=agree, from_first=lambda chosen: chosen, **more)


def network(name: str = "hornet_pico_gf", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, drop_path_rate=0.2, **kwargs).train()


@pytest.fixture
def backend(monkeypatch):
    """torch.compile with a backend that runs the captured graphs as they are, and keeps them; all count as fast."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(compiling.torch, "compile", functools.partial(torch.compile, backend=keep))
    seconds = compiling._seconds
    monkeypatch.setattr(compiling, "_seconds", lambda block, *more: seconds(block, *more) * (0 if block.runner else 1))
    return graphs


def test_each_kind_of_block_is_one_graph_in_training_and_one_in_evaluation(backend):
    """A stage of two blocks, a smaller last batch: no graph is added after the start, but one of the average, whose
    parameters need no gradient."""
    model = network(depths=(1, 1, 2, 1))
    plain = copy.deepcopy(model)
    assert compiled(model, dtype=torch.bfloat16) == "1 2 3 4"
    assert len(backend) == 4 + 4 + 4  # timed on copies, in training, in evaluation
    assert not any("fft" in graph.code for graph in backend)
    x, draws, average = torch.randn(SHAPE), torch.rand(4, model.num_drop_draws), copy.deepcopy(model).requires_grad_(False)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = model(x, draws), plain(x, draws)
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.01)
        found.square().mean().backward()
        with torch.no_grad(), float32_products():  # as the engine evaluates
            for images in (x, x[:3], x[:2]):
                for network_ in (model, average):
                    torch.testing.assert_close(network_.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
        model.train(), plain.train()
    assert len(backend) == 16
    assert diagnose(model, lambda: model(torch.full(SHAPE, torch.nan)).sum())["first_module"] == "downsample_layers.0.0"
    with torch.no_grad():
        model.stages[1][0].pwconv1.weight.fill_(torch.inf)
    assert diagnose(model, lambda: model(x).sum())["first_module"] == "stages.1.0.pwconv1"  # hooks fire


def test_only_what_is_faster_is_compiled_and_nothing_else_is_touched(monkeypatch, logged):
    times = iter([2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0])  # eager, compiled of each stage
    monkeypatch.setattr(compiling.torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(compiling, "_seconds", lambda *_: next(times))
    model, before = network(), network().state_dict()
    torch.manual_seed(3)
    assert compiled(model) == "1 4" and "stages 1 4" in logged.text
    assert torch.equal(torch.rand(1), torch.manual_seed(3) and torch.rand(1)) and compiled(network(), saved="") == ""
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [stage[0].runner is not None for stage in model.stages] == [True, False, False, True]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graph_that_computes_something_else_is_not_used(backend, monkeypatch, caplog, dtype):
    model = network()
    runner = model.stages[0][0].runner = Mock(return_value=NotImplemented)
    correct = dft.matrix_filter
    monkeypatch.setattr(dft, "matrix_filter", lambda x, weight: 1.1 * correct(x, weight))
    assert compiled(model, dtype=dtype, saved="3") == ""
    assert "--compile is not used" in caplog.text and "differs from eager PyTorch" in caplog.text
    assert all(module.fourier is None for module in model.modules() if isinstance(module, GlobalLocalFilter))
    assert model.stages[0][0].runner is runner and model.stages[1][0].runner is None and model.training


def test_a_compiler_that_fails_is_one_line_and_it_is_used_by_all_processes_or_by_none(monkeypatch, caplog):
    model, agree = network("hornet_pico_7x7"), Mock(return_value=False)
    broken = Mock(side_effect=RuntimeError("no compiler here\nor there\nmore"))
    for call, mine, words in ((lambda compute, **_: compute, True, "another process"), (broken, False, "no compiler here")):
        monkeypatch.setattr(compiling.torch, "compile", call)
        assert compiled(model, agree=agree, saved="1 2 3 4") == "" and model.stages[0][0].runner is None
        agree.assert_called_with(mine)
        assert words in caplog.messages[-1] and "more" not in caplog.text


def test_a_run_keeps_its_choice_when_it_is_resumed(images, tmp_path, monkeypatch):
    """With a compiler that changes nothing, which is asked for the times of four stages only once."""
    times = iter([2.0, 1.0] + 3 * [1.0, 2.0])
    monkeypatch.setattr(compiling.torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(compiling, "_seconds", lambda *_: next(times))
    for epochs in (1, 2):
        assert main.main(arguments(images, tmp_path, compile="true", epochs=epochs, warmup_epochs=0)) == 0
        state = torch.load(tmp_path / f"checkpoint-{epochs - 1}.pth", weights_only=True)
        assert state["code_paths"]["compiled"] == "1"


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of compiling on an idle core
def test_pytorchs_own_compiler_agrees_with_eager(caplog):
    torch.compiler.reset()
    compiled(network(), dtype=torch.bfloat16, saved="1 2 3 4")
    assert "not used" not in caplog.text
