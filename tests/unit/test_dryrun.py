"""`--dry_run true` tries everything, names what is wrong in one sentence, and leaves nothing behind."""
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dryrun
import models  # noqa: F401  registers the architectures
from common.errors import UserError
from datasets.sampler import spread_over_classes
from dryrun import Table, advice, check_writable, first_difference, trial_folder, waiting
from main import main
from tests.kits.docs import ROOT
from tests.kits.processes import environment
from training import Trainer

QUICK = ["--model", "hornet_pico_7x7", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]
TRAIN = ("--batch_size", "2", "--epochs", "3", "--warmup_epochs", "0")


def write_images(root, classes, per_class):
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(classes):
            folder = root / part / f"class{number:03d}"
            folder.mkdir(parents=True)
            for image in range(per_class):
                Image.fromarray(draw.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / f"{image}.JPEG")
    return root


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("two"), 2, 5)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """`run(data, *flags)` gives (exit code, the console's words on one line) of main.py in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def started(data, *flags):
        code = main([*QUICK, "--data_path", str(data), *flags])
        shown = capfd.readouterr()
        assert "Traceback" not in shown.err
        return code, " ".join((shown.out + shown.err).split())
    return started


def test_a_training_is_tried_and_leaves_no_trace(two_classes, tmp_path, run):
    above = tmp_path / "runs"
    above.mkdir()
    code, text = run(two_classes, *TRAIN, "--update_freq", "2", "--model_ema", "true", "--model_ema_eval", "true",
                     "--output_dir", str(above / "mine"), "--dry_run", "true")
    assert code == 0, text
    assert list(above.iterdir()) == []
    for words in ("train: 10 images in 2 of 2 classes", "2 updates of 4 images", "restored bit for bit", "img/s",
                  "% of the time;", "3 epochs would take", "checkpoints take", "the averaged weights will lag behind",
                  "All is well"):
        assert words in text


def test_a_run_folder_is_read_and_not_changed(two_classes, tmp_path, run):
    folder = tmp_path / "run"
    start = (two_classes, *TRAIN, "--output_dir", str(folder))
    assert run(*start, "--epochs", "1")[0] == 0

    def seen():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}
    before = seen()
    code, text = run(*start, "--dry_run", "true")
    assert code == 0 and f"a start would resume {folder}" in text and "5 updates of 2" in text, text
    code, text = run(*start, "--epochs", "1", "--dry_run", "true")
    assert code == 0 and "only evaluate it" in text, text
    code, text = run(*start, "--lr", "1e-4", "--dry_run", "true")
    assert code == 2 and "lr 0.004" in text
    code, text = run(two_classes, "--eval", "true", "--output_dir", str(folder), "--dry_run", "true")
    assert code == 0 and "of 10 sampled images correct" in text and "10 images would take" in text, text
    assert seen() == before


@pytest.mark.parametrize("flags, word", [
    (("--data_path", "/nowhere"), "/nowhere/train"),
    (("--batch_size", "64"), "--batch_size"),
    (("--output_dir", str(ROOT / "main.py" / "run")), "main.py"),
    (("--eval", "true"), "--resume"),
    (("--resume", str(ROOT / "README.md")), "README.md"),
    (("--lr", "1e30", "--min_lr", "1e30", "--clip_grad", "none"), "--lr"),
])
def test_what_is_wrong_is_one_sentence_and_exit_code_2(two_classes, run, flags, word):
    code, text = run(two_classes, *TRAIN, *flags, "--dry_run", "true")
    assert code == 2 and word in text and "All is well" not in text, text


def test_unreadable_images_are_named_and_are_a_problem_for_an_evaluation_alone(two_classes, tmp_path, run):
    data, folder = shutil.copytree(two_classes, tmp_path / "data"), tmp_path / "run"
    (data / "train" / "class000" / "1.JPEG").write_bytes(b"not an image")
    (data / "val" / "class001" / "2.JPEG").write_bytes(b"")
    code, text = run(data, *TRAIN, "--dry_run", "true")
    assert code == 0 and "train/class000/1.JPEG" in text and "val/class001/2.JPEG" in text, text
    code, text = run(data, *TRAIN, "--epochs", "1", "--output_dir", str(folder))
    assert code == 0 and text.index("unreadable: ") < text.index("epoch 1/1"), text  # the short form of every start
    code, text = run(data, "--eval", "true", "--output_dir", str(folder), "--dry_run", "true")
    assert code == 2 and "val/class001/2.JPEG cannot be read" in text and "--allow_bad_images" in text, text
    code, text = run(data, "--eval", "true", "--output_dir", str(folder), "--dry_run", "true", "--allow_bad_images", "true")
    assert code == 0, text


def test_a_large_model_on_a_cpu_is_built_on_meta_only(two_classes, run):
    code, text = run(two_classes, *TRAIN, "--model", "hornet_large_7x7", "--dry_run", "true")
    assert code == 0 and "M parameters, built without memory for them" in text and "gradient norm" not in text, text


def test_two_processes(two_classes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", *QUICK,
               "--data_path", str(two_classes), *TRAIN, "--index_cache", str(tmp_path), "--dry_run", "true"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "2 on 1 node, they share the CPU; versions and clocks agree" in " ".join(ended.stderr.split())
    assert ended.stderr.count("All is well") == 1


def test_a_restore_that_leaves_something_out_is_found(two_classes, run, monkeypatch):
    monkeypatch.setattr(Trainer, "load_state_dict", lambda self, state: None)
    code, text = run(two_classes, *TRAIN, "--dry_run", "true")
    assert code == 2 and "state.model" in text, text


def test_a_disk_that_is_too_small_is_a_problem(two_classes, tmp_path, run, monkeypatch):
    monkeypatch.setattr(dryrun, "free_space", lambda folder: 10 ** 6)
    code, text = run(two_classes, *TRAIN, "--output_dir", str(tmp_path / "run"), "--dry_run", "true")
    assert code == 2 and "1.0 MB" in text and "--save_ckpt_num" in text, text


# ---------------------------------------------------------------------------------------- weights that know nothing

@pytest.fixture(scope="module")
def hundred_classes(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("hundred"), 100, 1)


@pytest.fixture(scope="module")
def constant_answer(tmp_path_factory):
    """A checkpoint for 100 classes that always names the first: 1 % correct."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    network = timm.create_model("hornet_pico_7x7", num_classes=100)
    network.head.bias.data[0] = 1e4
    torch.save({"model": network.state_dict()}, path)
    return path


def test_weights_that_know_nothing_end_a_fine_tuning_and_warn_an_evaluation(hundred_classes, constant_answer, run):
    start = (hundred_classes, *TRAIN, "--finetune", str(constant_answer), "--batch_size", "50", "--epochs", "1")
    code, text = run(*start)
    assert code == 2 and "only 1 of 100 images correct (1.0 %, chance is 1 %)" in text, text
    code, text = run(*start, "--allow_partial", "true", "--dry_run", "true")
    assert code == 0, text
    code, text = run(hundred_classes, "--eval", "true", "--resume", str(constant_answer), "--dry_run", "true")
    assert code == 0 and "warning: the loaded weights get only 1 of 100" in text, text


# -------------------------------------------------------------------------------------------------- the pure pieces

def test_a_sample_is_spread_over_the_classes():
    targets = np.repeat(np.arange(20), np.arange(1, 21) * 5)
    chosen = spread_over_classes(targets, 60)
    assert np.bincount(targets[chosen]).tolist() == [3] * 20 and len(set(chosen.tolist())) == 60
    assert len(spread_over_classes(targets, 10 ** 6)) == len(targets)


def test_waiting_and_the_change_that_would_help_most():
    assert waiting(1000, 0.0, 0.01, workers=4, cpus=16) == pytest.approx(0.6)
    assert waiting(1000, 0.3, 0.01, workers=0, cpus=16) == 0.3  # measured, where nothing is loaded ahead
    options = SimpleNamespace(num_workers=4, use_amp=False, update_freq=4)
    assert "--num_workers 16" in advice(0.6, options, 16, None)
    assert "shorter side" in advice(0.6, options, 4, None)
    assert "--use_amp" in advice(0.0, options, 16, 0.3) and "--use_amp" not in advice(0.0, options, 16, None)
    options.use_amp = True
    assert "--batch_size" in advice(0.0, options, 16, 0.3) and "--" not in advice(0.0, options, 16, 0.9)


def test_the_first_bit_that_differs_is_named():
    one = {"a": torch.tensor([0.0, float("nan")]), "b": [1, {"c": 2.5}], "d": torch.tensor(1)}
    assert first_difference(one, {**one, "a": one["a"].clone()}) is None
    assert first_difference(one, {**one, "a": torch.tensor([-0.0, float("nan")])}) == "state.a"
    assert first_difference(one, {**one, "b": [1, {"c": 2.4}]}) == "state.b.1.c"
    assert first_difference(one, {**one, "d": torch.tensor(1.0)}) == "state.d"


def test_the_table_ends_with_the_first_problem():
    table = Table("title")
    table.end()
    table.row("a", "first is wrong.", problem=True)
    table.row("b", "second is wrong.", problem=True)
    with pytest.raises(UserError) as error:
        table.end()
    assert error.value.code == "dry_run" and str(error.value).startswith("first is wrong. (1 more")


def test_writing_is_tried_without_a_trace(tmp_path):
    check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_dry_run_left_is_removed_by_the_next_one(tmp_path):
    def folders():
        return sorted(str(path) for path in tmp_path.iterdir())

    child = os.fork()
    if child == 0:
        try:
            with trial_folder(str(tmp_path / "mine")):
                time.sleep(60)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while not folders() and time.monotonic() < deadline:
        time.sleep(0.01)
    (left,) = folders()
    with trial_folder(str(tmp_path / "other")) as folder:
        assert folders() == sorted([left, folder]), "one that is under way must stay"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert folders() == [left]
    with trial_folder(str(tmp_path / "other")) as folder:
        assert folders() == [folder]
    assert folders() == []
