"""The command writes a checked file with its settings; what it computes is tested with models/export.py."""
import json

import pytest
import torch

from models.export import onnx_function
from tests.kits.trained import checkpoint, lively
from tools.export import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ABOUT = {"model": "hornet_pico_gf", "input_size": "64", "output": "probabilities", "crop_pct": "0.875", "interpolation": "bicubic",
         "classes": '["ant", "bee", "\\u732b"]', "mean": "[0.485, 0.456, 0.406]"}


@pytest.mark.parametrize("kind", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_file_with_its_settings(kind, tmp_path, capfd):
    model, out = lively(classes=3), tmp_path / "sub" / "file"
    run = checkpoint(tmp_path / "a.pth", model, classes=["ant", "bee", "猫"], model="hornet_pico_gf", input_size=48)
    assert main([kind, "--resume", str(run), "--out", str(out), "--softmax"]) == 0
    assert "largest difference" in capfd.readouterr().err
    about = dict.fromkeys(ABOUT, "")
    if kind == "onnx":
        about, program = {p.key: p.value for p in onnx.load(out).metadata_props}, onnx_function(out)
    else:
        program = torch.export.load(out, extra_files=about).module()
    assert ABOUT.items() <= about.items()  # 48 pixels are enlarged to the smallest side
    assert json.loads(about["classes"]) == ["ant", "bee", "猫"]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x).softmax(-1), rtol=1e-4, atol=1e-5)
