"""What every training looks at before it starts: whether processes agree, shared memory, images, disk."""
import os
import shutil
import time
from pathlib import Path

import torch

from common.text import file_size, plural
from config.options import Options
from datasets.build import SampleCheck
from launch.process import Process
from run.folder import environment

_CLOCKS_APART = 2.0  # seconds; file times and logs of several nodes cannot be compared beyond


def start_warnings(options: Options, process: Process, code_version: str, sample: SampleCheck | None
                   ) -> list[str]:
    """Sentences about what is wrong, none when all is well; every rank must call it.

    sample: rank 0's look at the images, None on other ranks.
    """
    memory = process.all_gather_object(shared_memory_problem(options, process.local_world_size))
    found = [] if sample is None else sample.sentences()[1:]
    if sample is not None and 2 * len(sample.tiny) <= sample.looked:  # every data set has a few small images
        found = [sentence for sentence in found if sentence.startswith("unreadable")]
    return found + [sentence for sentence in memory if sentence][:1] + process_problems(process, code_version)


def process_problems(process: Process, code_version: str) -> list[str]:
    """Sentences about versions that differ, clocks that differ, and an all-reduce that gives another sum."""
    if process.world_size == 1:
        return []
    found = environment()
    mine = {"code": code_version, "python": found["python"], "cuda": found["cuda"], **found["packages"]}
    process.barrier()
    nodes, clocks, versions = zip(*process.all_gather_object((process.node_name, time.time(), mine)))
    problems = []
    for name in mine:
        values = [other.get(name) for other in versions]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            problems.append(f"{name} is {values[0]} on rank 0 ({nodes[0]}) and {values[other]} on rank "
                            f"{other} ({nodes[other]}): use one environment on all nodes.")
    if (apart := max(clocks) - min(clocks)) > _CLOCKS_APART:
        late, early = (nodes[clocks.index(pick(clocks))] for pick in (max, min))
        problems.append(f"the clocks of {late} and {early} are {apart:.0f} s apart: set them (NTP).")
    size = process.world_size
    ramp = torch.arange(4096, dtype=torch.float32, device=process.device)
    total = process.all_reduce_(ramp + process.rank, "sum")
    correct = process.all_gather_object(torch.equal(total, ramp * size + size * (size - 1) // 2))
    if not all(correct):
        ranks = [rank for rank, fine in enumerate(correct) if not fine]
        problems.append(f"all-reduce gives an incorrect sum on ranks {ranks}: the network or the devices' "
                        "driver is at fault.")
    return problems


def shared_memory_problem(options: Options, local_world_size: int, folder: str = "/dev/shm") -> str | None:
    """A sentence when the batches that the loaders of one node hold do not fit into its shared memory."""
    if not options.num_workers or not os.path.isdir(folder):
        return None
    needed, free = shared_memory_needed(options, local_world_size), shutil.disk_usage(folder).free
    if needed <= free:
        return None
    fits = int(options.num_workers * free / needed)
    return (f"{plural(options.num_workers, 'worker')} x {plural(local_world_size, 'process')} hold up "
            f"to {file_size(needed)} of batches in shared memory, and {folder} has {file_size(free)} free: "
            f"a bus error would kill the loader; use --num_workers {fits}, or give the container more (docker run "
            f"--shm-size={needed // 10 ** 9 + 1}g).")


def shared_memory_needed(options: Options, local_world_size: int) -> int:
    """Bytes: each worker holds two uint8 batches and makes a third; those of evaluation are 1.5 times as large."""
    batch = int(1.5 * options.batch_size) * 3 * options.input_size ** 2
    return local_world_size * (3 * options.num_workers + 1) * batch


def cpus_per_process(local_world_size: int) -> int:
    """CPUs that each process of this node may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // local_world_size)


def existing_folder(path: str | os.PathLike) -> Path:
    """The folder in which `path` is, or would be made: itself or its nearest ancestor that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def free_space(output_dir: str | os.PathLike) -> int:
    """Bytes that a run can have for its checkpoints in `output_dir`, including those of its own there."""
    own = sum(path.stat().st_size for path in Path(output_dir).glob("*.pth") if path.is_file())
    return shutil.disk_usage(existing_folder(output_dir)).free + own
