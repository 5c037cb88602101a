"""`--dry_run true` tries everything, says what is wrong in one sentence, and leaves nothing behind."""
import os
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
from datasets.check import SampleCheck, spread_over_classes
from main import main
from run.checkpoint import Checkpoints
from run.life import TrainingRun
from run.preflight import (
    Pace,
    Report,
    check_writable,
    first_difference,
    low_score,
    process_problems,
    shared_memory_needed,
    shared_memory_problem,
    start_warnings,
    sweep_trials,
    trial_folder,
)
from tests.kits.docs import ROOT
from tests.kits.processes import environment

QUICK = ["--model", "hornet_pico_7x7", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]


def write_images(root, classes, per_class, parts=("train", "val")):
    draw = np.random.default_rng(0)
    for part in parts:
        for number in range(classes):
            folder = root / part / f"class{number:03d}"
            folder.mkdir(parents=True)
            for picture in range(per_class):
                pixels = draw.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{picture}.JPEG")
    return root


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("two"), 2, 5)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """`run(data, *flags)` gives (exit code, what was said) of main.py in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def started(data, *flags):
        code = main([*QUICK, "--data_path", str(data), *flags])
        said = capfd.readouterr()
        return code, said.out + said.err
    return started


TRAIN = ("--batch_size", "2", "--epochs", "3", "--warmup_epochs", "0")


def test_a_training_is_tried_and_leaves_no_trace(two_classes, tmp_path, run):
    above = tmp_path / "runs"
    above.mkdir()
    code, said = run(two_classes, *TRAIN, "--update_freq", "2", "--model_ema", "true", "--model_ema_eval", "true",
                     "--output_dir", str(above / "mine"), "--dry_run", "true")
    assert code == 0, said
    assert list(above.iterdir()) == []
    for words in ("train: 10 images in 2 of 2 classes", "2 updates of 4 pictures", "restored bit for bit", "img/s",
                  "% of the time;", "3 epochs would take", "checkpoints take", "the averaged weights will lag behind",
                  "All is well"):
        assert words in " ".join(said.split())  # long lines are broken


def test_a_run_folder_is_read_and_not_changed(two_classes, tmp_path, run):
    folder = tmp_path / "run"
    start = (two_classes, *TRAIN, "--output_dir", str(folder))
    assert run(*start, "--epochs", "1")[0] == 0

    def seen():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}
    before = seen()
    code, said = run(*start, "--dry_run", "true")
    assert code == 0 and "would go on from" in said and "5 updates of 2" in said, said
    code, said = run(*start, "--epochs", "1", "--dry_run", "true")
    assert code == 0 and "would only evaluate it" in said, said
    code, said = run(*start, "--lr", "1e-4", "--dry_run", "true")
    assert code == 2 and "belongs to another run" in said
    code, said = run(two_classes, "--eval", "true", "--output_dir", str(folder), "--dry_run", "true")
    assert code == 0 and "of 10 sampled pictures right" in said and "10 pictures would take" in said, said
    assert seen() == before


@pytest.mark.parametrize("flags, words", [
    (("--data_path", "/nowhere"), "There is no folder /nowhere/train"),
    (("--batch_size", "64"), "lower --batch_size to 10 or less"),
    (("--output_dir", str(ROOT / "main.py" / "run")), "main.py (it is no folder); choose another"),
    (("--eval", "true"), "nothing to evaluate"),
    (("--resume", str(ROOT / "README.md")), "is not a checkpoint"),
    (("--lr", "1e30", "--min_lr", "1e30", "--clip_grad", "none"), "is not finite"),
])
def test_what_is_wrong_is_one_sentence_and_exit_code_2(two_classes, run, flags, words):
    code, said = run(two_classes, *TRAIN, *flags, "--dry_run", "true")
    assert code == 2 and words in said.splitlines()[-1] and "Traceback" not in said, said


def test_an_unreadable_validation_picture_is_a_problem_an_unreadable_training_picture_is_told(tmp_path, run):
    data = write_images(tmp_path / "data", 2, 4)
    (data / "train" / "class000" / "1.JPEG").write_bytes(b"no picture")
    code, said = run(data, *TRAIN, "--dry_run", "true")
    assert code == 0 and "unreadable:" in said and "train/class000/1.JPEG" in said, said
    code, said = run(data, *TRAIN, "--epochs", "1")
    assert code == 0 and said.index("unreadable: ") < said.index("epoch 1/1"), said  # the short form of every start
    (data / "val" / "class001" / "2.JPEG").write_bytes(b"")
    code, said = run(data, *TRAIN, "--dry_run", "true")
    assert code == 2 and "val/class001/2.JPEG cannot be read" in said.splitlines()[-1], said
    code, said = run(data, *TRAIN, "--dry_run", "true", "--allow_bad_images", "true")
    assert code == 0, said


def test_a_large_model_on_a_cpu_is_built_on_meta_only(two_classes, run):
    code, said = run(two_classes, *TRAIN, "--model", "hornet_large_7x7", "--dry_run", "true")
    assert code == 0 and "M parameters, built without memory for them" in said and "updates  " not in said, said


def test_two_processes(two_classes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", *QUICK,
               "--data_path", str(two_classes), *TRAIN, "--index_cache", str(tmp_path), "--dry_run", "true"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "2 on 1 node, they share the CPU; versions and clocks agree" in " ".join(ended.stderr.split())
    assert "= 2 per forward pass x 1 forward pass x 2 processes" in " ".join(ended.stderr.split())
    assert ended.stderr.count("All is well") == 1


# ---------------------------------------------------------------------------------- weights that know nothing

@pytest.fixture(scope="module")
def hundred_classes(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("hundred"), 100, 1)


@pytest.fixture(scope="module")
def constant_answer(tmp_path_factory):
    """A checkpoint for 100 classes that always names the first: 1 % right."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    network = timm.create_model("hornet_pico_7x7", num_classes=100)
    network.head.bias.data[0] = 1e4
    torch.save({"model": network.state_dict()}, path)
    return path


def test_fine_tuning_stops_at_a_head_that_knows_nothing(hundred_classes, constant_answer, run):
    start = (hundred_classes, *TRAIN, "--finetune", str(constant_answer), "--batch_size", "50", "--epochs", "1")
    code, said = run(*start)
    assert code == 2 and "only 1 of 100 pictures rightly (1.0 %, chance is 1 %)" in said.splitlines()[-1], said
    code, said = run(*start, "--allow_partial", "true", "--dry_run", "true")
    assert code == 0, said


def test_evaluation_warns_of_it(hundred_classes, constant_answer, run):
    code, said = run(hundred_classes, "--eval", "true", "--resume", str(constant_answer), "--dry_run", "true")
    assert code == 0 and "warning: the loaded weights name only 1 of 100" in said, said


def test_low_scores_are_told_only_where_chance_is_lower():
    assert low_score(9, 500, 1000) is not None and "--weights ema" in low_score(0, 500, 1000)
    assert low_score(10, 500, 1000) is None
    assert low_score(0, 500, 99) is None and low_score(0, 99, 1000) is None


def test_pictures_are_spread_over_the_classes():
    targets = np.repeat(np.arange(20), np.arange(1, 21) * 5)
    chosen = spread_over_classes(targets, 60)
    assert np.bincount(targets[chosen]).tolist() == [3] * 20 and len(set(chosen.tolist())) == 60
    assert len(spread_over_classes(targets, 10 ** 6)) == len(targets)


# ----------------------------------------------------------------------------------------------- the pure pieces

def test_shared_memory_is_counted_for_all_workers_of_a_node(tmp_path):
    options = SimpleNamespace(num_workers=10, batch_size=128, input_size=224)
    assert shared_memory_needed(options, 8) == 8 * 31 * 192 * 3 * 224 * 224
    options.batch_size = 2 ** 20
    problem = shared_memory_problem(options, 8, str(tmp_path))
    assert "10 workers x 8 processes" in problem and "--shm-size" in problem
    options.num_workers = 0
    assert shared_memory_problem(options, 8, str(tmp_path)) is None


def test_the_change_that_would_help_most():
    starved = Pace(compute=1000, picture_seconds=0.01, workers=4, cpus=16)
    assert starved.waiting == pytest.approx(0.6) and starved.rate == pytest.approx(400)
    assert "--num_workers 16" in starved.advice()
    assert "shorter side" in Pace(compute=1e5, picture_seconds=0.01, workers=16, cpus=16).advice()
    assert "--use_amp" in Pace(compute=100, picture_seconds=0.01, workers=16, cpus=16, could_use_amp=True).advice()
    assert "--batch_size" in Pace(100, 0.01, 16, 16, update_freq=4, memory_share=0.3).advice()


def test_the_first_bit_that_differs_is_named():
    one = {"a": torch.tensor([0.0, float("nan")]), "b": [1, {"c": 2.5}], "d": torch.tensor(1)}
    assert first_difference(one, {**one, "a": one["a"].clone()}) is None
    assert first_difference(one, {**one, "a": torch.tensor([-0.0, float("nan")])}) == "state.a"
    assert first_difference(one, {**one, "b": [1, {"c": 2.4}]}) == "state.b.1.c"
    assert first_difference(one, {**one, "d": torch.tensor(1.0)}) == "state.d"


class Pair:
    """What rank 0 of two processes sees, the other being as `other` says."""

    world_size, rank, device, local_world_size = 2, 0, torch.device("cpu"), 2
    node_name = "one"

    def __init__(self, other=lambda mine: mine, factor=1):
        self.other, self.factor = other, factor

    def barrier(self):
        pass

    def all_gather_object(self, mine):
        return [mine, self.other(mine) if isinstance(mine, tuple) else mine]

    def all_reduce_(self, tensor, op="sum"):
        return tensor.mul_(2).add_(1).mul_(self.factor)


def test_processes_must_agree():
    assert process_problems(Pair(), "v1") == []
    old = process_problems(Pair(lambda m: ("two", m[1], m[2] | {"timm": "0.4"})), "v1")
    assert len(old) == 1 and "timm is " in old[0] and "0.4 on rank 1 (two)" in old[0]
    late = process_problems(Pair(lambda m: ("two", m[1] + 60, m[2])), "v1")
    assert late == ["the clocks of two and one are 60 s apart: set them (NTP)."]
    assert "all-reduce gives a wrong sum" in process_problems(Pair(factor=3), "v1")[0]


def test_the_short_form_is_silent_when_all_is_well():
    options = SimpleNamespace(num_workers=0, batch_size=2, input_size=32)
    assert start_warnings(options, Pair(), "v1", None) == []
    assert start_warnings(options, Pair(), "v1", SampleCheck(8, 2, 0.01, tiny=["a"])) == []
    assert start_warnings(options, Pair(), "v1", SampleCheck(8, 2, 0.01, [("x", "empty")])) == ["unreadable: x (empty)"]
    small = start_warnings(options, Pair(), "v1", SampleCheck(8, 2, 0.01, tiny=["a"] * 5))
    assert small == ["5 pictures are smaller than half the input size, such as a"]


def test_the_report_ends_with_the_first_problem():
    report = Report("title")
    report.end()
    report.problem("a", "first is wrong.")
    report.problem("b", "second is wrong.")
    with pytest.raises(UserError, match="first is wrong. \\(1 more above"):
        report.end()


def test_writing_is_tried_without_a_trace(tmp_path):
    check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def killed_trial(tmp_path):
    """runs/, where a dry run of runs/mine was killed."""
    above = tmp_path / "runs"
    above.mkdir()
    child = os.fork()
    if child == 0:
        try:
            with trial_folder(str(above / "mine")) as folder:
                with open(os.path.join(folder, "checkpoint-e0u1.pth"), "wb") as file:
                    file.write(b"half")
                time.sleep(60)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while not list(above.glob(".preflight-*/checkpoint-e0u1.pth")) and time.monotonic() < deadline:
        time.sleep(0.01)
    sweep_trials(above / "mine")
    assert len(list(above.iterdir())) == 1, "one that is under way must stay"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(above.iterdir())) == 1
    return above


def test_what_a_killed_dry_run_left_is_swept_by_the_next_one(killed_trial):
    with trial_folder(str(killed_trial / "other")) as folder:
        assert [str(path) for path in killed_trial.iterdir()] == [folder]
        sweep_trials(killed_trial / "mine")
        assert os.path.isdir(folder)
    assert list(killed_trial.iterdir()) == []


def test_what_a_killed_dry_run_left_is_swept_by_a_training(killed_trial):
    (killed_trial / ".preflight-of-somebody").mkdir()  # one that is just being made has no owner yet
    (killed_trial / "mine").mkdir()
    assert Checkpoints(killed_trial / "mine").sweep() == 0
    assert sorted(path.name for path in killed_trial.iterdir()) == [".preflight-of-somebody", "mine"]


def test_a_restore_that_leaves_something_out_is_found(two_classes, run, monkeypatch):
    monkeypatch.setattr(TrainingRun, "_restore_weights", lambda self, state: None)
    code, said = run(two_classes, *TRAIN, "--dry_run", "true")
    assert code == 2 and "differs after saving and loading" in said.splitlines()[-1], said


def test_a_disk_that_is_too_small_is_a_problem(two_classes, tmp_path, run, monkeypatch):
    monkeypatch.setattr(dryrun, "free_space", lambda folder: 10 ** 6)
    code, said = run(two_classes, *TRAIN, "--output_dir", str(tmp_path / "run"), "--dry_run", "true")
    assert code == 2 and "1.0 MB can be had" in said.splitlines()[-1] and "--save_ckpt_num" in said, said
