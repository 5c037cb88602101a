"""The command writes a checked file with its settings; what it computes is tested with models/export.py."""
import json

import pytest
import torch

from models.export import onnx_function
from tests.kits.trained import checkpoint, lively
from tools.export import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model, path = lively(classes=3), tmp_path_factory.mktemp("run") / "checkpoint-best.pth"
    return checkpoint(path, model, classes=["ant", "bee", "猫"], model="hornet_pico_gf", input_size=48), model


def test_onnx(file, tmp_path, capfd):
    path, model = file
    out = tmp_path / "sub" / "m.onnx"
    assert main(["onnx", "--resume", str(path), "--out", str(out), "--softmax"]) == 0
    assert "largest difference" in capfd.readouterr().err
    about = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert json.loads(about["classes"]) == ["ant", "bee", "猫"] and json.loads(about["mean"]) == [0.485, 0.456, 0.406]
    assert [about[key] for key in ("model", "input_size", "output", "crop_pct", "interpolation")] == [
        "hornet_pico_gf", "64", "probabilities", "0.875", "bicubic"]  # 48 pixels are enlarged to the smallest side
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(onnx_function(out)(x), model(x).softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_torch_program(file, tmp_path):
    path, model = file
    assert main(["torch", "--resume", str(path), "--out", str(tmp_path / "m.pt2")]) == 0
    about = {"classes": "", "model": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=about)
    assert json.loads(about["classes"]) == ["ant", "bee", "猫"]
    x = torch.randn(3, 3, 64, 100)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
