"""What every training looks at before it starts: whether processes agree, shared memory, images, disk."""
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from common.errors import UserError
from common.text import file_size, plural
from config.options import Options
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


def process_problems(process: Process) -> list[str]:
    """Sentences about versions that differ between processes, and an all-reduce that gives another sum."""
    size, found = process.world_size, environment()
    mine = {"code": code_version(), "python": found["python"], "cuda": found["cuda"], **found["packages"]}
    ramp = torch.arange(4096, dtype=torch.float32, device=process.device)
    total = process.all_reduce_(ramp + process.rank, "sum")
    correct = torch.equal(total, ramp * size + size * (size - 1) // 2)
    nodes, versions, sums = zip(*process.all_gather_object((process.node_name, mine, correct)))
    problems = [f"{name} is {versions[0][name]} on rank 0 ({nodes[0]}) and {other.get(name)} on rank {rank} "
                f"({nodes[rank]}): use one environment on all nodes."
                for rank, other in enumerate(versions) for name in mine
                if other.get(name) != versions[0].get(name)]
    return problems + [f"all-reduce gives an incorrect sum on rank {rank} ({nodes[rank]}): the network or "
                       "the devices' driver is at fault." for rank, correct in enumerate(sums) if not correct]


def memory_problems(options: Options, process: Process, folder: str = "/dev/shm") -> list[str]:
    """A sentence when the batches that the loaders of a node hold do not fit into its shared memory.

    Each worker holds two uint8 batches and makes a third; those of evaluation are 1.5 times as large.
    """
    batch = int(1.5 * options.batch_size) * 3 * options.input_size ** 2
    needed = process.local_world_size * (3 * options.num_workers + 1) * batch
    free = shutil.disk_usage(folder).free if options.num_workers and os.path.isdir(folder) else needed
    short = max(process.all_gather_object((needed > free, free)))
    words = f"{plural(options.num_workers, 'worker')} x {plural(process.local_world_size, 'process')}"
    return [f"{words} hold up to {file_size(needed)} of batches in shared memory, and {folder} has "
            f"{file_size(short[1])} free: a bus error would kill the loader; use --num_workers "
            f"{int(options.num_workers * short[1] / needed)}, or give the container more (docker run "
            f"--shm-size={needed // 10 ** 9 + 1}g)."] if short[0] else []


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


def free_space(output_dir: str | os.PathLike) -> int:
    """Bytes that a run can have for its checkpoints in `output_dir`, including those of its own there."""
    own = sum(path.stat().st_size for path in Path(output_dir).glob("*.pth") if path.is_file())
    return shutil.disk_usage(existing_folder(output_dir)).free + own
