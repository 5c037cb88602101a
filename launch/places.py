"""Where a process stands among its peers, read from the environment its launcher left."""
import dataclasses
import os
import re
import socket
from typing import Mapping

from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """Rank and node of one process; `token` names this very start of a job."""

    launcher: str = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    node_name: str = dataclasses.field(default_factory=socket.gethostname)
    master_addr: str = "127.0.0.1"
    token: str = ""


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """The place of this process: torchrun first (it may itself run under srun), then submitit, srun and mpirun.

    A plain `python` inside a Slurm allocation or an interactive shell is a single process, although
    SLURM_NTASKS may say otherwise: only srun's own step variables count.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    if env.get("SUBMITIT_EXECUTOR") == "local":
        return Place("submitit-local", _int(env, "SUBMITIT_LOCAL_GLOBALID"), _int(env, "SUBMITIT_LOCAL_NTASKS"),
                     _int(env, "SUBMITIT_LOCAL_LOCALID"), _int(env, "SUBMITIT_LOCAL_NTASKS"),
                     token=f"local {env['SUBMITIT_LOCAL_JOB_ID']}")
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env and "SLURM_PTY_PORT" not in env:
        return _slurm(env)
    if "OMPI_COMM_WORLD_RANK" in env and _int(env, "OMPI_COMM_WORLD_SIZE") > 1:
        size = _int(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
        rank = _int(env, "OMPI_COMM_WORLD_RANK")
        return _with_master(env, Place("mpirun", rank, _int(env, "OMPI_COMM_WORLD_SIZE"),
                                       _int(env, "OMPI_COMM_WORLD_LOCAL_RANK"), size, rank // size))
    return Place()


def _torchrun(env: Mapping[str, str]) -> Place:
    world = _int(env, "WORLD_SIZE")
    local = _int(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world
    place = Place("torchrun", _int(env, "RANK"), world, _int(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0, local,
                  _int(env, "GROUP_RANK") if "GROUP_RANK" in env else 0, _node_name(env))
    return place if world == 1 else _with_master(env, place)


def _with_master(env: Mapping[str, str], place: Place) -> Place:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise UserError(f"{place.world_size} processes but no {name} in the environment: start with torchrun, or "
                            f"export MASTER_ADDR and MASTER_PORT.")
    return dataclasses.replace(place, master_addr=env["MASTER_ADDR"])


def _slurm(env: Mapping[str, str]) -> Place:
    node = _int(env, "SLURM_NODEID")
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env["SLURM_TASKS_PER_NODE"])
    # The step is named, so that two steps of one job don't meet, and the attempt, so that a requeued job doesn't
    # meet what is left of its predecessor.
    token = " ".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    # On one node the store listens on loopback alone.
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    master = first_node(nodes) if len(counts) > 1 else "127.0.0.1"
    return Place("submitit-slurm" if env.get("SUBMITIT_EXECUTOR") == "slurm" else "srun",
                 _int(env, "SLURM_PROCID"), _int(env, "SLURM_STEP_NUM_TASKS"), _int(env, "SLURM_LOCALID"), counts[node],
                 node, _node_name(env), master, token)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
        counts += [int(count)] * int(times or 1)
    return counts


def first_node(nodes: str) -> str:
    """The first name of a Slurm node list: "gpu[07-09,12],login1" gives gpu07. Rank 0 runs there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _node_name(env: Mapping[str, str]) -> str:
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def _int(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(f"the environment variable {name} is {env.get(name)!r}, not a number: start with torchrun, "
                        f"srun, or python -m launch.run_with_submitit.") from None
