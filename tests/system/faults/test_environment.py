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
    place.other = RunFolder(place.run)
    place.other.lock()


def abandoned(place):
    place.run.mkdir()
    owner = {"host": "node07", "pid": 4711, "job": "99", "since": "2026-01-01"}
    (place.run / "owner.json").write_text(json.dumps(owner))


@table(
    Row("a run folder in use", "", "?", ("{run}", f"process {os.getpid()}", "--output_dir"), owned),
    Row("a run folder whose owner was killed", "", 0, ("node07", "4711", "job 99", "2026-01-01"), abandoned),
    Row("an index cache that cannot be written", "--index_cache /proc/nothing", 0),
    Row("a device that is none", "--device gpu", "?", ("--device gpu", "cpu")),
    Row("sample data where other files are", "--data_set SAMPLE --data_path {data}/train", "?",
        ("{data}/train",)),
    Row("CIFAR that is missing", "--data_set CIFAR", "?", ("{data}",)),
    Row("CIFAR that is a text file", "--data_set CIFAR", "?", ("{data}/train",),
        lambda place: [shutil.rmtree(place.data / "train"), (place.data / "train").write_text("hello")]),
    Row("evaluating beside a training", "--resume {trained}/checkpoint-0.pth --output_dir {run}", 0, (),
        owned, base="eval"))
def test_environment(row, place, capfd):
    check(row, place, capfd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu(place, capfd):
    check(Row("cuda", "--device cuda:1", "?", ("cuda", "--device auto")), place, capfd)


def test_ranks_without_an_address_to_meet_at(place, capfd, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    check(Row("no address", "", "?", ("MASTER_ADDR",)), place, capfd)


def test_a_missing_package_for_extra_logging_costs_only_the_log(place, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    check(Row("no packages", "--enable_wandb true", 0, ("pip install wandb", "pip install tensorboardX")),
          place, capfd)


def test_no_network_names_the_file_to_fetch_by_hand(place, capfd, monkeypatch):
    monkeypatch.setenv("HORNET_CACHE", str(place.here / "weights"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    check(Row("offline", "--pretrained true --model hornet_tiny_7x7", "?", ("https://", "{here}/weights/"),
              base="eval"),
          place, capfd)


def test_an_interrupted_evaluation_ends_with_130(place, capfd, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr("engine.evaluate", interrupt)
    code, text = start(command("eval", "--resume {trained}/checkpoint-0.pth", place), capfd)
    assert code == 130 and "Traceback" not in text
