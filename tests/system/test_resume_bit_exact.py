"""A run that was stopped or killed, anywhere, ends with the bits of the run that nobody disturbed."""
import pytest

from tests.kits.processes import codes
from tests.kits.runs import EPOCHS, UPDATES, arguments, assert_equal_bits, result, start

EVERY_UPDATE = 1e-9


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks = start(arguments(images, folder), folder / "console")
    assert codes(ranks) == [0], ranks[0].text()
    found = result(folder)
    assert [line["epoch"] for line in found["log"]] == [*range(EPOCHS)]
    assert found["update"] == EPOCHS * UPDATES
    return found


def attempt(images, folder, *at, **changes):
    """Exit code of one attempt of the run in `folder`, disturbed at the moments `at`."""
    [rank] = start(arguments(images, folder, **changes), folder.with_suffix(".console"), at=at)
    return codes([rank])[0]


MOMENTS = {"mid-epoch": ("forward", UPDATES + 3), "end of an epoch": ("step", UPDATES - 1),
           "evaluation": ("evaluation", 2 * UPDATES), "first update": ("data", 0)}
BRIEF = [("mid-epoch", 2, 1), ("end of an epoch", 0, 2), ("evaluation", 1, 0)]
ALL = [(moment, *workers) for moment in MOMENTS for workers in ((0, 1), (1, 2), (2, 0))]


@pytest.mark.parametrize("moment, before, after",
                         BRIEF + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL])
def test_stopped_and_resumed(images, undisturbed, tmp_path, moment, before, after):
    folder, (phase, update) = tmp_path / "run", MOMENTS[moment]
    at = dict(phase=phase, update=update, do="SIGTERM")
    assert attempt(images, folder, at, num_workers=before) == 75
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
        at = dict(phase=phase, update=update, do="SIGKILL")
        assert attempt(images, folder, at, num_workers=workers, save_every_minutes=minutes) == -9
    assert attempt(images, folder, num_workers=2 - workers) == 0
    assert_equal_bits(undisturbed, result(folder))


def test_deterministic_algorithms_alone_are_enough_for_all_of_training(images, undisturbed, tmp_path):
    """The switch is for GPUs; on a CPU it shows that no operator is left without such an algorithm."""
    folder = tmp_path / "run"
    assert attempt(images, folder, deterministic="true") == 0
    assert_equal_bits(undisturbed, result(folder))


@pytest.mark.slow
def test_updates_that_were_not_applied_are_still_counted_after_a_stop(images, tmp_path):
    poison = dict(phase="forward", update=UPDATES + 1, do="infinite_input")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert attempt(images, whole, poison) == 0
    assert attempt(images, folder, poison, dict(phase="forward", update=UPDATES + 3, do="SIGTERM")) == 75
    assert attempt(images, folder) == 0
    assert result(whole)["log"][1]["nonfinite_updates"] == 1 and result(whole)["policy"]["skipped"] == 1
    assert_equal_bits(result(whole), result(folder))
