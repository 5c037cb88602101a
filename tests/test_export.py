"""Exported files give what the model gives, at any batch and picture size, without an FFT operator."""
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models  # noqa: F401  (registers the models with timm)
from common.errors import UserError
from datasets.device import Normalise
from datasets.images import decode_path
from datasets.transforms import mean_std
from models.export import MatrixDft, export_onnx, exported_program, onnx_function
from models.gnconv import PLAIN
from tests.kits.fill import PARITY, parity_tensor
from tools.export import check_pictures, compare, main
from tools.loading import load_trained

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def lively(name, classes=10, seed=0):
    """A model whose branches all matter: fresh models have layer scale 1e-6, which hides every mistake."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("height, width", [(1, 1), (1, 2), (2, 3), (7, 7), (14, 14), (8, 5), (13, 24)])
@pytest.mark.parametrize("grid", [(14, 8), (7, 4), (2, 2), (1, 1)])
def test_matrix_products_equal_the_fourier_transform(height, width, grid):
    torch.manual_seed(0)
    x, weight = torch.randn(2, height, width, 6), torch.randn(6, *grid, 2)
    found, wanted = MatrixDft().global_filter(x, weight), PLAIN.global_filter(x, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["hornet_pico_7x7", "hornet_pico_gf"])
def test_onnx_and_torch_files_agree_with_the_model(name, tmp_path):
    model = lively(name)
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
    assert model.ops is PLAIN  # exporting leaves the model as it was
    graph = onnx.load(tmp_path / "m.onnx")
    assert not {n.op_type for n in graph.graph.node} & {"DFT", "STFT", "FFT"}
    assert {n.domain for n in graph.graph.node} == {""} and graph.metadata_props[0].value == name
    assert [d.dim_param != "" for d in graph.graph.input[0].type.tensor_type.shape.dim] == [True, False, True, True]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = lively("hornet_pico_gf", 3)
    path = tmp_path_factory.mktemp("model") / "checkpoint-best.pth"
    torch.save({"format": 2, "model": model.state_dict(), "classes": ["ant", "bee", "猫"],
                "args": {"model": "hornet_pico_gf", "input_size": 64}}, path)
    return path, model


def test_the_command_writes_a_checked_onnx_file_with_its_settings(checkpoint, tmp_path, capfd):
    path, model = checkpoint
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    out = tmp_path / "sub" / "m.onnx"
    argv = ["onnx", "--resume", str(path), "--out", str(out), "--softmax", "--pictures", str(tmp_path / "p.png")]
    assert main(argv) == 0
    assert "largest difference" in capfd.readouterr().err
    about = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert json.loads(about["classes"]) == ["ant", "bee", "猫"] and json.loads(about["mean"]) == [0.485, 0.456, 0.406]
    assert (about["model"], about["input_size"], about["output"]) == ("hornet_pico_gf", "64", "probabilities")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(onnx_function(out)(x), model(x).softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_writes_a_torch_program(checkpoint, tmp_path):
    path, model = checkpoint
    assert main(["torch", "--resume", str(path), "--out", str(tmp_path / "m.pt2")]) == 0
    about = {"classes": "", "model": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=about)
    assert json.loads(about["classes"]) == ["ant", "bee", "猫"]
    x = torch.randn(3, 3, 64, 100)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_file_that_differs_is_refused(checkpoint):
    trained = load_trained(resume=str(checkpoint[0]))
    pictures = check_pictures(trained, [])
    assert compare(trained, trained.model, pictures, softmax=False) == 0.0
    for wrong in (lambda x: trained.model(x) + 2e-4 * x.shape[3], lambda x: trained.model(x) * float("nan")):
        with pytest.raises(UserError, match="is not to be used"):
            compare(trained, wrong, pictures, softmax=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hornet_tiny_7x7", "hornet_tiny_gf"])
def test_published_architectures_in_onnx_runtime_at_two_sizes(name, tmp_path):
    """On the JPEGs of the evaluation set, with the deterministic weights of the parity figures."""
    model = timm.create_model(name, num_classes=1000).eval()
    model.load_state_dict({key: torch.from_numpy(parity_tensor(key, tuple(value.shape)))
                           for key, value in model.state_dict().items()})
    export_onnx(exported_program(model, 224), tmp_path / "m.onnx", {})
    run = onnx_function(tmp_path / "m.onnx")
    paths = sorted((PARITY / "eval_set").rglob("*.JPEG"))[:2]
    for height, width in ((224, 224), (288, 256)):
        pixels = np.stack([np.asarray(decode_path(path).resize((width, height))) for path in paths])
        x = Normalise(*mean_std(True), "cpu")(torch.from_numpy(pixels)).permute(0, 3, 1, 2)
        with torch.no_grad():
            wanted = model(x)
        assert wanted.std() > 1e-3 and (run(x) - wanted).abs().max() < 1e-4
