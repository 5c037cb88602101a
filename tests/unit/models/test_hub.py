"""A run goes to the Hub's layout and back: equal bits through timm, transformers and this project."""
import http.server
import json
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import models
from common.safe_load import safe_torch_load
from models.hub import push
from models.trained import locate
from run.state import FORMAT
from tests.kits.errors import refused
from tests.kits.processes import environment
from tests.kits.trained import checkpoint, lively
from tools.zoo import main

CLASSES = ["ant", "bee", "猫"]
# What somebody else does with the folder, without a word of this project but `import models`.
PROGRAM = """
import json, sys, torch, timm, numpy as np
import models
from PIL import Image
source, x, image = sys.argv[1], torch.load(sys.argv[2]), Image.open(sys.argv[3])
model = timm.create_model(source, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
other = timm.create_model(source, pretrained=True, num_classes=7, in_chans=1)
torch.save({"logits": model(x).detach(), "image": transform(image), "head": list(other.head.weight.shape),
            "labels": model.pretrained_cfg["label_names"]}, sys.argv[4])
"""


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of the Hub as a download needs: /USER/NAME/resolve/REVISION/FILE."""

    def translate_path(self, path):
        return f"{self.directory}/{path.rsplit('/', 1)[-1]}"

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hash(self.path)}"')
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module", params=[
    ("hornet_pico_7x7", dict(layer_scale_init_value=0), dict(input_size=96, crop_pct=1.0, layer_scale_init_value=0.0,
                                                             imagenet_default_mean_and_std=False)),
    ("hornet_pico_gf", {}, dict(input_size=64))], ids=lambda param: param[0])
def folder(request, tmp_path_factory):
    """(the checkpoint of a run, in a folder of its own; its folder in the Hub's layout)."""
    name, network, settings = request.param
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("hub") / "best"
    nets = [lively(name, 3, seed, **network) for seed in (0, 1)]
    path = checkpoint(run / "checkpoint-best-ema.pth", *nets, scored="model_ema", classes=CLASSES, model=name, **settings)
    result = dict(checkpoint=str(path), weights="model_ema", dataset="insects", images=400, acc1=97.5, acc5=100.0,
                  interval=1.53, dtype="float32")
    (run / "eval.json").write_text(json.dumps(result))
    (run / "environment.json").write_text(json.dumps({"command": ["main.py", "--config", "recipes/a.yaml"],
                                                      "packages": {"torch": "2.15"}}))
    assert main(["hub", str(run), "--out", str(out)]) == 0
    return path, out


@pytest.mark.parametrize("source", ["local-dir:", "hf-hub:"])
def test_timm_gives_equal_bits_and_the_same_images_in_a_process_of_its_own(folder, source, tmp_path):
    path, out = folder
    trained, x = models.load(path), torch.randn(2, 3, 96, 64)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (140, 200, 3), dtype=np.uint8))
    torch.save(x, tmp_path / "x.pt"), image.save(tmp_path / "image.png")
    (tmp_path / "program.py").write_text(PROGRAM)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(out))) as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01)).start()
        name = f"local-dir:{out}" if source == "local-dir:" else "hf-hub:me/ants"
        words = [sys.executable, "program.py", name, "x.pt", "image.png", "out.pt"]
        done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=120, env=environment(
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "cache")))
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.equal(found["logits"], trained.model(x))
    assert torch.equal(found["image"], trained.transform(image))
    assert (found["head"][0], list(found["labels"])) == (7, CLASSES)


def test_the_folder_is_a_checkpoint_for_this_project(folder):
    path, out = folder
    before, after = models.load(path), models.load(out)
    assert safe_torch_load(out / "model.safetensors")["format"] == FORMAT
    assert locate(out) == after.source == out / "model.safetensors"  # what --resume and --finetune ask
    assert (after.name, after.classes, after.settings) == (before.name, before.classes, before.settings)
    assert all(map(torch.equal, after.model.state_dict().values(), before.model.state_dict().values()))


def test_transformers_takes_it_as_it_is(folder):
    transformers = pytest.importorskip("transformers")
    path, out = folder
    trained, x = models.load(path), torch.randn(2, 3, 64, 64)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (140, 200, 3), dtype=np.uint8))
    model = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(model(x).logits, trained.model(x))
    assert list(model.config.id2label.values()) == CLASSES
    pixels = transformers.AutoImageProcessor.from_pretrained(out)(image)["pixel_values"][0]
    assert torch.equal(pixels, trained.transform(image))


def test_the_card_has_results_with_their_interval_training_and_limits(folder, tmp_path):
    path, out = folder
    card = (out / "README.md").read_text()
    for words in ("| insects | 400 | 97.50 | 100.00 | ±1.53 |", "recipe: recipes/a.yaml", "torch 2.15", "license: mit",
                  "## Limits", "hf-hub:USER/NAME"):
        assert words in card, words
    alone = path.rename(tmp_path / "alone.pth")
    assert main(["hub", str(alone), "--out", str(tmp_path / "out"), "--licence", "cc-by-4.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not evaluated" in card and "Not recorded" in card and "license: cc-by-4.0" in card
    alone.rename(path)


def test_push(folder, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, *file, exist_ok=False, revision=None):
            if name != "me/ants":
                raise OSError("401 Client Error.\nUnauthorized")
            return f"https://hub/{name}"

        def upload_folder(self, **words):
            calls.append(words)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push(folder[1], "me/ants") == "https://hub/me/ants"
    assert calls == [{"repo_id": "me/ants", "folder_path": folder[1]}]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Api().create_repo)
    with refused("download_failed", "hf-hub:me/none", "model.safetensors"):
        locate("hf-hub:me/none")
    with refused("push_failed", "me/", "401", "hf auth login"):
        push(folder[1], "me/")
