"""The command writes a checked file with its settings, for any batch and image size, without an FFT operator."""
import json

import pytest
import torch

from models.export import onnx_function
from tests.kits.trained import checkpoint, lively
from tools.export import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ABOUT = {"input_size": "64", "output": "logits", "crop_pct": "0.875", "interpolation": "bicubic",
         "classes": '["ant", "bee", "\\u732b"]', "mean": "[0.485, 0.456, 0.406]"}


def onnx_about(out):
    """Metadata of an ONNX file, whose operators and dimensions are looked at."""
    stored = onnx.load(out)
    assert {node.domain for node in stored.graph.node} == {""}
    assert not {node.op_type for node in stored.graph.node} & {"DFT", "STFT", "FFT"}
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
              for value in (stored.graph.input[0], stored.graph.output[0])]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 3]]
    return {entry.key: entry.value for entry in stored.metadata_props}


@pytest.mark.parametrize("kind, name", [("onnx", "hornet_pico_gf"), *(
    pytest.param(kind, name, marks=pytest.mark.slow) for kind, name in (
        ("torch", "hornet_pico_gf"), ("onnx", "hornet_pico_7x7"), ("onnx", "hornet_tiny_gf")))])
def test_a_file_with_its_settings(kind, name, tmp_path, capfd):
    model, out = lively(name, classes=3), tmp_path / "sub" / "file"
    run = checkpoint(tmp_path / "a.pth", model, classes=["ant", "bee", "猫"], model=name, input_size=48)
    assert main([kind, "--resume", str(run), "--out", str(out)]) == 0
    assert "largest difference" in capfd.readouterr().err
    about = dict.fromkeys([*ABOUT, "model"], "")
    if kind == "onnx":
        about, program = onnx_about(out), onnx_function(out)
    else:
        program = torch.export.load(out, extra_files=about).module()
    assert {**ABOUT, "model": name}.items() <= about.items()  # 48 pixels are enlarged to the smallest side
    assert json.loads(about["classes"]) == ["ant", "bee", "猫"]
    for shape in ((2, 3, 64, 64), (1, 3, 77, 130)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-4)
