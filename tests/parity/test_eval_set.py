"""`main.py --eval true` on real JPEGs of every kind gives the published system's exact hits, on any number of
processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import main
import models  # noqa: F401
from tests.kits.fill import parity_tensor

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "parity" / "eval_set"
EXPECTED = json.loads((DATA / "expected.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = timm.create_model(EXPECTED["model"], num_classes=EXPECTED["classes"])
    state = {name: torch.from_numpy(parity_tensor(name, tuple(value.shape), seed=EXPECTED["fill_seed"]))
             for name, value in model.state_dict().items()}
    state["head.bias"] = torch.tensor(EXPECTED["head_bias"])
    path = tmp_path_factory.mktemp("eval_set") / "published.pth"
    torch.save({"model": state}, path)
    return path


def arguments(checkpoint: Path, out: Path) -> list[str]:
    return ["--eval", "true", "--model", EXPECTED["model"], "--nb_classes", str(EXPECTED["classes"]),
            "--resume", str(checkpoint), "--data_path", str(DATA), "--output_dir", str(out), "--batch_size",
            "8", "--num_workers", "1", "--device", "cpu", "--report", str(out / "report")]


def check(out: Path) -> None:
    result = json.loads((out / "eval.json").read_text())
    assert (result["hits1"], result["hits5"], result["images"]) == (
        EXPECTED["correct1"], EXPECTED["correct5"], EXPECTED["images"])
    assert result["loss"] == pytest.approx(EXPECTED["loss_mean"], abs=1e-5)
    assert result["acc1"] == pytest.approx(EXPECTED["acc1"], abs=1e-5)
    rows = (out / "report" / "per_class.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[4]) for row in rows] == EXPECTED["per_class_correct"]


def test_one_process_with_a_bar_on_a_terminal(checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main.main(arguments(checkpoint, tmp_path)) == 0
    check(tmp_path)
    assert "evaluation:   0%" in capfd.readouterr().err


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes(checkpoint, tmp_path, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               "main.py"]
    done = subprocess.run([*command, *arguments(checkpoint, tmp_path)], cwd=ROOT, text=True,
                          capture_output=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    check(tmp_path)
