"""A program for any batch and image size that gives what the model gives; files are tested with tools/export.py."""
import pytest
import torch

from models.export import check_exported, exported_program
from tests.kits.errors import refused
from tests.kits.trained import lively


@pytest.mark.parametrize("name", ["hornet_pico_gf", pytest.param("hornet_tiny_7x7", marks=pytest.mark.slow)])
def test_a_program_agrees_with_the_model_at_any_size_and_leaves_it_as_it_was(name):
    model = lively(name)
    with torch.no_grad():
        samples = [torch.randn(shape) for shape in ((1, 3, 64, 64), (3, 3, 96, 64), (2, 3, 77, 130), (1, 3, 224, 160))]
        wanted, program = [model(x) for x in samples], exported_program(model, 64)
        for x, exact in zip(samples, wanted):
            assert torch.equal(model(x), exact)
            torch.testing.assert_close(program.module()(x), exact, rtol=0, atol=1e-4)
    assert "fft" not in str(program.graph)


def test_a_file_that_differs_is_refused():
    model = lively()
    assert check_exported(model, model, 64) == 0.0
    for other in (lambda x: model(x) + 2e-4 * x.shape[3], lambda x: model(x) * float("nan")):
        with refused("export_differs"):
            check_exported(model, other, 64)
