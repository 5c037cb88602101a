"""A run goes to the Hub's layout and back: equal bits through timm, transformers and this project."""
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

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
from tests.kits.server import serving
from tests.kits.trained import checkpoint, lively
from tools.zoo import main

CLASSES = ["ant", "bee", "猫"]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (140, 200, 3), dtype=np.uint8))
# What somebody else does with the folder, without a word of this project but `import models`.
PROGRAM = """
import sys, torch, timm
import models
from PIL import Image
found = []
for source in sys.argv[1:]:
    model = timm.create_model(source, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    other = timm.create_model(source, pretrained=True, num_classes=7, in_chans=1)
    found.append((model(torch.load("x.pt")).detach(), transform(Image.open("image.png")), other.head.bias.detach(),
                  model.pretrained_cfg["label_names"]))
torch.save(found, "out.pt")
"""


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


def test_timm_gives_equal_bits_and_the_same_images_in_a_process_of_its_own(folder, tmp_path):
    path, out = folder
    trained, x = models.load(path), torch.randn(2, 3, 96, 64)
    torch.save(x, tmp_path / "x.pt"), IMAGE.save(tmp_path / "image.png")
    (tmp_path / "program.py").write_text(PROGRAM)

    def answer(path):
        """As much of the Hub as a download needs: /USER/NAME/resolve/REVISION/FILE."""
        file = out / path.rsplit("/", 1)[-1]
        body = file.read_bytes() if file.is_file() else b""
        return 200 if body else 404, body, len(body)

    with serving(answer) as address:
        words = [sys.executable, "program.py", f"local-dir:{out}", "hf-hub:me/ants"]
        done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=120,
                              env=environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache")))
    assert done.returncode == 0, done.stderr[-2000:]
    for logits, image, head, labels in torch.load(tmp_path / "out.pt"):
        with torch.no_grad():
            assert torch.equal(logits, trained.model(x))
        assert torch.equal(image, trained.transform(IMAGE)) and (len(head), list(labels)) == (7, CLASSES)


def test_this_project_and_transformers_take_it_as_it_is(folder):
    path, out = folder
    before, after, x = models.load(path), models.load(out), torch.randn(2, 3, 64, 64)
    assert safe_torch_load(out / "model.safetensors")["format"] == FORMAT
    assert locate(out) == after.source == out / "model.safetensors"  # what --resume and --finetune ask
    assert (after.name, after.classes, after.settings) == (before.name, before.classes, before.settings)
    assert all(map(torch.equal, after.model.state_dict().values(), before.model.state_dict().values()))
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(model(x).logits, before.model(x))
    assert list(model.config.id2label.values()) == CLASSES
    pixels = transformers.AutoImageProcessor.from_pretrained(out)(IMAGE)["pixel_values"][0]
    assert torch.equal(pixels, before.transform(IMAGE))


def test_the_card_has_results_with_their_interval_training_and_limits(folder, tmp_path):
    path, out = folder
    alone = shutil.copy(path, tmp_path / "alone.pth")
    assert main(["hub", str(alone), "--out", str(tmp_path / "out"), "--licence", "cc-by-4.0"]) == 0
    for where, parts in ((out, ("| insects | 400 | 97.50 | 100.00 | ±1.53 |", "recipe: recipes/a.yaml", "torch 2.15",
                                "license: mit", "## Limits", "hf-hub:USER/NAME")),
                         (tmp_path / "out", ("Not evaluated", "Not recorded", "license: cc-by-4.0"))):
        card = (where / "README.md").read_text()
        assert not [words for words in parts if words not in card]


def test_push(folder, monkeypatch):
    calls = []

    def asked(name, *file, exist_ok=False, revision=None):
        if name != "me/ants":
            raise OSError("401 Client Error.\nUnauthorized")
        return f"https://hub/{name}"

    api = SimpleNamespace(create_repo=asked, upload_folder=lambda **words: calls.append(words))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    assert push(folder[1], "me/ants") == "https://hub/me/ants"
    assert calls == [{"repo_id": "me/ants", "folder_path": folder[1]}]
    with refused("download_failed", "hf-hub:me/none", "model.safetensors"):
        locate("hf-hub:me/none")
    with refused("push_failed", "me/", "401", "hf auth login"):
        push(folder[1], "me/")
