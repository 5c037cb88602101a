"""A throw-away Slurm cluster for the tests marked `slurm`."""
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.kits.processes import environment

SCRIPT = Path(__file__).resolve().parent / "slurm_cluster.sh"


class Cluster:
    """Two emulated nodes with four cores each, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def control(self, *arguments: str) -> str:
        """slurm_cluster.sh ARGUMENT FOLDER ARGUMENT…; what it prints."""
        return self._run(SCRIPT, arguments[0], self.folder, *arguments[1:])

    @staticmethod
    def _run(*command: str | Path) -> str:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def field(self, job: str, form: str) -> str:
        """What squeue says of `job` in its format `form`."""
        return self._run("squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={form}").strip()

    def wait(self, job: str, seconds: float = 300) -> str:
        """The state of `job` as soon as it is a final one; AssertionError after `seconds`."""
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "%T")) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds} s"
            time.sleep(0.5)
        return state

    def exit_code(self, job: str) -> int:
        """The job's own, as Slurm knows it."""
        return int(re.search(r"ExitCode=(\d+):", self._run("scontrol", "show", "job", job))[1])

    def left_over(self) -> list[str]:
        """Command lines of processes that name this cluster's folder."""
        ours = f"{self.folder}/".encode()
        found = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return [line.replace(b"\0", b" ").decode(errors="replace") for line in found if ours in line]


@pytest.fixture(scope="session")
def cluster():
    """A running cluster, which the commands of Slurm talk to; each of several pytest workers has its own."""
    programs = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "srun") if not shutil.which(name, path=programs)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short: its sockets' paths have a limit
    cluster = Cluster(folder)
    found = environment(SLURM_CONF=str(folder / "slurm.conf"), PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
    try:
        cluster.control("start")
        with patch.dict(os.environ, found, clear=True):
            yield cluster
    finally:
        cluster.control("stop")
        shutil.rmtree(folder, ignore_errors=True)
    assert not cluster.left_over()
