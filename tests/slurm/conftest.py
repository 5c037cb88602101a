"""A throw-away Slurm cluster for the tests marked `slurm`, and a stand-in for the program that they submit."""
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SCRIPT = HERE / "slurm_cluster.sh"


class Cluster:
    """Two emulated nodes with four cores each, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def control(self, *arguments: str) -> str:
        answer = subprocess.run([SCRIPT, arguments[0], self.folder, *arguments[1:]], capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def state(self, job: str) -> str:
        return self.field(job, "%T")

    def field(self, job: str, form: str) -> str:
        command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={form}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    def wait(self, job: str, states: str = "COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL", seconds: float = 150) -> str:
        deadline = time.monotonic() + seconds
        while not re.fullmatch(states, state := self.state(job)):
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds} s"
            time.sleep(0.5)
        return state


@pytest.fixture(scope="session")
def cluster():
    missing = [name for name in ("slurmctld", "slurmd", "srun") if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short: its sockets' paths have a limit
    cluster = Cluster(folder)
    try:
        cluster.control("start")
        variables = dict(re.findall(r"(\w+)=(\S+)", cluster.control("env").replace(':"$PATH"', "")))
        old = dict(os.environ)
        os.environ.update(SLURM_CONF=variables["SLURM_CONF"], PATH=f"{variables['PATH']}:{old['PATH']}", OMP_NUM_THREADS="1",
                          PYTHONPATH=str(REPOSITORY))
        yield cluster
        os.environ.clear()
        os.environ.update(old)
    finally:
        cluster.control("stop")
        shutil.rmtree(folder, ignore_errors=True)
