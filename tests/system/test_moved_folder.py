"""A live run whose folder is moved or removed, and another run in its place: neither touches the other's files."""
import os
import shutil
import signal

import pytest

from tests.kits.processes import codes, wait_for
from tests.kits.runs import arguments, assert_equal_bits, now, result, start


def contents(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("how, saves", [("mv", 1e-9), pytest.param("rm -rf", 1e-9, marks=pytest.mark.slow),
                                        pytest.param("mv", 0, marks=pytest.mark.slow)])
def test_the_old_run_is_saved_beside_and_leaves_the_new_one_alone(images, tmp_path, how, saves):
    run, argv = tmp_path / "run", dict(save_every_minutes=saves)
    old = start(arguments(images, run, **argv), tmp_path / "old", now=str(tmp_path))
    wait_for(lambda: now(tmp_path)[1] >= 4)
    pid = now(tmp_path)[2]
    os.kill(pid, signal.SIGSTOP)  # so that the new run comes while the old one lives
    if how == "mv":
        run.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(run)
    new = start(arguments(images, run, seed=6), tmp_path / "new")
    assert codes(new) == [0], new[0].text()
    before = contents(run)
    os.kill(pid, signal.SIGCONT)
    assert codes(old) == [0], old[0].text()
    assert contents(run) == before
    beside, = (path for path in tmp_path.glob("run-*") if path.is_dir())
    assert old[0].text().count(str(beside)) >= 1 and "Traceback" not in old[0].text()
    undisturbed = tmp_path / "undisturbed"
    assert codes(start(arguments(images, undisturbed), tmp_path / "third")) == [0]
    assert_equal_bits(result(undisturbed), result(beside))
