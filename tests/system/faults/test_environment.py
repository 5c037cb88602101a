"""Machines and surroundings that lack something, or have something of somebody else's."""
import json
import os
import shutil
import sys

import pytest
import torch

from run.folder import RunFolder
from tests.kits.faults import Row, check, command, start, table


def owned(place):
    """Another training owns run/: a lock of a second open file refuses the first, in one process too."""
    other = RunFolder(place.run)
    other.lock()
    place.other = other


def abandoned(place):
    place.run.mkdir()
    (place.run / "owner.json").write_text(json.dumps({"host": "node07", "pid": 4711, "job": "99",
        "since": "2026-01-01"}))


@table([
    Row("a run folder in use", "", 2,
        ("{run} is in use by another training (host ", f"process {os.getpid()}", "choose another --output_dir"),
        owned),
    Row("a run folder whose owner was killed", "", 0,
        ("(host node07, process 4711, job 99, since 2026-01-01) ended without a word",),
        abandoned),
    Row("an index cache that cannot be written", "--index_cache /proc/nothing", 0, ("epoch 1/1 done",)),
    Row("a device that is no device", "--device gpu", 2, ("--device gpu is out of range; it takes auto, cpu",)),
    Row("sample data where other files are", "--data_set SAMPLE --data_path {data}/train", 2,
        ("holds other files and not the sample data",)),
    Row("CIFAR that is not there", "--data_set CIFAR", 2,
        ("cannot be read (Is a directory)", "unpack the python version of CIFAR")),
    Row("CIFAR that is a text file", "--data_set CIFAR", 2, ("is not a CIFAR file",),
        lambda place: [shutil.rmtree(place.data / "train"), (place.data / "train").write_text("hello")]),
])
def test_environment(row, place, capfd):
    check(row, place, capfd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(place, capfd):
    check(Row("cuda", "--device cuda:1", 2,
        ("PyTorch finds no cuda device on this machine; use --device auto",)), place, capfd)


def test_evaluating_beside_a_training_works(place, capfd):
    place.trained_run()
    owned(place)
    check(Row("beside", "--output_dir {run}", 0, ("of 8 pictures right",), base="eval"), place, capfd)


def test_ranks_without_an_address_to_meet_at(place, capfd, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    check(Row("no address", "", 2, ("2 processes but no MASTER_ADDR in the environment",)), place, capfd)


def test_a_missing_package_for_extra_logging_costs_only_the_log(place, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    check(Row("no packages", "--enable_wandb true", 0,
        ("pip install wandb", "pip install tensorboardX", "epoch 1/1 done")), place, capfd)


def test_no_network_names_the_file_to_fetch_by_hand(place, capfd, monkeypatch):
    monkeypatch.setenv("HORNET_CACHE", str(place.here / "weights"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("models.download._TRIES", 1)
    check(Row("offline", "--pretrained true --model hornet_tiny_7x7", 2,
              ("could not be downloaded from https://", "put it at {here}/weights/"), base="eval"), place, capfd)


def test_an_interrupted_evaluation_says_so(place, capfd, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("evaluation._say", interrupt)
    code, text = start(command("eval", "--resume {trained}/checkpoint-0.pth", place), capfd)
    assert code == 130 and text.rstrip().endswith("interrupted") and "Traceback" not in text
