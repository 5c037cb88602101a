"""Rank and node from the environments that launchers leave, the meeting of processes, and what they say
together."""
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import launch.process
from common.errors import Failure, UserError
from common.outcome import ExitCode
from launch.process import Place, choose_device, find_place, meet, name_this_start, start
from tests.kits.processes import REPOSITORY, Rank, environment, finish, in_processes

SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_NTASKS": "6"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
            "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
ALONE = ("none", 0, 1, 0, 1, "127.0.0.1")


@pytest.mark.parametrize("env, expected", [
    ({}, ALONE),
    ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ALONE),  # in a batch script
    (SRUN | {"SLURM_PTY_PORT": "1"}, ALONE),  # in the shell of srun --pty
    (SRUN, ("srun", 5, 6, 1, 2, "gpu07")),
    (SRUN | TORCHRUN, ("torchrun", 3, 4, 1, 2, "a")),  # it may itself run under srun
    (SRUN | MPIRUN, ("mpirun", 3, 4, 1, 2, "a")),  # whose daemons srun has started
    (SRUN | {"SLURM_STEP_NODELIST": "gpu[07-09,12],login1"}, ("srun", 5, 6, 1, 2, "gpu07")),
    (SRUN | {"SLURM_STEP_NODELIST": "r[1-2]n[05,09]"}, ("srun", 5, 6, 1, 2, "r1n05")),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,4(x2)"}, ("srun", 5, 6, 1, 4, "gpu07")),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0"}, ("srun", 5, 6, 1, 6, "127.0.0.1"))])
def test_the_place_of_a_process(env, expected):
    place = find_place(env)
    assert (place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size,
            place.master_addr) == expected


def test_where_the_processes_meet():
    """Each attempt and each step by itself."""
    ports = {find_place(SRUN | more).port for more in
             ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"})}
    assert len(ports) == 4 and find_place(TORCHRUN).port == 29500


@pytest.mark.parametrize("base, name, value", [
    *[(TORCHRUN, name, value) for name, value in [
        ("RANK", "three"), ("RANK", "-1"), ("RANK", "4"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "9" * 5000),
        ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "5"), ("MASTER_PORT", "70000"), ("MASTER_PORT", None),
        ("MASTER_ADDR", "")]],
    *[(SRUN, name, value) for name, value in [
        ("SLURM_PROCID", "6"), ("SLURM_STEP_NUM_TASKS", "x"), ("SLURM_NODEID", "3"), ("SLURM_LOCALID", "2"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x"), ("SLURM_STEP_TASKS_PER_NODE", "0"), ("SLURM_STEP_NODELIST", "")]],
    (MPIRUN, "MASTER_ADDR", None)])  # processes that don't know each other must not train alone, in silence
def test_a_variable_that_makes_no_sense_is_one_sentence(base, name, value):
    env = {**base, name: value} if value is not None else {n: v for n, v in base.items() if n != name}
    with pytest.raises(UserError) as error:
        find_place(env)
    assert error.value.code == "environment" and name in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("wanted", ["gpu", "cuda:x", "tpu:0", pytest.param("cuda", marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU"))])
def test_a_missing_device_is_refused_whatever_the_scheduler_says(monkeypatch, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=f"--device {wanted}") as error:
        choose_device(wanted, 0, 1)
    assert error.value.code == "device"


def test_one_device_for_two_ranks_is_refused_naming_both():
    with pytest.raises(UserError, match="ranks 1 and 3 on node a"):
        launch.process.refuse_shared_devices([("a", "x"), ("a", "y"), ("b", "y"), ("a", "y")])
    launch.process.refuse_shared_devices([("a", ""), ("a", ""), ("b", "x"), ("c", "x")])


@pytest.fixture
def port():
    """A port of this machine at which a program listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def refused(port: int, rank: int, served: bool = False) -> str:
    with pytest.raises(Failure) as error:
        meet(Place("torchrun", rank, 4, rank, 4, port=port, served=served), 1)
    assert (error.value.code, error.value.exit_code) == ("rendezvous", ExitCode.FAILED)
    return str(error.value)


@pytest.mark.parametrize("rank, served", [(0, True), (1, False)])  # torchrun's port, and a derived one
def test_a_listener_that_never_answers_is_left_in_time(port, rank, served):
    began = time.monotonic()
    assert f"port {port}" in refused(port, rank, served) and time.monotonic() - began < 6


def test_absent_ranks_are_named(free_port, logged):
    assert "rank 2" in refused(free_port, 2) and "no rank 0 at 127.0.0.1" in logged.text
    with ThreadPoolExecutor(2) as threads:
        sentence, _ = threads.map(lambda rank: refused(free_port, rank), (0, 2))
    assert "1 of 3 others" in sentence and "missing rank(s): 1, 3" in sentence


def test_a_store_on_one_node_listens_on_loopback_alone(free_port):
    with ThreadPoolExecutor(2) as threads:
        stores = list(threads.map(lambda rank: meet(Place("torchrun", rank, 2, rank, 2, port=free_port), 30), range(2)))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listeners = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{free_port:04X}")]
    assert listeners == [f"0100007F:{free_port:04X}"] and len(stores) == 2


def test_what_an_earlier_start_left_in_the_store_is_not_believed():
    store = torch.distributed.HashStore()

    def name(rank: int) -> str:
        if rank == 0:
            time.sleep(0.3)  # the others see the earlier start first
        return name_this_start(store, Place(rank=rank, world_size=3), 60)

    with ThreadPoolExecutor(3) as threads:
        names = [set(threads.map(name, range(3))) for _ in range(3)]
    assert all(len(found) == 1 for found in names) and len(set.union(*names)) == 3


@pytest.mark.parametrize("rank, code, words", [("0", 1, ("rank 0", "MASTER_PORT")), ("zero", 2, ("RANK",))])
def test_main_ends_with_one_sentence(port, rank, code, words):
    """A port that is taken, which may be free at the next start, and a variable that is no number."""
    env = environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    [(ended, output)] = finish([Rank([str(REPOSITORY / "main.py"), "--data_path", "none", "--device", "cpu"], env)])
    assert ended == code and all(word in output for word in words) and "Traceback" not in output, output


def talk(process) -> list:
    """What a process hears from the others."""
    def refuse():
        raise UserError("the value 7 is not accepted", code="seven")
    with pytest.raises(UserError, match="value 7") as error:
        process.on_rank_zero(refuse)
    return [process.all_reduce_(torch.tensor([process.rank + 1])).item(),
            process.all_reduce_(torch.tensor([process.rank]), "max").item(), process.any(process.rank == 1),
            process.broadcast_object({"rank": process.rank}), process.all_gather_object(process.rank),
            process.on_rank_zero(lambda: process.rank + 5), error.value.code, process.local_first(lambda: process.rank)]


def test_processes_talk_to_each_other_or_to_themselves(tmp_path):
    for rank, heard in enumerate(in_processes(talk, 2, tmp_path)):
        assert heard == [3, 1, True, {"rank": 0}, [0, 1], 5, "seven", rank]
    with start("cpu") as process:
        assert talk(process) == [1, 0, False, {"rank": 0}, [0], 5, "seven", 0]
        model = torch.nn.Linear(1, 1)
        assert process.wrap(model) is model and not torch.distributed.is_initialized()


def updates_at_once_and_resumed(process) -> list[torch.Tensor]:
    """The weights after six updates at once, and after three and three with a fresh wrapper between them."""
    nets = []
    for parts in ((0, 6), (0, 3, 6)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.GELU(), torch.nn.Linear(33, 129),
                                  torch.nn.GELU(), torch.nn.Linear(129, 5))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for first, last in zip(parts, parts[1:]):
            model = process.wrap(net)
            for update in range(first, last):
                x = torch.randn(3, 7, generator=torch.Generator().manual_seed(update * 100 + process.rank))
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        nets.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach())
    return nets


def test_a_resumed_run_adds_gradients_in_the_same_order(tmp_path):
    # Two processes would hide it: a + b is b + a.
    for whole, resumed in in_processes(updates_at_once_and_resumed, 3, tmp_path):
        assert torch.equal(whole, resumed)
