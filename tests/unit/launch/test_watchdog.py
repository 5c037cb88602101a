"""Failing, dying, hanging and stopped ranks: named, and nobody waits for ever; a suspended job is none of
these."""
import os
import signal
import time
import types

import pytest
import torch

from common.ledger import Ledger
from common.outcome import Outcome
from launch.process import Process
from launch.watchdog import LONGEST_STEP, Beat, Cause, RunningClock, Watchdog
from tests.kits.processes import (
    TOY,
    descendants,
    expected_value,
    finish,
    start_ranks,
    start_torchrun,
    wait_for,
)


def beats(*given: dict) -> list[Beat]:
    return [Beat(**{"rank": rank, "node": f"node{rank:02}", "pid": 1, "phase": "backward", "update": 9, "order": 30,
                    **more}) for rank, more in enumerate(given)]


def judge(found: list[Beat], silent: dict[int, float] = {}, hang_timeout: float = 180.0, lost: bool = False) -> Cause | None:  # noqa: B006
    watchdog = Watchdog(Process(device=torch.device("cpu")), None, hang_timeout)
    for beat in found:
        beat.patience, beat.silence = hang_timeout or float("inf"), silent.get(beat.rank, 0.0)
    return watchdog._judge(found, lost)


def test_the_rank_that_keeps_the_others_waiting_is_named():
    cause = judge(beats({"age": 211}, {"age": 212, "phase": "data", "order": 29},
                        {"age": 210, "waits_in": "all_reduce", "order": 31}))
    assert (cause.rank, cause.phase, cause.update, cause.hang) == (1, "data", 9, True)
    for words in ("rank 1 (node01)", "phase data, update 9", "212 s", "rank 2 in all_reduce", "--hang_timeout"):
        assert words in cause.text


def test_nobody_is_named_while_the_slowest_still_has_time():
    assert judge(beats({"age": 400, "waits_in": "all_reduce", "order": 31}, {"age": 100, "phase": "data"})) is None
    assert judge(beats({"age": 400}), hang_timeout=0) is None


def test_start_the_first_update_and_saving_get_more_patience():
    watchdog = Watchdog(Process(device=torch.device("cpu")), None, 10)
    patience = []
    for phase in [("start", -1), ("data", 7), ("saving", 7), ("data", 8), ("evaluation", 8), ("saving", 8)]:
        watchdog.phase(*phase)
        watchdog._send()
        patience.append(watchdog.beat.patience)
    assert patience == [100, 30, 30, 10, 10, 30]


def test_a_silent_rank_is_named_even_if_it_was_waiting():
    found = beats({"age": 5, "waits_in": "all_reduce"}, {"age": 200, "waits_in": "all_reduce"})
    cause = judge(found, silent={1: 190})
    assert (cause.rank, cause.hang) == (1, True) and "gone" in cause.text
    assert judge(found, silent={1: 6}) is None
    assert (judge(found, {1: 6}, lost=True).rank, judge(found, {1: 6}, lost=True).hang) == (1, False)  # it is gone


def test_a_connection_that_broke_between_ranks_that_run_is_no_text_of_sockets():
    watchdog = Watchdog(Process(device=torch.device("cpu"), store=torch.distributed.HashStore()))
    watchdog._error = RuntimeError("[/pytorch/third_party/gloo/tcp/pair.cc:534] Connection closed by peer [::1]:3")
    watchdog._send()
    assert watchdog._look() is None  # a peer that is gone is seen in a moment
    watchdog._clock = lambda: 60.0
    cause = watchdog._look()
    assert cause.rank == 0 and "network" in cause.text and not any(w in cause.text for w in ("gloo", "pair.cc", "peer"))


def test_ranks_that_all_wait_for_each_other_are_named():
    text = judge(beats({"age": 200, "waits_in": "all_reduce"}, {"age": 200, "waits_in": "barrier"})).text
    assert "rank 0" in text and "all_reduce" in text and "rank 1 in barrier" in text


def test_order_grows_with_work_and_not_with_signs_of_life():
    watchdog = Watchdog(types.SimpleNamespace(rank=0, node_name="n"))
    orders = []
    for name, update in [("data", 0), ("forward", 0), ("evaluation", 0), ("evaluation", 0), ("data", 1)]:
        watchdog.phase(name, update)
        orders.append(watchdog.beat.order)
    assert orders == [1, 2, 3, 3, 4]


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
    status, attempt = Ledger(folder).status(), Ledger(folder).newest()
    assert status["state"] == attempt["state"] == Outcome.FAILED
    assert {status[key] == attempt[key] for key in ("rank", "node", "phase", "update", "cause")} == {True}
    return status


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_an_exception_ends_all_ranks_and_every_log_names_it(tmp_path):
    rank = 1
    results = finish(start_ranks(2, TOY, tmp_path, 1000, f"raise={rank}@5"))
    assert [code for code, _ in results] == [1, 1]
    assert last_line(results[rank][1]).endswith("ArithmeticError: one divided by nothing")
    other = last_line(results[1 - rank][1])
    assert f"rank {1 - rank}" in other and f"rank {rank}" in other and "ArithmeticError" in other
    assert (failed(tmp_path)["rank"], failed(tmp_path)["update"]) == (rank, 5)
    assert "ArithmeticError: one divided by nothing" in failed(tmp_path)["cause"]


def test_a_users_mistake_on_one_rank_is_one_sentence(tmp_path):
    results = finish(start_ranks(2, TOY, tmp_path, 1000, "user_error=1@5"))
    assert [code for code, _ in results] == [2, 2]
    assert last_line(results[1][1]) == "[rank 1] the value 7 is not accepted: use 8."
    assert not any("Traceback" in output for _, output in results)
    assert "the value 7" in failed(tmp_path)["cause"]


def test_the_watchdog_can_be_switched_off(tmp_path):
    assert [code for code, _ in finish(start_ranks(2, TOY, tmp_path, 5, "hang_timeout=0"))] == [0, 0]


def test_a_rank_that_hangs_in_loading_is_named_with_everyones_stacks(tmp_path):
    results = finish(start_ranks(2, TOY, tmp_path, 10000, "sleep=1@60:data", "hang_timeout=4"))
    assert [code for code, _ in results] == [1, 1]
    for _, output in results:
        assert "rank 1 in phase data, update 60" in output and "rank 0 in all_reduce" in output
    assert (failed(tmp_path)["rank"], failed(tmp_path)["phase"], failed(tmp_path)["update"]) == (1, "data", 60)
    assert "in train" in (tmp_path / "stacks-rank1.txt").read_text()
    assert "all_reduce" in (tmp_path / "stacks-rank0.txt").read_text()


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_suspended_job_continues_with_the_same_result(tmp_path, world_size):
    """Ctrl-Z and scontrol suspend stop every process, here for twice the patience, and not at one moment."""
    ranks = start_ranks(world_size, TOY, tmp_path, 60, "hang_timeout=4", "pace=0.05")
    wait_for(lambda: int((tmp_path / "now").read_text() or 0) > 20 if (tmp_path / "now").exists() else False)
    for name in ("SIGSTOP", "SIGCONT"):
        for rank in ranks:
            os.kill(rank.pid, getattr(signal, name))
            time.sleep(0.3)
        time.sleep(8 if name == "SIGSTOP" else 0)
    assert [code for code, _ in finish(ranks)] == [0] * world_size
    assert str(expected_value(60, world_size)) in (tmp_path / "state.json").read_text()
    assert Ledger(tmp_path).status()["state"] == Outcome.DONE


@pytest.mark.slow
def test_a_suspended_torchrun_continues_with_the_same_result(tmp_path):
    agent = start_torchrun(2, TOY, tmp_path, 60, "hang_timeout=4", "pace=0.05")
    wait_for(lambda: (tmp_path / "now").exists() and int((tmp_path / "now").read_text() or 0) > 20)
    for name in ("SIGSTOP", "SIGCONT"):
        for pid in (agent.pid, *descendants(agent.pid)):
            os.kill(pid, getattr(signal, name))
        time.sleep(8 if name == "SIGSTOP" else 0)
    [(code, output)] = finish([agent])
    assert code == 0 and str(expected_value(60, 2)) in (tmp_path / "state.json").read_text(), output
    assert Ledger(tmp_path).status()["state"] == Outcome.DONE


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_wakes_to_no_other_blame(tmp_path, rank):
    processes = start_ranks(2, TOY, tmp_path, 10000, "hang_timeout=4")
    wait_for(lambda: (tmp_path / "now").exists() and int((tmp_path / "now").read_text() or 0) > 60)
    processes[rank].send_signal(signal.SIGSTOP)
    [(code, output)] = finish([processes[1 - rank]])
    assert code == 1 and failed(tmp_path)["rank"] == rank, output
    blame = failed(tmp_path)
    processes[rank].send_signal(signal.SIGCONT)
    assert finish([processes[rank]], 30)[0][0] != 0
    assert failed(tmp_path) == blame


def test_a_lone_process_that_fails_is_recorded(tmp_path):
    assert finish(start_ranks(1, TOY, tmp_path, 10, "raise=0@5"))[0][0] == 1
    assert (failed(tmp_path)["rank"], failed(tmp_path)["update"]) == (0, 5)


@pytest.mark.slow
def test_a_lone_process_that_hangs_says_where(tmp_path):
    [(code, output)] = finish(start_ranks(1, TOY, tmp_path, 10000, "sleep=0@60:data", "hang_timeout=4"))
    assert code == 1 and "phase data, update 60" in output
    assert "in train" in (tmp_path / "stacks-rank0.txt").read_text() and failed(tmp_path)["phase"] == "data"
