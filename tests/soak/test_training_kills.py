"""kill -9 at random moments of a real training, start-up and saving included: the bits of the run left
alone."""
import os
import random
import time

import pytest

from tests.kits.processes import assert_gone, codes, descendants
from tests.kits.runs import EPOCHS, UPDATES, arguments, assert_equal_bits, now, result, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS = 30 if os.environ.get("HORNET_SOAK") else 4
EVERY_UPDATE = 1e-9


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """What the run leaves, and how long it takes on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("first", "second"):  # PyTorch is loaded once, with the first
        began = time.monotonic()
        assert codes(start(arguments(images, folder / name), folder / "console")) == [0]
    return result(folder / name), time.monotonic() - began


def killed(argv, tmp_path, seconds) -> bool:
    """Start, and kill -9 after `seconds`; False when it was done, and well, before that."""
    (tmp_path / "now-0").unlink(missing_ok=True)
    [rank] = start(argv, tmp_path / "console", now=str(tmp_path))
    rank.wait(seconds)
    workers, running = descendants(rank.pid), rank.poll() is None
    rank.kill()
    assert_gone(workers)
    assert running or rank.poll() in (0, -9), rank.text()
    return rank.poll() != 0


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_again_and_again_it_ends_with_the_same_bits(images, undisturbed, tmp_path, workers):
    expected, seconds = undisturbed
    draw, folder, moments, runs = random.Random(workers), tmp_path / "run0", [], 0
    while len(moments) < KILLS:
        argv = arguments(images, folder, num_workers=workers,
                         save_every_minutes=draw.choice([0, EVERY_UPDATE]))
        if killed(argv, tmp_path, draw.uniform(0.1, 1) * seconds):
            moments.append(now(tmp_path)[:2])
        else:
            assert_equal_bits(expected, result(folder))
            runs += 1
            folder = tmp_path / f"run{runs}"
    assert codes(start(arguments(images, folder, num_workers=workers), tmp_path / "console")) == [0]
    assert_equal_bits(expected, result(folder))
    print(f"{workers} workers: {KILLS} kills in {runs + 1} runs of {EPOCHS * UPDATES} updates, in {moments}")
