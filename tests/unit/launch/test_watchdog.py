"""Failing, dying, hanging and stopped ranks: named, and nobody waits for ever."""
import json
import os
import signal
import time
import types

import pytest

from launch.places import Place
from launch.process import Process
from launch.watchdog import Beat, Watchdog
from tests.kits.processes import TOY, alive, finish, start_ranks, start_torchrun, wait_for


def beats(*given: dict) -> list[Beat]:
    return [Beat(**{"rank": rank, "node": f"node{rank:02}", "pid": 1, "phase": "backward", "update": 9, "order": 30,
                    "first": False, **more}) for rank, more in enumerate(given)]


def judge(found: list[Beat], silent: dict[int, float] = {}, hang_timeout: float = 180.0) -> str | None:
    watchdog = Watchdog(Process(Place(), None), None, hang_timeout)
    now = time.monotonic()
    watchdog._seen = {beat.rank: (1, now - silent.get(beat.rank, 0.0)) for beat in found}
    cause = watchdog._hang(found)
    return cause and cause["text"]


def test_the_rank_that_keeps_the_others_waiting_is_named():
    found = beats({"age": 211}, {"age": 212, "phase": "data", "order": 29}, {"age": 210, "waits_in": "all_reduce", "order": 31})
    assert judge(found) == ("rank 1 (node01) has been in data loading at update 9 for 212 s; the others wait in all_reduce, "
                            "the backward pass (--hang_timeout)")


def test_nobody_is_named_while_the_slowest_still_has_time():
    assert judge(beats({"age": 400, "waits_in": "all_reduce", "order": 31}, {"age": 100, "phase": "data"})) is None


def test_the_first_update_and_saving_get_more_patience():
    for more in ({"first": True}, {"phase": "saving"}):
        assert judge(beats({"age": 400, **more}, {"age": 400, "waits_in": "barrier", "order": 31})) is None
        assert "rank 0" in judge(beats({"age": 600, **more}, {"age": 600, "waits_in": "barrier", "order": 31}))


def test_a_stopped_rank_is_named_even_if_it_was_waiting():
    found = beats({"age": 5, "waits_in": "all_reduce"}, {"age": 200, "waits_in": "all_reduce"})
    assert judge(found, silent={1: 190}).startswith("rank 1 (node01) has given no sign of life for 190 s")


def test_ranks_that_all_wait_for_each_other_are_told():
    text = judge(beats({"age": 200, "waits_in": "all_reduce"}, {"age": 200, "waits_in": "barrier"}))
    assert "all wait for each other: rank 0 in all_reduce, rank 1 in barrier" in text


def test_order_grows_with_work_and_not_with_signs_of_life():
    watchdog = Watchdog(types.SimpleNamespace(rank=0, node_name="n"))
    orders = []
    for name, update in [("data", 0), ("forward", 0), ("evaluation", 0), ("evaluation", 0), ("data", 1)]:
        watchdog.phase(name, update)
        orders.append(watchdog.beat.order)
    assert orders == [1, 2, 3, 3, 4]
    assert not watchdog.beat.first


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def failure(folder) -> dict:
    return json.loads((folder / "failure.json").read_text())


def test_an_exception_ends_all_ranks_and_is_told_last(tmp_path):
    results = finish(start_ranks(2, TOY, tmp_path, 1000, "raise=1@5"))
    assert [code for code, _ in results] == [1, 1]
    assert last_line(results[1][1]) == "ArithmeticError: one divided by nothing"
    assert last_line(results[0][1]).endswith("ends because of rank 1.")
    assert (failure(tmp_path)["rank"], failure(tmp_path)["update"]) == (1, 5)


def test_a_users_mistake_on_one_rank_is_one_sentence(tmp_path):
    results = finish(start_ranks(2, TOY, tmp_path, 1000, "user_error=1@5"))
    assert [code for code, _ in results] == [2, 2]
    assert last_line(results[1][1]) == "[rank 1] the value 7 is not accepted: use 8."
    assert not any("Traceback" in output for _, output in results)


def test_the_watchdog_can_be_switched_off(tmp_path):
    assert [code for code, _ in finish(start_ranks(2, TOY, tmp_path, 5, "hang_timeout=0"))] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path, rank):
    processes = start_ranks(3 if rank else 2, TOY, tmp_path, 10000)
    wait_for(lambda: (tmp_path / "now").exists())
    processes[rank].kill()
    began = time.monotonic()
    results = finish(processes)
    assert time.monotonic() - began < 30
    assert [code for code, _ in results] == [-9 if r == rank else 1 for r in range(len(results))]
    assert f"rank {rank}" in failure(tmp_path)["cause"] and "gone" in failure(tmp_path)["cause"]


def test_a_rank_that_hangs_in_loading_is_named_with_everyones_stacks(tmp_path):
    results = finish(start_ranks(2, TOY, tmp_path, 10000, "sleep=1@60:data", "hang_timeout=4"))
    assert [code for code, _ in results] == [1, 1]
    cause = "rank 1 ({}) has been in data loading at update 60 for ".format(os.uname().nodename)
    assert any(cause in output and "the others wait in all_reduce" in output for _, output in results), results
    assert "time.sleep" in (tmp_path / "stacks-rank1.txt").read_text() or "in train" in (tmp_path / "stacks-rank1.txt").read_text()
    assert "all_reduce" in (tmp_path / "stacks-rank0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(tmp_path, rank):
    processes = start_ranks(2, TOY, tmp_path, 10000, "hang_timeout=4")
    wait_for(lambda: (tmp_path / "now").exists() and int((tmp_path / "now").read_text() or 0) > 60)
    processes[rank].send_signal(signal.SIGSTOP)
    try:
        [(code, output)] = finish([processes[1 - rank]])
        assert code == 1 and f"rank {rank}" in failure(tmp_path)["cause"], output
    finally:
        finish([processes[rank]], 0.1) if processes[rank].poll() is not None else processes[rank].kill()


@pytest.mark.slow
def test_a_lone_process_that_hangs_says_where(tmp_path):
    [(code, output)] = finish(start_ranks(1, TOY, tmp_path, 10000, "sleep=0@60:data", "hang_timeout=4"))
    assert code == 1 and "this process has been in data loading at update 60" in output
    assert "in train" in (tmp_path / "stacks-rank0.txt").read_text()


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(tmp_path):
    launcher = start_torchrun(2, TOY, tmp_path, 100000)
    wait_for(lambda: (tmp_path / "now").exists())
    ranks = [int((tmp_path / "pids" / str(rank)).read_text()) for rank in range(2)]
    launcher.kill()
    finish([launcher])
    wait_for(lambda: not any(alive(pid) for pid in ranks))
    assert (tmp_path / "stopped0").exists(), "the ranks saved before they ended"
