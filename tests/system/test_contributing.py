"""CONTRIBUTING.md's worked example: its diff applies, and what it promises happens."""
import re
import shutil
import subprocess
import sys

from tests.kits.docs import ROOT
from tests.kits.processes import environment

DIFF = re.compile(r"```diff\n(.*?)```", re.DOTALL)
ROOMS = ("common", "config", "models")


def apply(diff: str, folder) -> None:
    """Apply the hunks of a diff without line numbers: what stands there is replaced by what shall stand there."""
    for name, body in re.findall(r"\+\+\+ b/(\S+)\n(.*?)(?=--- |\Z)", diff, re.DOTALL):
        text = (folder / name).read_text()
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines()
            old = "\n".join(line[1:] for line in lines if line[0] in " -")
            assert text.count(old) == 1, f"{name} does not hold, exactly once:\n{old}"
            text = text.replace(old, "\n".join(line[1:] for line in lines if line[0] in " +"))
        (folder / name).write_text(text)


def test_the_diff_for_a_model_variant_is_all_it_takes(tmp_path):
    diff = DIFF.findall((ROOT / "CONTRIBUTING.md").read_text())[0]
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room)
    apply(diff, tmp_path)
    program = ("import models, timm\n"
               "from models.inspect import complexity\n"
               "from models.zoo import VARIANTS\n"
               "row = VARIANTS['hornet_micro_7x7']\n"
               "model = timm.create_model('hornet_micro_7x7')\n"
               "params = sum(p.numel() for p in model.parameters())\n"
               "assert (params, round(complexity(model, row.input_size).flops, -3)) == (row.params, row.flops)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True,
                          env=environment() | {"PYTHONPATH": str(tmp_path)}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
