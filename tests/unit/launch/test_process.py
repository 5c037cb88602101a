"""Rank and node from the environments that launchers leave."""
import pytest

from common.errors import UserError
from launch.places import find_place, first_node, tasks_per_node

SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURMD_NODENAME": "gpu09",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "6"}


def test_alone_without_a_launcher():
    place = find_place({})
    assert (place.rank, place.world_size, place.launcher) == (0, 1, "none")


def test_torchrun_wins_over_slurm():
    env = dict(SRUN, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", GROUP_RANK="1", MASTER_ADDR="a",
               MASTER_PORT="1")
    place = find_place(env)
    assert (place.launcher, place.rank, place.world_size, place.local_rank, place.node) == ("torchrun", 3, 4, 1, 1)


def test_srun():
    place = find_place(SRUN)
    assert (place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size) == ("srun", 5, 6, 1, 2)
    assert (place.node, place.node_name, place.master_addr) == (2, "gpu09", "gpu07")


def test_one_node_meets_on_loopback():
    env = dict(SRUN, SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="6", SLURM_STEP_NODELIST="gpu07")
    assert find_place(env).master_addr == "127.0.0.1"


def test_each_attempt_and_step_meets_by_itself():
    tokens = {find_place(dict(SRUN, **more)).token for more in
              ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"})}
    assert len(tokens) == 4


@pytest.mark.parametrize("env", [
    {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"},  # in a batch script
    dict(SRUN, SLURM_PTY_PORT="1"),  # in the shell of srun --pty
])
def test_plain_python_in_an_allocation_is_one_process(env):
    assert find_place(env).world_size == 1


def test_mpirun():
    env = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    place = find_place(env)
    assert (place.rank, place.world_size, place.local_rank, place.node) == (5, 8, 1, 1)


def test_a_missing_address_is_named():
    with pytest.raises(UserError, match="MASTER_PORT"):
        find_place({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"})


def test_a_number_that_is_none_is_named():
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        find_place({"RANK": "0", "WORLD_SIZE": "two"})


@pytest.mark.parametrize("text, counts", [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,8(x2)", [1, 8, 8])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text, name", [("gpu07", "gpu07"), ("gpu[07-09,12],login1", "gpu07"), ("a1,b[1-2]", "a1"),
                                        ("127.0.0.[11-12]", "127.0.0.11"), ("r[1-2]n[05,09]", "r1n05")])
def test_first_node(text, name):
    assert first_node(text) == name
