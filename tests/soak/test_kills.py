"""Two gloo processes under torchrun, signalled at random and started afresh: the weights of the run left
alone."""
import json
import os
import random
import signal
import time

import pytest

from common.outcome import Outcome
from tests.kits.processes import PROGRAMS, assert_gone, codes, descendants, finish, start_torchrun
from tests.kits.runs import EPOCHS, UPDATES, arguments, assert_equal_bits, now, result, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MOMENTS = 20 if os.environ.get("HORNET_SOAK") else 3
CASES = [(name, target) for name in ("SIGKILL", "SIGTERM", "SIGUSR2")
         for target in ("rank", "launcher", "group")]
RECIPE = dict(update_freq=1, num_workers=1, save_every_minutes=1e-9)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ranks = start(arguments(images, folder, **RECIPE), folder.with_suffix(".console"), 2)
    assert codes(ranks) == [0, 0], ranks[0].text()
    return result(folder)


def launch(argv, tmp_path):
    return start_torchrun(2, PROGRAMS / "hooked_main.py", json.dumps({"now": str(tmp_path)}), *argv)


def disturb(launcher, tmp_path, name, target, draw) -> list[int]:
    """Signal `target` at a random moment; every process that there was."""
    moment, deadline = draw.randrange(EPOCHS * UPDATES), time.monotonic() + 120
    while now(tmp_path)[1] < moment and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.2))
    everyone = [launcher.pid, *descendants(launcher.pid)]
    rank = now(tmp_path, draw.randrange(2))[2] or everyone[-1]
    for pid in {"rank": [rank], "launcher": [launcher.pid], "group": everyone}[target]:
        try:
            os.kill(pid, getattr(signal, name))
        except ProcessLookupError:
            pass
    return everyone


@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_signal_at_any_moment_loses_nothing(images, undisturbed, tmp_path, number):
    draw, folder = random.Random(number), tmp_path / "run"
    name, target = CASES[(number * 4) % len(CASES)]
    argv = arguments(images, folder, **RECIPE)
    launcher = launch(argv, tmp_path)
    everyone = disturb(launcher, tmp_path, name, target, draw)
    at = now(tmp_path)[:2]
    [(code, output)] = finish([launcher], 90)
    # Ranks whose launcher was killed save, and have 15 s for that.
    assert_gone(everyone, 30)
    status = json.loads((folder / "status.json").read_text()) if (folder / "status.json").exists() else {}
    print(f"{name} to the {target} at {at}: code {code}, {status.get('state')} at {status.get('update')}")
    if name != "SIGKILL" and at[1] >= 0:
        assert Outcome(status["state"]) in (Outcome.PAUSED, Outcome.DONE), output
    if status.get("state") != "DONE":
        [(code, output)] = finish([launch(argv, tmp_path)], 180)
        assert code == 0, output
    assert_equal_bits(undisturbed, result(folder))
