"""Every fenced command of README.md and TRAINING.md is marked, and does what it is marked for."""
import json
import os
import re
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
from config.rules import plan_batch, validate_after_index
from datasets.build import build_data
from tests.kits.docs import ROOT, commands
from tests.kits.images import fill_folder
from tests.kits.processes import environment

COMMANDS = commands()
OPTIONS = [c for c in COMMANDS if c.main_argv is not None]
DRY = [c for c in OPTIONS if c.mark == "dry-run"]


def name(command):
    return f"{command.file}:{' '.join(command.main_argv or command.words)}"[:90]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder for each place that the commands name: two ImageNet classes, and two classes of one's own."""
    root = tmp_path_factory.mktemp("docs")
    for folder in ("imagenet/{}/n01440764", "imagenet/{}/n01443537", "images/{}/cat", "images/{}/dog"):
        for part in ("train", "val"):
            fill_folder(root / folder.format(part), 4)
    (root / "imagenet22k").symlink_to(root / "imagenet" / "train")
    return root


def without(argv, flag):
    """`argv` without a flag and its value."""
    return [word for word, before in zip(argv, ["", *argv]) if flag not in (word, before)]


def on_tiny_data(argv, images, checkpoint="/path/to/checkpoint.pth"):
    """`argv` with two images per forward pass and paths that exist."""
    argv = [re.sub(r"/path/to/(checkpoint|other)\.pth", str(checkpoint), word).replace("/path/to", str(images))
            for word in without(argv, "--update_freq")]
    return [*argv, "--batch_size", "2", "--global_batch", "4", "--num_workers", "0", "--dry_run", "true"]


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_every_command_is_marked_with_a_reason_if_it_is_not_run(command):
    assert command.mark in ("run", "dry-run", "not-run"), f"unmarked in {command.file}: {command.text}"
    assert command.mark != "not-run" or len(command.reason) > 10
    assert command.mark != "dry-run" or command.main_argv is not None


@pytest.mark.parametrize("command", OPTIONS, ids=name)
def test_the_options_of_every_command_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    resolved = parse(command.main_argv)
    assert resolved.options.data_path or resolved.options.eval  # a run names its own data


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.main_argv is None], ids=name)
def test_other_commands_name_what_exists(command):
    words = command.words
    if words[0] == "make":
        lines = (ROOT / "Makefile").read_text().splitlines()
        targets = {target for line in lines if ":" in line for target in line.split(":")[0].split()}
        assert all(word in targets for word in words[1:] if "=" not in word)
    elif words[:2] == ["python", "-m"]:
        found = ROOT / words[2].replace(".", "/")
        assert found.with_suffix(".py").exists() or found.is_dir()


def unique(found):
    """One command per set of options, so that the same recipe is not tried twice."""
    return list({tuple(w for w in c.main_argv if "runs/" not in w): c for c in found}.values())


@pytest.mark.parametrize("command", unique(DRY), ids=name)
def test_options_data_and_model_of_long_commands(command, images, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    argv = on_tiny_data(command.main_argv, images) + ["--index_cache", str(tmp_path)]
    resolved = parse(argv)
    o = resolved.options
    if o.data_set == "SAMPLE":
        o.data_path = str(tmp_path / "digits")
    data = build_data(o, train=not o.eval, evaluate=o.eval or not o.disable_eval)
    if not o.eval:
        validate_after_index(o, plan_batch(resolved, 2), len(data.train))
    with torch.device("meta"):
        model = timm.create_model(o.model, num_classes=data.num_classes, drop_path_rate=o.drop_path,
                                  layer_scale_init_value=o.layer_scale_init_value)
    assert sum(p.numel() for p in model.parameters()) > 1e5


def real_run(words, cwd, seconds):
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(cwd / "cache"), "PYTHONPATH": ""}
    ended = subprocess.run(words, cwd=cwd, env=environment() | paths, capture_output=True, text=True, timeout=seconds)
    assert ended.returncode == 0, f"{words}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project in which the commands may write."""
    target = tmp_path_factory.mktemp("checkout") / "project"
    skipped = shutil.ignore_patterns(".*", "runs", "build", "__pycache__")
    shutil.copytree(ROOT, target, ignore=lambda folder, names: {
        *skipped(folder, names), *(["data"] if Path(folder) == ROOT else [])})
    return target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    state = timm.create_model("hornet_pico_7x7", num_classes=1000).state_dict()
    torch.save({"model": state, "model_ema": state}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in unique(DRY) if "quickstart" not in c.text][::4], ids=name)
def test_long_commands_start_on_two_processes(command, images, checkpoint, checkout, tmp_path):
    """Every fourth one in earnest, with the smallest model at 32 pixels."""
    argv = on_tiny_data(command.main_argv, images, checkpoint)
    if "--pretrained" in argv:
        argv = [*without(argv, "--pretrained"), "--resume" if "--eval" in argv else "--finetune", str(checkpoint)]
    argv = without(argv, "--resume") if "latest" in argv else argv  # there is no run here to resume
    argv += f"--model hornet_pico_7x7 --input_size 32 --device cpu --allow_partial true --output_dir {tmp_path / 'run'}".split()
    real_run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", *argv],
             checkout, 240)


@pytest.mark.slow
def test_the_published_launcher_trains_and_evaluates(checkout):
    """Two processes of the launcher that passes --local-rank, three epochs of the quickstart's 30."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2",
               f"--master_port={port}", "main.py", "--config", "recipes/quickstart.yaml", "--device", "cpu",
               "--output_dir", "runs/two"]
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
