"""A run that was stopped or killed, anywhere, ends with the bits of the run that nobody disturbed."""
import pytest

from tests.kits.processes import codes
from tests.kits.runs import EPOCHS, UPDATES, arguments, assert_equal_bits, result, start

EVERY_UPDATE = 1e-9


def attempt(images, folder, *at, **changes):
    """Exit code of one attempt of the run in `folder`, disturbed at the moments `at`: (phase, update, what is done)."""
    moments = [dict(zip(("phase", "update", "do"), moment)) for moment in at]
    return codes(start(arguments(images, folder, **changes), folder.with_suffix(".console"), at=moments))[0]


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """With deterministic algorithms alone: that switch is for GPUs; on a CPU it shows that no operator of a training is
    left without such an algorithm, and that the bits are those without it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert attempt(images, folder, deterministic="true") == 0
    found = result(folder)
    assert [line["epoch"] for line in found["log"]] == [*range(EPOCHS)] and found["update"] == EPOCHS * UPDATES
    return found


MOMENTS = {"mid-epoch": ("forward", UPDATES + 3), "end of an epoch": ("step", UPDATES - 1),
           "evaluation": ("evaluation", 2 * UPDATES), "first update": ("data", 0)}
BRIEF = [("mid-epoch", 2, 1), ("end of an epoch", 0, 2), ("evaluation", 1, 0)]
ALL = [(moment, *workers) for moment in MOMENTS for workers in ((0, 1), (1, 2), (2, 0))]


@pytest.mark.parametrize("moment, before, after",
                         BRIEF + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL])
def test_stopped_and_resumed(images, undisturbed, tmp_path, moment, before, after):
    folder = tmp_path / "run"
    assert attempt(images, folder, (*MOMENTS[moment], "SIGTERM"), num_workers=before) == 75
    assert attempt(images, folder, num_workers=after) == 0
    assert_equal_bits(undisturbed, result(folder))


KILLS = [("backward", 4, EVERY_UPDATE), ("saving", UPDATES + 2, EVERY_UPDATE), ("saving", 2 * UPDATES, 0),
         ("evaluation", 2 * UPDATES, EVERY_UPDATE), ("data", 3 * UPDATES - 1, 0)]


@pytest.mark.parametrize("workers, kills", [
    (2, KILLS[1:2]), (0, KILLS[3:4]), *(pytest.param(w, KILLS, marks=pytest.mark.slow) for w in (0, 1, 2))])
def test_killed_and_resumed(images, undisturbed, tmp_path, workers, kills):
    """With a save at every update, or only at the ends of epochs."""
    folder = tmp_path / "run"
    for phase, update, minutes in kills:
        assert attempt(images, folder, (phase, update, "SIGKILL"), num_workers=workers, save_every_minutes=minutes) == -9
    assert attempt(images, folder, num_workers=2 - workers) == 0
    assert_equal_bits(undisturbed, result(folder))
