"""`main.py --eval true` on real JPEGs of every kind gives the published system's exact hits, on any number of
processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from tests.kits.docs import ROOT
from tests.kits.trained import filled

DATA = ROOT / "tests" / "data" / "parity" / "eval_set"
EXPECTED = json.loads((DATA / "expected.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    state = filled(EXPECTED["model"], EXPECTED["fill_seed"], num_classes=EXPECTED["classes"]).state_dict()
    state["head.bias"] = torch.tensor(EXPECTED["head_bias"])
    path = tmp_path_factory.mktemp("eval_set") / "published.pth"
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_image_is_counted_once(checkpoint, tmp_path, processes, monkeypatch, capfd):
    out = tmp_path / "out"
    argv = ["--eval", "true", "--model", EXPECTED["model"], "--nb_classes", str(EXPECTED["classes"]),
            "--resume", str(checkpoint), "--data_path", str(DATA), "--output_dir", str(out), "--batch_size",
            "8", "--num_workers", "1", "--device", "cpu", "--report", str(out / "report")]
    if processes == 1:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        assert main.main(argv) == 0 and "evaluation:   0%" in capfd.readouterr().err
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*command, "main.py", *argv], cwd=ROOT, text=True, capture_output=True, timeout=280,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "eval.json").read_text())
    assert (result["hits1"], result["hits5"], result["images"]) == (
        EXPECTED["correct1"], EXPECTED["correct5"], EXPECTED["images"])
    assert result["loss"] == pytest.approx(EXPECTED["loss_mean"], abs=1e-5)
    assert result["acc1"] == pytest.approx(EXPECTED["acc1"], abs=1e-5)
    rows = (out / "report" / "per_class.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[4]) for row in rows] == EXPECTED["per_class_correct"]
