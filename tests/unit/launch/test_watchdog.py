"""Failing, dying, hanging and stopped ranks: named, and nobody waits for ever; a suspended job is none of
these."""
import os
import signal
import time

import pytest
import torch

from common.ledger import Ledger
from common.outcome import Outcome
from launch.process import Process
from launch.watchdog import LONGEST_STEP, Beat, Cause, RunningClock, Watchdog
from tests.kits.processes import TOY, at_update, descendants, expected, finish, start_ranks, start_torchrun

INSIDE = {"waits_in": "all_reduce", "order": 31}


def judge(*beats: dict, silent: dict[int, float] = {}, patience: float = 180.0, lost: bool = False) -> Cause | None:  # noqa: B006
    """Whom the watchdog blames when the ranks' heartbeats are `beats`."""
    found = [Beat(**{"rank": rank, "node": f"node{rank:02}", "pid": 1, "phase": "backward", "update": 9, "order": 30,
                     "patience": patience, "silence": silent.get(rank, 0.0), **more}) for rank, more in enumerate(beats)]
    return Watchdog(Process(device=torch.device("cpu")))._judge(found, lost)


def test_the_rank_that_keeps_the_others_waiting_is_named():
    cause = judge({"age": 211}, {"age": 212, "phase": "data", "order": 29}, {"age": 210, **INSIDE})
    assert (cause.rank, cause.phase, cause.update, cause.hang) == (1, "data", 9, True)
    for words in ("rank 1 (node01)", "phase data, update 9", "212 s", "rank 2 in all_reduce", "--hang_timeout"):
        assert words in cause.text
    text = judge({"age": 200, "waits_in": "all_reduce"}, {"age": 200, "waits_in": "barrier"}).text  # for each other
    assert "rank 0" in text and "all_reduce" in text and "rank 1 in barrier" in text
    # Nobody while the slowest still has time.
    assert judge({"age": 400, **INSIDE}, {"age": 100, "phase": "data"}) is None


def test_a_silent_rank_is_named_even_if_it_was_waiting():
    found = {"age": 5, "waits_in": "all_reduce"}, {"age": 200, "waits_in": "all_reduce"}
    cause, gone = judge(*found, silent={1: 190}), judge(*found, silent={1: 6}, lost=True)
    assert (cause.rank, cause.hang, gone.rank, gone.hang) == (1, True, 1, False) and "gone" in cause.text
    assert judge(*found, silent={1: 6}) is None


def test_start_the_first_update_and_saving_get_more_patience():
    """And the order grows with work, not with signs of life."""
    watchdog, off = (Watchdog(Process(device=torch.device("cpu")), seconds) for seconds in (10, 0))
    found = []
    for phase in [("start", -1), ("data", 7), ("saving", 7), ("data", 8), ("evaluation", 8), ("evaluation", 8)]:
        watchdog.phase(*phase)
        watchdog._send()
        found.append((watchdog.beat.patience, watchdog.beat.order))
    assert found == [(100, 0), (30, 1), (30, 2), (10, 3), (10, 4), (10, 4)]
    off._send()
    assert off.beat.patience == float("inf")


def test_a_connection_that_broke_between_ranks_that_run_is_no_text_of_sockets():
    watchdog = Watchdog(Process(device=torch.device("cpu"), store=torch.distributed.HashStore()))
    watchdog._error = RuntimeError("[/pytorch/third_party/gloo/tcp/pair.cc:534] Connection closed by peer [::1]:3")
    watchdog._send()
    assert watchdog._look() is None  # a peer that is gone is seen in a moment
    watchdog._clock = lambda: 60.0
    cause = watchdog._look()
    assert cause.rank == 0 and "network" in cause.text and not any(w in cause.text for w in ("gloo", "pair.cc", "peer"))


def test_the_clock_stands_still_while_the_process_does(monkeypatch):
    moment = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    clock = RunningClock()
    for step in (1.0, 1.0, 500.0, 1.0):  # stopped for 500 s; whoever wakes first reads the same
        moment[0] += step
        read = clock()
        clock.tick()
        assert clock() == read
    assert clock() == 3.0 + LONGEST_STEP


def failed(folder) -> dict:
    """What status.json and the ledger of attempts say, which must be the same."""
    status, attempt = Ledger(folder).read("status.json"), Ledger(folder).newest()
    assert status["state"] == attempt["state"] == Outcome.FAILED
    assert {status[key] == attempt[key] for key in ("rank", "node", "phase", "update", "cause")} == {True}
    return status


def test_a_users_mistake_on_one_rank_is_one_sentence(tmp_path):
    results = finish(start_ranks(2, TOY, tmp_path, 1000, "user_error=1@5"))
    assert [code for code, _ in results] == [2, 2]
    assert results[1][1].strip().splitlines()[-1] == "[rank 1] the value 7 is not accepted: use 8."
    assert not any("Traceback" in output for _, output in results)
    assert "the value 7" in failed(tmp_path)["cause"]


def test_a_lone_process_that_fails_is_recorded(tmp_path):
    assert finish(start_ranks(1, TOY, tmp_path, 10, "raise=0@5"))[0][0] == 1
    assert (failed(tmp_path)["rank"], failed(tmp_path)["update"]) == (0, 5)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_rank_that_hangs_in_loading_is_named_with_everyones_stacks(tmp_path, world_size):
    last = world_size - 1
    for code, output in finish(start_ranks(world_size, TOY, tmp_path, 10000, f"sleep={last}@60:data", "hang_timeout=4")):
        assert code == 1 and f"rank {last} in phase data, update 60" in output
        assert "rank 0 in all_reduce" in output or world_size == 1
    assert (failed(tmp_path)["rank"], failed(tmp_path)["phase"], failed(tmp_path)["update"]) == (last, "data", 60)
    assert "in train" in (tmp_path / f"stacks-rank{last}.txt").read_text()
    assert "all_reduce" in (tmp_path / "stacks-rank0.txt").read_text() or world_size == 1


@pytest.mark.parametrize("launcher, world_size", [
    pytest.param("none", 1, marks=pytest.mark.slow), ("none", 2), pytest.param("torchrun", 2, marks=pytest.mark.slow)])
def test_a_suspended_job_continues_with_the_same_result(tmp_path, launcher, world_size):
    """Ctrl-Z and scontrol suspend stop every process, here for twice the patience, and not at one moment."""
    command = (world_size, TOY, tmp_path, 60, "hang_timeout=4", "pace=0.05")
    processes = [start_torchrun(*command)] if launcher == "torchrun" else start_ranks(*command)
    at_update(tmp_path, 20)
    pids = [pid for process in processes for pid in (process.pid, *descendants(process.pid))]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
            time.sleep(0.3)
        time.sleep(8 if number == signal.SIGSTOP else 0)
    for code, output in finish(processes):
        assert code == 0, output
    assert str(expected(60, world_size)) in (tmp_path / "state.json").read_text()
    assert Ledger(tmp_path).read("status.json")["state"] == Outcome.DONE


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_wakes_to_no_other_blame(tmp_path, rank):
    processes = start_ranks(2, TOY, tmp_path, 10000, "hang_timeout=4")
    at_update(tmp_path, 60)
    processes[rank].send_signal(signal.SIGSTOP)
    [(code, output)] = finish([processes[1 - rank]])
    assert code == 1 and failed(tmp_path)["rank"] == rank, output
    blame = failed(tmp_path)
    processes[rank].send_signal(signal.SIGCONT)
    assert finish([processes[rank]], 30)[0][0] != 0 and failed(tmp_path) == blame
