"""Process groups: collectives, devices, rendezvous limits."""
import datetime
import os
import signal
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.errors import UserError
from launch.places import Place
from launch.process import choose_device, group_timeout, name_this_start, refuse_shared_devices, start
from tests.kits.processes import PROGRAMS, TOY, expected_value, finish, start_ranks, start_torchrun, wait_for

COLLECTIVES = """
import types, torch, sys
from launch.process import start
with start(types.SimpleNamespace(device="cpu", hang_timeout=60)) as process:
    rank, size = process.rank, process.world_size
    assert process.all_reduce_(torch.tensor([rank + 1.0])).item() == size * (size + 1) / 2
    assert process.all_reduce_(torch.tensor([rank]), "max").item() == size - 1
    assert process.all_gather_object({"rank": rank}) == [{"rank": r} for r in range(size)]
    assert process.broadcast_object("from rank 1" if rank == 1 else None, source=1) == "from rank 1"
    process.barrier()
    torch.manual_seed(rank)
    model = process.wrap(torch.nn.Linear(4, 2))
    first = process.all_gather_object(model.module.weight.tolist())
    assert first[0] == first[1], "ranks start from different weights"
    for micro_batch in range(2):
        model.require_backward_grad_sync = micro_batch == 1
        model(torch.full((1, 4), rank + micro_batch + 1.0)).sum().backward()
    assert model.module.weight.grad[0, 0].item() == sum(r + m + 1.0 for r in range(size) for m in range(2)) / size
    assert process.backend == "gloo" and process.waits_in == ""
print("well")
"""


def test_a_lone_process_needs_no_group():
    with start(types.SimpleNamespace(device="cpu")) as process:
        model = torch.nn.Linear(1, 1)
        assert process.wrap(model) is model
        assert process.all_reduce_(torch.tensor([3])).item() == 3
        assert process.broadcast_object("x") == "x" and process.all_gather_object(1) == [1]
        process.barrier()
        assert process.is_main and process.backend == "" and not torch.distributed.is_initialized()


def test_collectives_and_accumulation_between_two_processes():
    for code, output in finish(start_ranks(2, "-c", COLLECTIVES)):
        assert code == 0 and "well" in output, output


def test_a_resumed_run_adds_gradients_in_the_same_order():
    # Two processes would hide it: a + b is b + a.
    for code, output in finish(start_ranks(3, PROGRAMS / "resumed_updates.py")):
        assert code == 0 and "same bits: True" in output, output


def test_torchrun(tmp_path):
    [(code, output)] = finish([start_torchrun(2, TOY, tmp_path, 10)])
    assert code == 0, output
    assert str(expected_value(10, 2)) in (tmp_path / "state.json").read_text()


@pytest.mark.slow
def test_torchrun_starts_a_failed_group_again(tmp_path):
    launcher = start_torchrun(2, TOY, tmp_path, 60, "pace=0.05", restarts=2)
    wait_for(lambda: (tmp_path / "now").exists())
    os.kill(int((tmp_path / "pids" / "1").read_text()), signal.SIGKILL)
    [(code, output)] = finish([launcher])
    assert code == 0, output
    assert str(expected_value(60, 2)) in (tmp_path / "state.json").read_text()


def test_what_an_earlier_start_left_in_the_store_is_not_believed():
    store, limit = torch.distributed.HashStore(), datetime.timedelta(seconds=60)

    def name(rank: int) -> str:
        if rank == 0:
            time.sleep(0.3)  # the others see the earlier start first
        return name_this_start(store, Place(rank=rank, world_size=3), limit)

    with ThreadPoolExecutor(3) as threads:
        names = [set(threads.map(name, range(3))) for _ in range(3)]
    assert all(len(found) == 1 for found in names) and len(set.union(*names)) == 3


def test_missing_ranks_are_named():
    program = ("import types; from launch.process import start; from common.errors import UserError\n"
               "try: start(types.SimpleNamespace(device='cpu', rendezvous_timeout=3))\n"
               "except UserError as error: print(error)")
    outputs = [output for _, output in finish(start_ranks(4, "-c", program, absent=(1, 3)))]
    sentence = "only 2 of 4 processes arrived within 3 s; missing rank(s): 1, 3"
    assert sentence in outputs[0], outputs[0]
    assert sentence in outputs[1] or "rank 0 has given up" in outputs[1], outputs[1]


def test_a_missing_rank_0_is_named():
    program = ("import types; from launch.process import start; from common.errors import UserError\n"
               "try: start(types.SimpleNamespace(device='cpu', rendezvous_timeout=2))\n"
               "except UserError as error: print(error)")
    [(code, output)] = finish(start_ranks(2, "-c", program, absent=(0,)))
    assert "found no rank 0 at 127.0.0.1 within 2 s" in output, output


@pytest.mark.parametrize("wanted", ["gpu", "cuda:x", "tpu:0"])
def test_unknown_devices_are_refused(wanted):
    with pytest.raises(UserError, match="use auto, cuda, xpu, mps, cpu"):
        choose_device(wanted, 0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device_is_refused_whatever_the_scheduler_says(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="PyTorch finds no cuda device"):
        choose_device("cuda", 0, 1)
    assert choose_device("auto", 0, 2).type in ("cpu", "mps", "xpu")


def test_one_device_for_two_ranks_is_refused_naming_both():
    with pytest.raises(UserError, match="ranks 1 and 3 on node 0 share one device"):
        refuse_shared_devices([(0, "a"), (0, "b"), (1, "b"), (0, "b")])
    refuse_shared_devices([(0, ""), (0, ""), (1, "a"), (2, "a")])


def test_the_group_waits_longer_than_the_watchdog():
    for hang_timeout in (5.0, 180.0, 1000.0):
        assert group_timeout(hang_timeout) > 10 * hang_timeout
