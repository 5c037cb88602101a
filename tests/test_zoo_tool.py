"""tools.zoo: list, get, verify and convert, on generated files in both namings and a server on this machine."""
import functools
import http.server
import threading
from dataclasses import replace

import pytest
import timm
import torch

import models  # noqa: F401  (registers the models with timm)
from common.files import sha256_file
from common.safe_load import safe_torch_load
from models import MODEL_NAMES, zoo
from models.weights import to_openmmlab
from tools.loading import load_trained
from tools.zoo import main

TEN = MODEL_NAMES[:10]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One set of weights as the authors', OpenMMLab's and a training run's file."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    state = timm.create_model("hornet_pico_gf", num_classes=10).state_dict()
    torch.save({"model": state}, folder / "authors.pth")
    torch.save({"state_dict": to_openmmlab(state), "meta": {"epoch": 300}}, folder / "openmmlab.pth")
    ema = {name: value + 1 for name, value in state.items()}
    run = {"model": state, "model_ema": ema, "scored": "model_ema", "classes": list("abcdefghij")}
    torch.save(run, folder / "run.pth")
    return folder, state


def equal(found, wanted):
    return list(found) == list(wanted) and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_list_shows_every_published_model_and_where_files_lie(tmp_path, capsys):
    (tmp_path / zoo.PUBLISHED["hornet_tiny_gf"].openmmlab_file).write_bytes(b"")
    assert main(["--folder", str(tmp_path), "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:11]] == list(TEN)
    assert "82.98" in lines[2] and lines[2].endswith("yes") and lines[1].endswith("-")
    assert "22,409,512" in lines[1] and "none published" in lines[7]


@pytest.mark.parametrize("source", ["authors.pth", "openmmlab.pth"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_namings_convert_both_ways_bit_for_bit(files, source, suffix, tmp_path):
    folder, state = files
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.pth"
    assert main(["convert", str(folder / source), "--out", str(there), "--names", "openmmlab"]) == 0
    names = safe_torch_load(there)
    assert set(names.get("state_dict", names)) == set(to_openmmlab(state))
    assert main(["convert", str(there), "--out", str(back)]) == 0
    found = safe_torch_load(back)["model"]
    assert set(found) == set(state) and all(torch.equal(found[k], state[k]) for k in state)


def test_all_kinds_of_files_give_the_same_answers(files, tmp_path):
    folder, _ = files
    main(["convert", str(folder / "openmmlab.pth"), "--out", str(tmp_path / "c.safetensors")])
    x = torch.randn(2, 3, 64, 64)
    answers = [load_trained("hornet_pico_gf", str(path)).model(x)
               for path in (folder / "authors.pth", folder / "openmmlab.pth", tmp_path / "c.safetensors")]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_the_weights_that_scored_are_converted_with_their_class_names(files, tmp_path):
    folder, state = files
    assert main(["convert", str(folder / "run.pth"), "--out", str(tmp_path / "best.pth")]) == 0
    found = safe_torch_load(tmp_path / "best.pth")
    assert found["classes"] == list("abcdefghij")
    assert equal(found["model"], {name: value + 1 for name, value in state.items()})
    main(["convert", str(folder / "run.pth"), "--out", str(tmp_path / "best.safetensors")])
    assert load_trained(None, str(tmp_path / "best.safetensors")).classes == list("abcdefghij")
    main(["convert", str(folder / "run.pth"), "--out", str(tmp_path / "raw.pth"), "--weights", "model"])
    assert equal(safe_torch_load(tmp_path / "raw.pth")["model"], state)


@pytest.mark.parametrize("names", ["authors", "openmmlab"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_converted_run_sees_the_same_pictures(names, suffix, tmp_path):
    """The crop, the size, the normalisation and the lack of a layer scale are the run's, not the defaults."""
    args = {"model": "hornet_pico_7x7", "input_size": 96, "crop_pct": 1.0, "imagenet_default_mean_and_std": False,
            "layer_scale_init_value": 0.0, "lr": 0.1}
    model = timm.create_model("hornet_pico_7x7", num_classes=2, layer_scale_init_value=0)
    torch.save({"format": 2, "model": model.state_dict(), "classes": ["a", "b"], "args": args}, tmp_path / "run.pth")
    out = tmp_path / f"converted{suffix}"
    assert main(["convert", str(tmp_path / "run.pth"), "--out", str(out), "--names", names]) == 0
    before, after = (vars(load_trained(resume=str(path))) for path in (tmp_path / "run.pth", out))
    kept = ("name", "classes", "input_size", "crop_pct", "mean", "std")
    assert [after[key] for key in kept] == [before[key] for key in kept] and after["crop_pct"] == 1.0
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(before["model"](x), after["model"](x))
    assert safe_torch_load(out)["format"] == 2 and "lr" not in safe_torch_load(out)["args"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN)
def test_all_published_architectures_round_trip(name, tmp_path):
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    torch.manual_seed(0)
    state = {k: torch.randn(v.shape, dtype=torch.bfloat16) for k, v in shapes.items()}  # half the bytes on the disk
    torch.save({"model": state}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "b.pth"), "--names", "openmmlab"]) == 0
    assert main(["convert", str(tmp_path / "b.pth"), "--out", str(tmp_path / "c.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "c.safetensors"), "--out", str(tmp_path / "d.pth")]) == 0
    found = safe_torch_load(tmp_path / "d.pth")["model"]
    assert set(found) == set(state) and all(torch.equal(found[k], state[k]) for k in state)
    for file in tmp_path.iterdir():  # gigabytes, which pytest would keep for three sessions
        file.unlink()


def test_verify_names_the_model_and_what_is_wrong(files, tmp_path, capsys):
    folder, state = files
    named = tmp_path / zoo.PUBLISHED["hornet_tiny_7x7"].openmmlab_file  # a file of that name with other bytes
    named.write_bytes((folder / "openmmlab.pth").read_bytes())
    torch.save({"model": {**state, "head.bias": torch.full((10,), float("nan"))}}, tmp_path / "nan.pth")
    (tmp_path / "cut.pth").write_bytes((folder / "authors.pth").read_bytes()[:-3000])
    assert main(["verify", str(folder / "authors.pth"), str(folder / "openmmlab.pth")]) == 0
    assert capsys.readouterr().out.count(": ok: hornet_pico_gf, ") == 2
    assert main(["verify", *map(str, (folder / "authors.pth", named, tmp_path / "nan.pth", tmp_path / "cut.pth"))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and ": ok" in lines[0] and "published is 0e8eedff" in lines[1]
    assert "infinite or undefined" in lines[2] and "WRONG" in lines[3]


@pytest.fixture()
def server(files, monkeypatch):
    folder, _ = files
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(zoo, "OPENMMLAB_URL", f"http://127.0.0.1:{running.server_port}/{{}}")
    yield folder
    running.shutdown()
    running.server_close()
    thread.join()


def published_as(monkeypatch, file):
    """Publish `file` as hornet_tiny_7x7's: the names of published files end in the first digits of their hash."""
    entry = replace(zoo.PUBLISHED["hornet_tiny_7x7"], openmmlab_file=file, authors_id="")
    monkeypatch.setitem(zoo.PUBLISHED, "hornet_tiny_7x7", entry)


def test_get_downloads_checks_and_prints_the_path(server, tmp_path, monkeypatch, capsys):
    name = f"tiny-{sha256_file(server / 'openmmlab.pth')[:8]}.pth"
    (server / name).write_bytes((server / "openmmlab.pth").read_bytes())
    published_as(monkeypatch, name)
    assert main(["--folder", str(tmp_path), "get", "hornet_tiny_7x7"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / name)
    (server / name).unlink()  # the second time nothing is asked of the server
    assert main(["--folder", str(tmp_path), "get", "hornet_tiny_7x7", "--source", "openmmlab"]) == 0


def test_get_the_authors_file_which_has_no_published_hash(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "AUTHORS_URL", zoo.OPENMMLAB_URL)  # the server of this test
    entry = replace(zoo.PUBLISHED["hornet_tiny_7x7"], authors_id="authors.pth")
    monkeypatch.setitem(zoo.PUBLISHED, "hornet_tiny_7x7", entry)
    argv, path = ["--folder", str(tmp_path), "get", "hornet_tiny_7x7", "--source", "authors"], tmp_path / "hornet_tiny_7x7.pth"
    assert main(argv) == 0 and capsys.readouterr().out.strip() == str(path)
    assert path.read_bytes() == (server / "authors.pth").read_bytes()
    path.write_bytes((server / "openmmlab.pth").read_bytes())  # what came first is remembered
    assert main(argv) == 2 and "has changed since its first use" in capsys.readouterr().err


@pytest.mark.parametrize("name, part", [
    ("tiny-00000000.pth", "not the published 00000000"), ("gone-00000000.pth", "404")])
def test_get_says_where_to_put_a_file_it_cannot_have(server, tmp_path, monkeypatch, capfd, name, part):
    (server / "tiny-00000000.pth").write_bytes((server / "openmmlab.pth").read_bytes())
    published_as(monkeypatch, name)
    assert main(["--folder", str(tmp_path), "get", "hornet_tiny_7x7"]) == 2
    said = capfd.readouterr().err
    assert part in said and str(tmp_path / name) in said and "Traceback" not in said


@pytest.mark.parametrize("argv, part", [
    (["get", "hornet_pico_gf"], "no published file"), (["convert", "FILE", "--out", "x.bin"], "must end in .pth or"),
    (["convert", "FILE", "--out", "FILE"], "name another"),
    (["convert", "missing.pth", "--out", "x.pth"], "missing.pth"),
])
def test_mistakes_are_one_sentence_and_exit_2(files, argv, part, capfd):
    assert main([str(files[0] / "authors.pth") if word == "FILE" else word for word in argv]) == 2
    assert part in capfd.readouterr().err
