"""Stop requests: signals, agreement of all ranks, time limits."""
import signal
import subprocess
import sys
import time

import pytest
import torch

from launch import stop as stop_module
from launch.process import Process, start
from launch.stop import StopRequest, job_end_time
from tests.kits.processes import TOY, environment, wait_for

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    """The handlers as they were: after a stop StopRequest ignores signals, for the process is about to end."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_a_flag_and_without_one_the_handlers_are_put_back(number, handlers):
    with start("cpu") as process, StopRequest() as stop:
        assert not stop.agreed(process)
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    with start("cpu") as process, StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.requested and stop.agreed(process) and stop.reason == signal.Signals(number).name


def test_signals_until_the_very_end_of_the_process_change_no_exit_code(tmp_path):
    program = subprocess.Popen([sys.executable, TOY, tmp_path, "100000"], env=environment())
    wait_for(lambda: (tmp_path / "now").exists())
    while program.poll() is None:
        program.send_signal(signal.SIGTERM)
        time.sleep(0.0005)
    assert program.returncode == 75


def test_a_signal_within_the_agreement_counts_from_the_next_one_on():
    class Process:
        def any(self, flag):
            signal.raise_signal(signal.SIGUSR2)  # the others have heard `flag`, not this
            return flag

    with StopRequest() as stop:
        assert not stop.agreed(Process())
        assert stop.agreed(Process())


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested


def test_a_second_interrupt_within_a_second_is_the_same_and_a_later_one_interrupts(monkeypatch):
    """torchrun passes on the SIGINT that a terminal has sent to every process already."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT"
        monkeypatch.setattr(stop_module, "SAME_CTRL_C", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_training_stops_before_the_end_of_a_job(monkeypatch):
    monkeypatch.setattr(stop_module, "squeue", lambda job, what: {"1": "2026-11-26T10:00:00"}.get(job, "N/A"))
    assert job_end_time({"SLURM_JOB_ID": "1"}) == time.mktime((2026, 11, 26, 10, 0, 0, 0, 0, -1))
    for env in ({}, {"SLURM_JOB_ID": "2"}, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "3"}):  # rank 0 asks for all
        assert job_end_time(env) == float("inf")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 3)))
    with StopRequest(stop_before_end=1) as stop:
        assert not stop.requested
        wait_for(lambda: stop.requested)
        assert "time limit" in stop.reason


def test_one_process_hears_of_anothers_request_without_waiting_for_it():
    store = torch.distributed.HashStore()
    one, other = (Process(rank=rank, world_size=2, device=torch.device("cpu"), store=store) for rank in range(2))
    asked, unaware = StopRequest(), StopRequest()
    assert not asked.heard(one) and not unaware.heard(other)
    asked.request("SIGUSR2")
    assert asked.heard(one) and unaware.heard(other) and "another process" in unaware.reason
