"""The long forms: trainings under torchrun that are signalled at random moments, start-up and saving included,
and started again, and saves that are killed; `make soak` does more of them."""
import json
import os
import random
import signal
import time
from contextlib import suppress

import pytest

from common.ledger import Ledger
from tests.kits.processes import PROGRAMS, assert_gone, codes, descendants, finish, start_torchrun
from tests.kits.runs import EPOCHS, UPDATES, arguments, assert_equal_bits, now, result, start
from tests.system.test_checkpoint_kill import damaged_newest, flip, kill_while_saving, truncate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RUNS = 40 if os.environ.get("HORNET_SOAK") else 4
CASES = [(name, target) for name in ("SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR2")
         for target in ("rank", "launcher", "group")]
EVERY_UPDATE = 1e-9


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """What runs of one and two processes leave that nobody disturbed."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    for world_size in (1, 2):
        run = folder / str(world_size)
        ranks = start(arguments(images, run, update_freq=2 // world_size), folder / "console", world_size)
        assert codes(ranks) == [0] * world_size, ranks[0].text()
        found[world_size] = result(run)
    return found


def disturb(launcher, world_size, tmp_path, name, target, draw) -> list[int]:
    """Signal `target` at a random moment; every process that there was."""
    moment, deadline = draw.randrange(-6, EPOCHS * UPDATES), time.monotonic() + 120
    while now(tmp_path)[1] < moment and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.2 if moment >= 0 else 6))
    everyone = [launcher.pid, *descendants(launcher.pid)]
    rank = now(tmp_path, draw.randrange(world_size))[2] or everyone[-1]
    for pid in {"rank": [rank], "launcher": [launcher.pid], "group": everyone}[target]:
        with suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))
    return everyone


@pytest.mark.parametrize("number", range(RUNS))
def test_signals_at_any_moment_lose_nothing(images, undisturbed, tmp_path, number):
    draw, folder, world_size = random.Random(number), tmp_path / "run", 1 + number % 2
    hook = json.dumps({"now": str(tmp_path)})

    def attempt():
        for path in tmp_path.glob("now-*"):
            path.unlink()
        argv = arguments(images, folder, update_freq=2 // world_size, num_workers=draw.randrange(3),
                         save_every_minutes=draw.choice([0, EVERY_UPDATE]))
        return start_torchrun(world_size, PROGRAMS / "hooked_main.py", hook, *argv)

    for name, target in draw.sample(CASES, 3):
        launcher = attempt()
        everyone, at = disturb(launcher, world_size, tmp_path, name, target, draw), now(tmp_path)[:2]
        [(code, output)] = finish([launcher], 90)
        # Ranks whose launcher was killed save, and have 15 s for that.
        assert_gone(everyone, 30)
        state = Ledger(folder).read("status.json").get("state")
        print(f"{name} to the {target} at {at}: code {code}, {state}")
        assert state in ("PAUSED", "DONE") or name == "SIGKILL" or at[1] < 0, output
        if state == "DONE":
            break
    else:
        [(code, output)] = finish([attempt()], 180)
        assert code == 0, output
    assert_equal_bits(undisturbed[world_size], result(folder))


def test_250_kills_while_saving_leave_no_unusable_folder(tmp_path):
    kill_while_saving(tmp_path, 250)


@pytest.mark.parametrize("damage, count", [(flip, 600), (truncate, 80)])
def test_every_damage_of_the_newest_is_seen(tmp_path, damage, count):
    damaged_newest(tmp_path, count, damage)
