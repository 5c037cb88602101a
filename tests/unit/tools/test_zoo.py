"""tools.zoo: list, get and convert, on generated files in both namings."""
import shutil
from dataclasses import replace

import pytest
import torch

from common.files import sha256_file
from common.safe_load import safe_torch_load
from models import load, zoo
from models.weights import to_openmmlab
from tests.kits.trained import checkpoint, lively
from tools.zoo import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One set of weights as OpenMMLab's file; a run's, whose moving average scored, with settings of its own."""
    folder, model = tmp_path_factory.mktemp("files"), lively("hornet_pico_7x7", 2, layer_scale_init_value=0)
    torch.save({"state_dict": to_openmmlab(lively(classes=10).state_dict()), "meta": {}}, folder / "openmmlab.pth")
    checkpoint(folder / "run.pth", model, lively("hornet_pico_7x7", 2, 1, layer_scale_init_value=0), scored="model_ema",
               classes=["a", "b"], model="hornet_pico_7x7", input_size=96, crop_pct=1.0,
               imagenet_default_mean_and_std=False, layer_scale_init_value=0.0, lr=0.1)
    return folder


def test_list_shows_every_published_model_and_where_files_are(tmp_path, capsys):
    (tmp_path / zoo.PUBLISHED["hornet_tiny_gf"].files[0].name).write_bytes(b"")
    assert main(["--folder", str(tmp_path), "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(zoo.VARIANTS)
    assert "82.98" in lines[2] and " yes " in lines[2] and " yes " not in lines[1]
    assert "22,409,512" in lines[1] and "none published" in lines[7]


@pytest.mark.parametrize("source", ["openmmlab.pth", "run.pth"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("weights", ["auto", "model"])
def test_a_converted_file_is_the_same_model_on_the_same_images(files, source, suffix, weights, tmp_path):
    """Weights that scored, classes, crop, size, normalisation and the lack of a layer scale go along."""
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.pth"
    assert main(["convert", str(files / source), "--out", str(there), "--weights", weights]) == 0
    assert main(["convert", str(there), "--out", str(back)]) == 0
    before, content = load(files / source, weights=weights), safe_torch_load(back)
    for after in (load(there), load(back)):
        assert (after.name, after.classes, after.settings) == (before.name, before.classes, before.settings)
        for name, value in before.model.state_dict().items():
            assert torch.equal(after.model.state_dict()[name], value) and torch.equal(content["model"][name], value)
    assert "lr" not in content["args"]


def test_get_prints_the_path_of_a_checked_file_or_where_to_put_it(files, tmp_path, monkeypatch, capfd):
    """What a server does is in tests/unit/models/test_download.py; here none listens."""
    monkeypatch.setattr("models.download.time.sleep", lambda seconds: None)
    path, get = tmp_path / "openmmlab.pth", ["--folder", str(tmp_path), "get", "hornet_tiny_7x7"]
    file = zoo.PublishedFile(path.name, "https://127.0.0.1:9/x.pth", sha256_file(files / path.name)[:8])
    monkeypatch.setitem(zoo.VARIANTS, "hornet_tiny_7x7", replace(zoo.VARIANTS["hornet_tiny_7x7"], files=(file,)))
    assert main(get) == 2 and path.name in (said := capfd.readouterr().err) and str(tmp_path) in said
    shutil.copy(files / path.name, path)
    assert main(get) == 0 and capfd.readouterr().out.strip() == str(path)


@pytest.mark.parametrize("argv, named", [
    (["get", "hornet_pico_gf"], "hornet_pico_gf"), (["convert", "FILE", "--out", "x.bin"], ".safetensors"),
    (["convert", "FILE", "--out", "FILE"], "run.pth"), (["convert", "missing.pth", "--out", "x.pth"], "missing.pth"),
])
def test_mistakes_are_one_sentence_and_exit_2(files, argv, named, capfd):
    assert main([str(files / "run.pth") if word == "FILE" else word for word in argv]) == 2
    err = capfd.readouterr().err
    assert named in err and len(err.splitlines()) == 1
