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
    """One set of weights as the authors', OpenMMLab's and a training run's file."""
    folder, model = tmp_path_factory.mktemp("files"), lively(classes=10)
    state = model.state_dict()
    torch.save({"model": state}, folder / "authors.pth")
    torch.save({"state_dict": to_openmmlab(state), "meta": {"epoch": 300}}, folder / "openmmlab.pth")
    checkpoint(folder / "run.pth", model, lively(classes=10, seed=1), scored="model_ema", classes=list("abcdefghij"))
    return folder, state


def same(found, wanted):
    return set(found) == set(wanted) and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_list_shows_every_published_model_and_where_files_are(tmp_path, capsys):
    (tmp_path / zoo.PUBLISHED["hornet_tiny_gf"].files[0].name).write_bytes(b"")
    assert main(["--folder", str(tmp_path), "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(zoo.VARIANTS)
    assert "82.98" in lines[2] and " yes " in lines[2] and " yes " not in lines[1]
    assert "22,409,512" in lines[1] and "none published" in lines[7]


@pytest.mark.parametrize("source", ["authors.pth", "openmmlab.pth"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_namings_convert_both_ways_bit_for_bit(files, source, suffix, tmp_path):
    folder, state = files
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.pth"
    assert main(["convert", str(folder / source), "--out", str(there), "--names", "openmmlab"]) == 0
    names = safe_torch_load(there)
    assert set(names.get("state_dict") or names["model"]) == set(to_openmmlab(state))
    assert main(["convert", str(there), "--out", str(back)]) == 0
    assert same(safe_torch_load(back)["model"], state) and same(load(there).model.state_dict(), state)


def test_the_weights_that_scored_are_converted_with_their_class_names(files, tmp_path):
    folder, state = files
    for suffix in (".pth", ".safetensors"):
        assert main(["convert", str(folder / "run.pth"), "--out", str(tmp_path / f"best{suffix}")]) == 0
        found = load(tmp_path / f"best{suffix}")
        assert found.classes == list("abcdefghij")
        assert same(found.model.state_dict(), load(folder / "run.pth", weights="ema").model.state_dict())
    assert main(["convert", str(folder / "run.pth"), "--out", str(tmp_path / "raw.pth"), "--weights", "model"]) == 0
    assert same(safe_torch_load(tmp_path / "raw.pth")["model"], state)


@pytest.mark.parametrize("names", ["authors", "openmmlab"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_converted_run_sees_the_same_images(names, suffix, tmp_path):
    """The crop, the size, the normalisation and the lack of a layer scale are the run's, not the defaults."""
    run = checkpoint(tmp_path / "run.pth", lively("hornet_pico_7x7", 2, layer_scale_init_value=0), classes=["a", "b"],
                     model="hornet_pico_7x7", input_size=96, crop_pct=1.0, imagenet_default_mean_and_std=False,
                     layer_scale_init_value=0.0, lr=0.1)
    out = tmp_path / f"converted{suffix}"
    assert main(["convert", str(run), "--out", str(out), "--names", names]) == 0
    before, after = load(run), load(out)
    assert (after.name, after.classes, after.settings) == (before.name, before.classes, before.settings)
    assert after.settings.crop_pct == 1.0 and same(after.model.state_dict(), before.model.state_dict())
    assert "lr" not in safe_torch_load(out)["args"]


def test_get_prints_the_path_of_a_checked_file_or_where_to_put_it(files, tmp_path, monkeypatch, capfd):
    """What a server does is in tests/unit/models/test_download.py; here none listens."""
    monkeypatch.setattr("models.download.time.sleep", lambda seconds: None)
    path, get = tmp_path / "openmmlab.pth", ["--folder", str(tmp_path), "get", "hornet_tiny_7x7"]
    file = zoo.PublishedFile(path.name, "https://127.0.0.1:9/x.pth", sha256_file(files[0] / path.name)[:8])
    monkeypatch.setitem(zoo.VARIANTS, "hornet_tiny_7x7", replace(zoo.VARIANTS["hornet_tiny_7x7"], files=(file,)))
    assert main(get) == 2 and str(path) in capfd.readouterr().err
    shutil.copy(files[0] / path.name, path)
    assert main(get) == 0 and capfd.readouterr().out.strip() == str(path)


@pytest.mark.parametrize("argv, named", [
    (["get", "hornet_pico_gf"], "hornet_pico_gf"), (["convert", "FILE", "--out", "x.bin"], ".safetensors"),
    (["convert", "FILE", "--out", "FILE"], "authors.pth"), (["convert", "missing.pth", "--out", "x.pth"], "missing.pth"),
])
def test_mistakes_are_one_sentence_and_exit_2(files, argv, named, capfd):
    assert main([str(files[0] / "authors.pth") if word == "FILE" else word for word in argv]) == 2
    err = capfd.readouterr().err
    assert named in err and len(err.splitlines()) == 1
