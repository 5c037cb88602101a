"""Exported files give what the model gives, at any batch and image size, without an FFT operator."""
import pytest
import torch

from models.export import check_exported, export_onnx, exported_program, onnx_function
from tests.kits.errors import refused
from tests.kits.trained import lively

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", ["hornet_pico_7x7", "hornet_pico_gf", pytest.param("hornet_tiny_7x7", marks=pytest.mark.slow),
                                  pytest.param("hornet_tiny_gf", marks=pytest.mark.slow)])
def test_onnx_and_torch_files_agree_with_the_model(name, tmp_path):
    model, sample = lively(name), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(sample)
    program = exported_program(model, 64)
    export_onnx(program, tmp_path / "m.onnx", {"model": name})
    torch.export.save(program, tmp_path / "m.pt2")
    files = [onnx_function(tmp_path / "m.onnx"), torch.export.load(tmp_path / "m.pt2").module()]
    for shape in ((1, 64, 64), (3, 96, 64), (2, 77, 130), (1, 224, 160)):
        x = torch.randn(shape[0], 3, *shape[1:])
        with torch.no_grad():
            wanted = model(x)
        for run in files:
            assert (run(x) - wanted).abs().max() < 1e-4
    with torch.no_grad():
        assert torch.equal(model(sample), before)  # exporting leaves the model as it was
    graph = onnx.load(tmp_path / "m.onnx")
    assert not {n.op_type for n in graph.graph.node} & {"DFT", "STFT", "FFT"}
    assert {n.domain for n in graph.graph.node} == {""} and graph.metadata_props[0].value == name
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
              for value in (graph.graph.input[0], graph.graph.output[0])]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 4]]


def test_a_file_that_differs_is_refused():
    model = lively()
    assert check_exported(model, model, 64, softmax=False) == 0.0
    for other in (lambda x: model(x) + 2e-4 * x.shape[3], lambda x: model(x) * float("nan")):
        with refused("export_differs"):
            check_exported(model, other, 64, softmax=False)
