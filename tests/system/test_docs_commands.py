"""Every fenced command of README.md and TRAINING.md is marked, and does what it is marked for."""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401  (registers the networks)
from config.parse import parse
from config.rules import plan_batch
from datasets.build import build_data
from tests.kits.docs import ROOT, commands
from tests.kits.images import fill_folder
from tests.kits.processes import environment

COMMANDS = commands()


def name(command):
    return f"{command.file}:{' '.join(command.main_argv or command.words)}"[:90]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What the commands name under /path/to: two ImageNet classes, two classes of one's own."""
    root = tmp_path_factory.mktemp("docs")
    for folder in ("imagenet/{}/n01440764", "imagenet/{}/n01443537", "images/{}/cat", "images/{}/dog"):
        for part in ("train", "val"):
            fill_folder(root / folder.format(part), 4)
    (root / "imagenet22k").symlink_to(root / "imagenet" / "train")
    return root


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_every_command_is_marked_and_names_options_targets_and_modules_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words, argv = command.words, command.main_argv
    assert command.mark in ("run", "dry-run", "not-run"), f"unmarked in {command.file}: {command.text}"
    assert command.mark != "not-run" or len(command.reason) > 10
    if argv is not None:
        options = parse(argv).options
        assert options.data_path or options.eval  # a run names its own data
    elif words[0] == "make":
        lines = Path("Makefile").read_text().splitlines()
        targets = {target for line in lines for target in line.partition(":")[0].split()}
        assert targets.issuperset(word for word in words[1:] if "=" not in word)
    elif words[:2] == ["python", "-m"]:
        found = Path(words[2].replace(".", "/"))
        assert found.with_suffix(".py").exists() or found.is_dir()
    assert command.mark != "dry-run" or argv is not None


# One command per set of options, so that the same recipe is not tried twice.
DRY = list({tuple(word for word in command.main_argv if "runs/" not in word): command
            for command in COMMANDS if command.mark == "dry-run"}.values())


@pytest.mark.parametrize("command", DRY, ids=name)
def test_options_data_and_model_of_long_commands(command, images, monkeypatch, tmp_path):
    """With two images per forward pass, and paths that exist."""
    monkeypatch.chdir(ROOT)
    argv = [word.replace("/path/to", str(images)) for word in command.main_argv]
    resolved = parse(argv + f"--batch_size 2 --update_freq 1 --num_workers 0 --index_cache {tmp_path}".split())
    o = resolved.options
    if o.data_set == "SAMPLE":
        o.data_path = str(tmp_path / "digits")
    data = build_data(o, train=not o.eval, evaluate=o.eval or not o.disable_eval)
    if not o.eval:
        plan_batch(o, 2, len(data.train))
    with torch.device("meta"):
        timm.create_model(o.model, num_classes=data.num_classes, drop_path_rate=o.drop_path,
                          layer_scale_init_value=o.layer_scale_init_value)


def real_run(words, cwd, seconds):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = environment(PATH=path, XDG_CACHE_HOME=str(cwd / "cache")) | {"PYTHONPATH": ""}
    ended = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=seconds)
    assert ended.returncode == 0, f"{words}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project in which the commands may write."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "project",
                           ignore=shutil.ignore_patterns(".*", "runs", "build", "__pycache__"))


@pytest.mark.slow
def test_the_published_launcher_trains_and_evaluates(checkout):
    """Two processes of the launcher that passes --local-rank, three epochs of the quickstart's 30."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *(f"-m torch.distributed.launch --nproc_per_node=2 --master_port={port} main.py --config "
                                 "recipes/quickstart.yaml --device cpu --output_dir runs/two").split()]
    workers = len(os.sched_getaffinity(0)) + 1
    said = real_run([*command, "--epochs", "3", "--num_workers", str(workers)], checkout, 240)
    assert f"--num_workers {workers} is more than the" in said and "UserWarning" not in said
    assert "64 images per update = 32 per forward pass x 1 forward pass x 2 processes" in said
    assert "epoch 3/3 done" in said and "local_rank" not in said
    assert "of 360 " in real_run([*command, "--eval", "true", "--resume", "best"], checkout, 120)
    assert json.loads((checkout / "runs" / "two" / "eval.json").read_text())["images"] == 360


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_commands_marked_run_work_one_after_the_other_as_pasted(checkout):
    for command in (c for c in COMMANDS if c.mark == "run"):
        text = command.text
        if text.startswith("make "):
            text = f"make -o .venv/installed PY={sys.executable} {text[5:]}"
        real_run(["bash", "-euo", "pipefail", "-c", text], checkout, 900)
        if command.text == "make quickstart":
            result = json.loads((checkout / "runs" / "quickstart" / "eval.json").read_text())
            assert result["images"] >= 360 and result["acc1"] >= 95, result
