"""Groups of processes: started within 0.1 s from a server that has PyTorch loaded, watched, ended."""
import atexit
import multiprocessing
import os
import random
import runpy
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed.run

import launch.process
from launch.stop import alive as alive

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).with_name("programs")
TOY = PROGRAMS / "toy_training.py"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["main", "training", "evaluation", "tests.kits.runs", "tools.report"])


def expected(updates: int, world_size: int) -> float:
    """What the toy training ends with, computed without processes."""
    value = 0.0
    for update in range(updates):
        value = value * 0.9 + sum(update + rank for rank in range(world_size))
    return value


def environment(**more: str) -> dict[str, str]:
    """This environment without any launcher's variables, one thread, and the repository on the path."""
    prefixes = ("SLURM_", "SUBMITIT_", "OMPI_", "TORCHELASTIC_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return dict(clean, OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY), **more)


def places(world_size: int) -> list[dict[str, str]]:
    """The variables of each rank of a new job on this machine, as torchrun gives them, with a free port."""
    while True:
        port = random.randrange(20000, 32000)  # below those that the system hands out
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            break
    return [dict(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                 LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1") for rank in range(world_size)]


class Child(FORKS.Process):
    """`function(*arguments)` in a process of its own that ends with what it returns; its output goes to
    `console`."""

    def __init__(self, function: Callable[..., int], arguments: tuple, variables: dict[str, str],
                 console: Path | None = None):
        super().__init__(target=function, args=arguments)
        self.variables, self.console = variables, console or Path(tempfile.mkdtemp(prefix="child")) / "console"
        self.start()
        atexit.register(self.kill)

    def run(self) -> None:
        """In the new process."""
        file = os.open(self.console, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.clear()
        os.environ.update(self.variables)
        torch.set_num_threads(1)
        try:
            code = self._target(*self._args)
        finally:
            atexit._run_exitfuncs()  # as at the end of a program; multiprocessing's children skip this
            sys.stdout.flush()
        sys.exit(code)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, seconds: float = 120) -> int:
        """Wait for the end; AssertionError (and kill -9) when there is none within `seconds`."""
        self.join(seconds)
        code = self.exitcode
        self.kill()
        assert code is not None, f"no end within {seconds:.0f} s:\n{self.text()}"
        return code

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        super().kill()
        self.join(10)

    def text(self) -> str:
        """What it has printed so far."""
        return self.console.read_text() if self.console.exists() else ""


class Rank(Child):
    """`python command`."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        super().__init__(_run, (command,), variables)


def _run(command: list[str]) -> None:
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")


def in_processes(work: Callable, world_size: int, folder: Path, *arguments: object) -> list:
    """`work(process, *arguments)` as `world_size` ranks of one job; what they return, in order of rank."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{world_size}-{rank}.pt" for rank in range(world_size)]
    ranks = [Child(_work, (work, path, arguments), environment(**place))
             for path, place in zip(paths, places(world_size))]
    assert codes(ranks, 240) == [0] * world_size, [rank.text() for rank in ranks]
    return [torch.load(path, weights_only=False) for path in paths]


def _work(work: Callable, path: Path, arguments: tuple) -> int:
    with launch.process.start("cpu") as process:
        torch.save(work(process, *arguments), path)
    return 0


def start_ranks(world_size: int, *command: str | Path, absent: tuple[int, ...] = ()) -> list[Rank]:
    """`python command` as `world_size` processes of one local job, without a launcher above them."""
    return [Rank(list(map(str, command)), environment(**place))
            for rank, place in enumerate(places(world_size)) if rank not in absent]


def start_torchrun(world_size: int, *command: str | Path) -> Child:
    """`torchrun --nproc_per_node world_size command`."""
    words = ["--standalone", f"--nproc_per_node={world_size}", *map(str, command)]
    return Child(torch.distributed.run.main, (words,), environment())


def finish(children: Sequence[Child], seconds: float = 120) -> list[tuple[int, str]]:
    """(exit code, output) of each; none outlives this call."""
    deadline = time.monotonic() + seconds
    try:
        return [(child.end(max(0.1, deadline - time.monotonic())), child.text()) for child in children]
    finally:
        for child in children:
            child.kill()


def codes(children: Sequence[Child], seconds: float = 120) -> list[int]:
    """The exit codes of all; none outlives this call."""
    return [code for code, _ in finish(children, seconds)]


def descendants(pid: int) -> list[int]:
    """The running processes below `pid`: loader workers, ranks below a launcher."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return [p for p in found if alive(p)]


def assert_gone(pids: list[int], seconds: float = 10) -> None:
    """No process of `pids` is left after `seconds`."""
    wait_for(lambda: not any(map(alive, pids)), seconds)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Poll until `condition()`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def at_update(folder: Path, update: int = -1, seconds: float = 120) -> None:
    """Wait until the toy training in `folder` has made update number `update`."""
    now = folder / "now"
    wait_for(lambda: now.exists() and int(now.read_text() or -2) >= update, seconds)


def write_toy_program(folder: Path) -> Path:
    """A folder that looks like this repository to the launcher, with the toy training as its main.py."""
    folder.mkdir(parents=True)
    for room in ("common", "launch"):
        shutil.copytree(REPOSITORY / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROGRAMS / "toy_main.py", folder / "main.py")
    shutil.copy(TOY, folder)
    return folder
