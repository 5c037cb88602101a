"""Starting and watching small groups of processes in the tests of launch/."""
import atexit
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Callable, Sequence

import torch

from launch.processes import alive as alive

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).with_name("programs")
TOY = PROGRAMS / "toy_training.py"
FORKS = multiprocessing.get_context("forkserver")
# One server for all tests of a worker, hence also what tests/kits/runs.py needs.
FORKS.set_forkserver_preload(["main", "training", "evaluation", "tests.kits.runs", "tools.report"])


def expected_value(updates: int, world_size: int) -> float:
    """What the toy training ends with, computed without processes."""
    value = 0.0
    for update in range(updates):
        value = value * 0.9 + float(sum(update + rank for rank in range(world_size)))
    return value


def environment(**more: str) -> dict[str, str]:
    """This environment without any launcher's variables, one thread, and the repository on the path."""
    prefixes = ("SLURM_", "SUBMITIT_", "OMPI_", "TORCHELASTIC_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return dict(clean, OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY), **more)


class Rank:
    """`python command` in a process of its own, there within 0.1 s: forked from a server that has PyTorch loaded."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        self._console = tempfile.NamedTemporaryFile(prefix="rank", suffix=".txt")
        self._process = FORKS.Process(target=_run, args=(command, variables, self._console.name))
        self._process.start()
        atexit.register(self._process.kill)
        self.pid, self.kill = self._process.pid, self._process.kill

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it printed until its end; AssertionError when that takes longer than `timeout` seconds."""
        self._process.join(timeout)
        assert self.returncode is not None, f"no end within {timeout:.0f} s:\n{Path(self._console.name).read_text()}"
        return Path(self._console.name).read_text(), None

    def wait(self) -> None:
        self._process.join()


def _run(command: list[str], variables: dict[str, str], console: str) -> None:
    descriptor = os.open(console, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    if command[0] == "-c":
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, os.path.dirname(command[0]))
        runpy.run_path(command[0], run_name="__main__")


def start_ranks(world_size: int, *command: str | Path, absent: tuple[int, ...] = ()) -> list[Rank]:
    """`python command` as `world_size` processes of one local job, without a launcher above them."""
    job = uuid.uuid4().hex
    ranks = [rank for rank in range(world_size) if rank not in absent]
    return [Rank(list(map(str, command)),
                 environment(SUBMITIT_EXECUTOR="local", SUBMITIT_LOCAL_JOB_ID=job, SUBMITIT_LOCAL_GLOBALID=str(rank),
                             SUBMITIT_LOCAL_LOCALID=str(rank), SUBMITIT_LOCAL_NTASKS=str(world_size)))
            for rank in ranks]


def start_torchrun(world_size: int, *command: str | Path, restarts: int = 0) -> subprocess.Popen:
    """`torchrun --nproc_per_node world_size command`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}",
                f"--max-restarts={restarts}"]
    return subprocess.Popen([sys.executable, *launcher, *map(str, command)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment())


def finish(processes: Sequence[subprocess.Popen | Rank], seconds: float = 120) -> list[tuple[int, str]]:
    """(exit code, output) of each process; none outlives this call."""
    try:
        deadline = time.monotonic() + seconds
        outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Poll until `condition()`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def write_toy_program(folder: Path) -> Path:
    """A folder that looks like this repository to the launcher, with the toy training as its main.py."""
    folder.mkdir(parents=True)
    for room in ("common", "launch"):
        shutil.copytree(REPOSITORY / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROGRAMS / "toy_main.py", folder / "main.py")
    shutil.copy(TOY, folder)
    return folder
