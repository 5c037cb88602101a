"""A run that was stopped or killed, anywhere, ends with the bits of the run that nobody disturbed."""
import pytest

from tests.survival_kit import (EPOCHS, UPDATES, arguments, assert_equal_bits, codes, descendants, now, result, start,
                                write_pictures)

EVERY_UPDATE = 1e-9


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks = start(arguments(pictures, folder), folder / "console")
    assert codes(ranks) == [0], ranks[0].text()
    found = result(folder)
    assert [line["epoch"] for line in found["log"]] == [*range(EPOCHS)]
    assert found["update"] == EPOCHS * UPDATES
    return found


def attempt(pictures, folder, *at, **changes):
    """Exit code of one attempt of the run in `folder`, disturbed at the moments `at`."""
    [rank] = start(arguments(pictures, folder, **changes), folder.with_suffix(".console"), at=at)
    return codes([rank])[0]


@pytest.mark.parametrize("before, after", [(0, 2), (1, 0), (2, 1)])
@pytest.mark.parametrize("phase, update", [("forward", UPDATES + 3), ("step", UPDATES - 1), ("evaluation", 2 * UPDATES),
                                           ("data", 0)], ids="mid-epoch last-of-epoch evaluation first".split())
def test_stopped_and_resumed(pictures, undisturbed, tmp_path, phase, update, before, after):
    folder = tmp_path / "run"
    at = dict(phase=phase, update=update, do="SIGTERM")
    assert attempt(pictures, folder, at, num_workers=before) == 75
    assert attempt(pictures, folder, num_workers=after) == 0
    assert_equal_bits(undisturbed, result(folder))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_and_resumed(pictures, undisturbed, tmp_path, workers):
    """With a save at every update, and once without any within an epoch."""
    folder = tmp_path / "run"
    for phase, update, minutes in [("backward", 4, EVERY_UPDATE), ("saving", UPDATES + 2, EVERY_UPDATE),
                                   ("saving", 2 * UPDATES, 0), ("evaluation", 2 * UPDATES, EVERY_UPDATE),
                                   ("data", 3 * UPDATES - 1, 0)]:
        at = dict(phase=phase, update=update, do="SIGKILL")
        assert attempt(pictures, folder, at, num_workers=workers, save_every_minutes=minutes) == -9
    assert attempt(pictures, folder, num_workers=2 - workers) == 0
    assert_equal_bits(undisturbed, result(folder))


def test_the_comparison_sees_a_single_draw(pictures, undisturbed, tmp_path):
    """Another seed of the drop path alone would show in every tensor; so does one update more or less."""
    folder = tmp_path / "run"
    assert attempt(pictures, folder, drop_path=0.2) == 0
    with pytest.raises(AssertionError, match="model"):
        assert_equal_bits(undisturbed, result(folder))
