"""CONTRIBUTING.md's worked diffs apply, and what they promise happens."""
import re
import shutil
import subprocess
import sys

import pytest

from tests.kits.docs import ROOT
from tests.kits.processes import environment

DIFF = re.compile(r"```diff\n(.*?)```", re.DOTALL)
ROOMS = ("common", "config", "models", "optim", "recipes", "datasets", "native")


def apply(diff: str, folder) -> None:
    """Apply the hunks of a diff without line numbers: what stands there is replaced by what shall stand there."""
    for name, body in re.findall(r"\+\+\+ b/(\S+)\n(.*?)(?=--- |\Z)", diff, re.DOTALL):
        text = (folder / name).read_text() if (folder / name).exists() else ""
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines()
            old = "\n".join(line[1:] for line in lines if line[0] in " -")
            assert text.count(old) == 1 or not text + old, f"{name} does not hold, exactly once:\n{old}"
            new = "\n".join(line[1:] for line in lines if line[0] in " +")
            text = text.replace(old, new) if old else new
        (folder / name).write_text(text)


PROGRAMS = {
    "variant": """
import models, timm
from models.inspect import flops
from models.zoo import VARIANTS
row, model = VARIANTS["hornet_micro_7x7"], timm.create_model("hornet_micro_7x7")
assert sum(p.numel() for p in model.parameters()) == row.params
assert round(flops(model, row.input_size), -3) == row.flops""",
    "schedule": """
from config.parse import parse
from optim.schedule import Schedule
for name in ("cosine", "linear"):
    words = f"--data_path . --lr 1 --min_lr 0 --warmup_epochs 0 --epochs 1 --schedule {name}".split()
    values = [Schedule(parse(words).options, 4).lr(update) for update in range(4)]
    assert (values == [1, 0.75, 0.5, 0.25]) is (name == "linear")""",
    "form": """
import os, zipfile
from PIL import Image
from datasets.build import build_data
from config.options import Options
Image.new("RGB", (9, 9)).save("image.jpg")
os.mkdir("zips")
with zipfile.ZipFile("zips/all.zip", "w") as archive:
    for name in ("cat/2.jpg", "dog/0.jpg", "cat/1.jpg"):
        archive.write("image.jpg", name)
options = Options(data_set="image_folder", data_path="zips", num_workers=0, index_cache="/dev/null/none")
train = build_data(options, train=True, evaluate=False).train
assert train.reader.form == "zip files (1)" and train.targets.tolist() == [0, 0, 1]
assert train.reader.encoded(0) == open("image.jpg", "rb").read()"""}


@pytest.mark.parametrize("number, name", [*enumerate(PROGRAMS)])
def test_a_worked_diff_is_all_it_takes(number, name, tmp_path):
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room)
    apply(DIFF.findall((ROOT / "CONTRIBUTING.md").read_text())[number], tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAMS[name]], cwd=tmp_path, text=True, capture_output=True,
                          env=environment() | {"PYTHONPATH": str(tmp_path)}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
