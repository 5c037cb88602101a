"""Stop requests: signals, agreement of all ranks, time limits."""
import json
import os
import signal
import time
import types

import pytest
import torch

from launch.places import Place
from launch.process import Process, start
from launch.stop import StopRequest, job_end_time, time_left
from tests.kits.processes import (
    TOY,
    Rank,
    alive,
    environment,
    expected_value,
    finish,
    start_ranks,
    start_torchrun,
    wait_for,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_sets_a_flag_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with start(types.SimpleNamespace(device="cpu")) as process, StopRequest() as stop:
        assert not stop.agreed(process)
        signal.raise_signal(number)
        assert stop.requested and stop.agreed(process)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_the_second_interrupt_interrupts():
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_forked_loader_worker_outlives_the_signals_of_its_group():
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            os._exit(7 if not stop.requested else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("text, seconds", [("1-02:03:04", 93784), ("02:03:04", 7384), ("3:04", 184), ("0:00", 0),
                                           ("UNLIMITED", float("inf")), ("INVALID", float("inf")), ("", float("inf"))])
def test_time_left(text, seconds):
    assert time_left(text) == seconds


def test_the_end_of_a_job():
    assert job_end_time({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    assert job_end_time({}) == float("inf")
    assert job_end_time({"SLURM_JOB_ID": "1", "SLURM_PROCID": "3"}) == float("inf")  # rank 0 asks for all


def test_training_stops_before_the_time_limit(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 3)))
    with StopRequest(stop_before_end=1) as stop:
        assert not stop.requested
        wait_for(lambda: stop.requested)
        assert "time limit" in stop.reason


def test_a_lone_process_ends_with_75_and_goes_on_to_the_same_result(tmp_path):
    process = Rank([str(TOY), str(tmp_path), "10000"], environment())
    wait_for(lambda: (tmp_path / "now").exists())
    process.send_signal(signal.SIGTERM)
    assert finish([process])[0][0] == 75
    assert not (tmp_path / "DONE").exists()
    updates = json.loads((tmp_path / "state.json").read_text())["update"] + 5
    assert finish([Rank([str(TOY), str(tmp_path), str(updates)], environment())])[0][0] == 0
    assert json.loads((tmp_path / "state.json").read_text())["value"] == expected_value(updates, 1)


def test_a_signal_to_one_rank_stops_all_at_one_update(tmp_path):
    processes = start_ranks(2, TOY, tmp_path, 10000)
    wait_for(lambda: (tmp_path / "now").exists())
    processes[1].send_signal(signal.SIGUSR2)
    assert [code for code, _ in finish(processes)] == [75, 75]
    updates = {(tmp_path / f"stopped{rank}").read_text() for rank in range(2)}
    assert len(updates) == 1
    assert int(updates.pop()) == json.loads((tmp_path / "state.json").read_text())["update"]


@pytest.mark.slow
@pytest.mark.parametrize("target, number", [
    ("launcher", signal.SIGTERM), ("launcher", signal.SIGUSR2), ("group", signal.SIGUSR2)])
def test_stop_signals_to_torchrun_lose_nothing(tmp_path, target, number):
    launcher = start_torchrun(2, TOY, tmp_path, 60, "pace=0.05")
    pids = tmp_path / "pids"
    wait_for(lambda: (tmp_path / "now").exists())
    ranks = [int((pids / str(rank)).read_text()) for rank in range(2)]
    for pid in [launcher.pid] if target == "launcher" else [launcher.pid, *ranks]:
        os.kill(pid, number)
    finish([launcher])
    wait_for(lambda: not any(alive(pid) for pid in ranks))
    if not (tmp_path / "DONE").exists():
        [(code, output)] = finish([start_torchrun(2, TOY, tmp_path, 60)])
        assert code == 0, output
    assert json.loads((tmp_path / "state.json").read_text())["value"] == expected_value(60, 2)


def test_one_process_hears_of_anothers_request_without_waiting_for_it():
    store = torch.distributed.HashStore()
    one, other = (Process(Place(rank=rank, world_size=2), torch.device("cpu"), store=store) for rank in range(2))
    asked, unaware = StopRequest(), StopRequest()
    assert not asked.heard(one) and not unaware.heard(other)
    asked.request("SIGUSR2")
    assert asked.heard(one) and unaware.heard(other)
    assert "another process" in unaware.reason
