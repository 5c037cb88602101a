"""`--compile`: what is compiled computes the same, without an FFT in the graph, or is not used."""
import functools
from unittest.mock import Mock

import pytest
import timm
import torch

import models  # noqa: F401 - registers the models with timm
from models import compile as compiling
from models import dft
from models.gnconv import GlobalLocalFilter

SHAPE = (4, 3, 64, 64)


def alone(mine: bool) -> bool:
    return mine


def network(name: str = "hornet_pico_gf") -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, drop_path_rate=0.2).train()


@pytest.fixture
def backend(monkeypatch):
    """torch.compile with a backend that runs the captured graphs as they are, and keeps them."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(compiling.torch, "compile", functools.partial(torch.compile, backend=keep))
    return graphs


def test_the_whole_network_is_one_graph_without_an_fft(backend):
    model = network()
    compiled = compiling.compile_model(model, SHAPE, None, alone)
    assert compiled is not model and len(backend) == 1
    assert "fft" not in backend[0].code
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]
    x, draws = torch.randn(SHAPE), torch.rand(4, model.num_drop_draws)
    plain = network()
    torch.testing.assert_close(compiled(x, draws), plain(x, draws), rtol=1e-4, atol=1e-5)
    assert len(backend) == 1  # the training's first batch finds it compiled


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graph_that_computes_something_else_is_not_used(backend, monkeypatch, caplog, dtype):
    model = network()
    correct = dft.matrix_filter
    monkeypatch.setattr(dft, "matrix_filter", lambda x, weight: 1.1 * correct(x, weight))
    assert compiling.compile_model(model, SHAPE, dtype, alone) is model
    assert "--compile is not used" in caplog.text and "differs from eager PyTorch" in caplog.text
    assert all(module.fourier is None for module in model.modules() if isinstance(module, GlobalLocalFilter))


def test_a_compiler_that_fails_is_one_line(monkeypatch, caplog):
    monkeypatch.setattr(compiling.torch, "compile", Mock(side_effect=RuntimeError("no compiler here\nor there\nmore")))
    model = network("hornet_pico_7x7")
    assert compiling.compile_model(model, SHAPE, None, alone) is model
    message, = caplog.messages
    assert "no compiler here" in message and "more" not in message


def test_it_is_used_by_all_processes_or_by_none(backend, caplog):
    model, agree = network("hornet_pico_7x7"), Mock(return_value=False)
    assert compiling.compile_model(model, SHAPE, None, agree) is model
    agree.assert_called_once_with(True)
    assert "another process" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of compiling on an idle core
def test_pytorchs_own_compiler_agrees_with_eager():
    torch.compiler.reset()
    model = network()
    assert compiling.compile_model(model, SHAPE, torch.bfloat16, alone) is not model
