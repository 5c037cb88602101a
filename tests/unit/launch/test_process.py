"""Rank and node from the environments that launchers leave, the meeting of processes, and what they say
together."""
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.errors import Failure, UserError
from common.outcome import ExitCode
from launch.process import (
    Place,
    choose_device,
    find_place,
    meet,
    name_this_start,
    refuse_shared_devices,
    start,
)
from tests.kits.processes import (
    PROGRAMS,
    Rank,
    environment,
    finish,
    start_ranks,
)

SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURMD_NODENAME": "gpu09", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "6"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
            "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
MPIRUN = {f"OMPI_COMM_WORLD_{name}": TORCHRUN[name.replace("LOCAL_SIZE", "LOCAL_WORLD_SIZE")]
          for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE")}
MPIRUN |= {"OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("env, expected", [
    ({}, ("none", 0, 1, 0, 1)),
    (SRUN, ("srun", 5, 6, 1, 2)),
    (dict(SRUN, SUBMITIT_EXECUTOR="slurm"), ("submitit-slurm", 5, 6, 1, 2)),
    (dict(SRUN, **TORCHRUN), ("torchrun", 3, 4, 1, 2)),  # it may itself run under srun
    (dict(SRUN, **MPIRUN), ("mpirun", 3, 4, 1, 2)),  # whose daemons srun has started
    ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ("none", 0, 1, 0, 1)),  # in a batch script
    (dict(SRUN, SLURM_PTY_PORT="1"), ("none", 0, 1, 0, 1)),  # in the shell of srun --pty
])
def test_the_place_of_a_process(env, expected):
    place = find_place(env)
    assert (place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size) == expected


def test_where_the_processes_meet():
    for names, first in [("gpu[07-09,12],login1", "gpu07"), ("a1,b[1-2]", "a1"), ("127.0.0.[11-12]", "127.0.0.11"),
                         ("r[1-2]n[05,09]", "r1n05")]:
        assert find_place(dict(SRUN, SLURM_STEP_NODELIST=names)).master_addr == first
    assert find_place(dict(SRUN, SLURM_STEP_TASKS_PER_NODE="1,4(x2)")).local_world_size == 4
    assert find_place(SRUN).master_addr == "gpu07" and find_place(SRUN).node_name == "gpu09"
    one_node = dict(SRUN, SLURM_NODEID="0", SLURM_LOCALID="5", SLURM_STEP_TASKS_PER_NODE="6", SLURM_STEP_NODELIST="gpu07")
    assert find_place(one_node).master_addr == "127.0.0.1"
    assert (find_place(TORCHRUN).master_addr, find_place(TORCHRUN).port) == ("a", 29500)
    ports = {find_place(dict(SRUN, **more)).port for more in
              ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"})}
    assert len(ports) == 4  # each attempt and step by itself


@pytest.mark.parametrize("base, name, value", [
    *[(TORCHRUN, name, value) for name, value in [
        ("RANK", "three"), ("RANK", "-1"), ("RANK", "4"), ("RANK", ""), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "-2"), ("WORLD_SIZE", "9" * 5000), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "5"),
        ("MASTER_PORT", "0"), ("MASTER_PORT", "70000"), ("MASTER_PORT", "-1"), ("MASTER_PORT", "ssh"),
        ("MASTER_PORT", None), ("MASTER_ADDR", None), ("MASTER_ADDR", "")]],
    *[(SRUN, name, value) for name, value in [
        ("SLURM_PROCID", "x"), ("SLURM_PROCID", "6"), ("SLURM_STEP_NUM_TASKS", "0"), ("SLURM_NODEID", "3"),
        ("SLURM_LOCALID", "2"), ("SLURM_STEP_TASKS_PER_NODE", "2(x"), ("SLURM_STEP_TASKS_PER_NODE", "0"),
        ("SLURM_STEP_TASKS_PER_NODE", ""), ("SLURM_STEP_NODELIST", "")]],
    (MPIRUN, "MASTER_ADDR", None),  # processes that don't know each other must not train alone, in silence
])
def test_a_variable_that_makes_no_sense_is_one_sentence(base, name, value):
    env = {**base, name: value} if value is not None else {n: v for n, v in base.items() if n != name}
    with pytest.raises(UserError) as error:
        find_place(env)
    assert error.value.code == "environment" and name in str(error.value) and len(str(error.value)) < 300


# -------------------------------------------------------------------------------------------------------
# devices

@pytest.mark.parametrize("wanted", ["gpu", "cuda:x", "tpu:0"])
def test_unknown_devices_are_refused(wanted):
    with pytest.raises(UserError, match=f"--device {wanted}") as error:
        choose_device(wanted, 0, 1)
    assert error.value.code == "device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_refused_whatever_the_scheduler_says(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError) as error:
        choose_device("cuda", 0, 1)
    assert error.value.code == "device"
    assert choose_device("auto", 0, 2).type in ("cpu", "mps", "xpu")


def test_one_device_for_two_ranks_is_refused_naming_both():
    with pytest.raises(UserError, match="ranks 1 and 3 on node a"):
        refuse_shared_devices([("a", "x"), ("a", "y"), ("b", "y"), ("a", "y")])
    refuse_shared_devices([("a", ""), ("a", ""), ("b", "x"), ("c", "x")])


# ----------------------------------------------------------------------------------------------------
# rendezvous

@pytest.fixture
def port():
    """A port of this machine at which a program listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def at(port: int, rank: int, **more) -> Place:
    return Place("torchrun", rank, 2, rank, 2, port=port, **more)


def test_a_port_that_is_taken_is_one_sentence(port):
    with pytest.raises(Failure, match=f"port {port} .*MASTER_PORT") as error:
        meet(at(port, 0), 5)
    assert (error.value.code, error.value.exit_code) == ("port", ExitCode.FAILED)


@pytest.mark.parametrize("rank, served", [(0, True), (1, True), (1, False)])  # torchrun's port, and a derived one
def test_a_listener_that_never_answers_is_left_in_time(port, rank, served):
    began = time.monotonic()
    with pytest.raises(Failure, match=f"port {port}") as error:
        meet(at(port, rank, served=served), 1)
    assert (error.value.code, error.value.exit_code) == ("rendezvous", ExitCode.FAILED)
    assert time.monotonic() - began < 6


def test_a_store_on_one_node_listens_on_loopback_alone():
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    with ThreadPoolExecutor(2) as threads:
        stores = list(threads.map(lambda rank: meet(at(number, rank), 30), range(2)))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listeners = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{number:04X}")]
    assert listeners == [f"0100007F:{number:04X}"] and len(stores) == 2


def test_what_an_earlier_start_left_in_the_store_is_not_believed():
    store = torch.distributed.HashStore()

    def name(rank: int) -> str:
        if rank == 0:
            time.sleep(0.3)  # the others see the earlier start first
        return name_this_start(store, Place(rank=rank, world_size=3), 60)

    with ThreadPoolExecutor(3) as threads:
        names = [set(threads.map(name, range(3))) for _ in range(3)]
    assert all(len(found) == 1 for found in names) and len(set.union(*names)) == 3


MEET = "from launch.process import start\ntry: start('cpu', {})\nexcept ValueError as error: print(error.code, error)"


def test_missing_ranks_are_named():
    outputs = [output for _, output in finish(start_ranks(4, "-c", MEET.format(3), absent=(1, 3)))]
    assert "rendezvous rank 0" in outputs[0] and "1 of 3 others" in outputs[0] and "missing rank(s): 1, 3" in outputs[0], outputs[0]
    assert "rendezvous" in outputs[1], outputs[1]


def test_a_missing_rank_0_is_named():
    [(code, output)] = finish(start_ranks(2, "-c", MEET.format(2), absent=(0,)))
    assert "rendezvous rank 1" in output and "no rank 0 at 127.0.0.1" in output and "within 2 s" in output, output


# ---------------------------------------------------------------------------------------------------
# collectives

COLLECTIVES = """
import torch
from common.errors import UserError
from launch.process import start

with start("cpu", 60) as process:
    assert process.backend == "gloo" and process.world_size == 2
    assert process.all_reduce_(torch.tensor([process.rank + 1])).item() == 3
    assert process.all_reduce_(torch.tensor([process.rank]), "max").item() == 1
    assert process.any(process.rank == 1) and not process.any(False)
    assert process.broadcast_object({"rank": process.rank}, source=1) == {"rank": 1}
    assert process.all_gather_object(process.rank) == [0, 1]
    order = []
    process.local_first(lambda: order.append(process.rank))

    def refuse():
        raise UserError("the value 7 is not accepted", code="seven")
    try:
        process.on_rank_zero(refuse)
    except UserError as error:
        assert (str(error), error.code) == ("the value 7 is not accepted", "seven")
    assert process.on_rank_zero(lambda: process.rank + 5) == 5
    torch.manual_seed(0)
    model = process.wrap(torch.nn.Linear(3, 1))
    model.require_backward_grad_sync = False
    model(torch.ones(2, 3)).sum().backward()
    model.require_backward_grad_sync = True
    model(torch.full((2, 3), float(process.rank))).sum().backward()
    assert torch.equal(model.module.weight.grad, torch.full((1, 3), 3.0)), model.module.weight.grad
    del model
print("well")
"""


def test_a_lone_process_talks_to_itself():
    with start("cpu") as process:
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


def test_main_says_in_one_sentence_that_a_port_is_taken(port):
    env = environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    argv = [str(PROGRAMS.parents[2] / "main.py"), "--data_path", "nowhere", "--device", "cpu"]
    [(code, output)] = finish([Rank(argv, env)])
    assert code == 1 and f"port {port}" in output and "Traceback" not in output, output
    [(code, output)] = finish([Rank(argv, dict(env, RANK="zero"))])
    assert code == 2 and "RANK" in output and "Traceback" not in output, output
