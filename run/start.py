"""What is looked at before a start: whether processes agree, and whether a folder can be written."""
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from common.errors import UserError
from launch.process import Process
from run.folder import environment


@cache
def code_version() -> str:
    """The commit of this code, with a + for local changes; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, text=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def kernels(device: torch.device) -> str:
    """What decides the last bits of results on `device` beside versions: its kind, or a CPU's features."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def process_problems(process: Process) -> list[str]:
    """Sentences naming versions and code in which a rank differs from rank 0; every rank must call it."""
    found = environment()
    mine = {"code": code_version(), "python": found["python"], "cuda": found["cuda"],
            "kernels": kernels(process.device), **found["packages"]}
    nodes, versions = zip(*process.all_gather_object((process.node_name, mine)))
    return [f"{name} is {versions[0][name]} on rank 0 ({nodes[0]}) and {other.get(name)} on rank {rank} "
            f"({nodes[rank]}): use one environment on all nodes."
            for rank, other in enumerate(versions) for name in mine
            if other.get(name) != versions[0].get(name)]


def cpus_per_process(local_world_size: int) -> int:
    """CPUs that each process of this node may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // local_world_size)


def existing_folder(path: str | os.PathLike) -> Path:
    """The folder in which `path` is, or would be made: itself or its nearest ancestor that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_writable(flag: str, folder: str) -> None:
    """Raise UserError when nothing can be written where `folder` is to be; nothing is left there."""
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder)) as file:
            file.write(b"hornet")
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be used: nothing can be written in "
                        f"{existing_folder(folder)} ({error.strerror}); choose another.",
                        code="unusable_folder") from error
