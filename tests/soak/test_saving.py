"""The long form of tests/system/test_checkpoint_kill.py: `make soak`."""
import pytest

from tests.system.test_checkpoint_kill import damaged_newest, flip, kill_while_saving, truncate

pytestmark = pytest.mark.slow


def test_250_kills_while_saving_leave_no_unusable_folder(tmp_path):
    kill_while_saving(tmp_path, 250)


@pytest.mark.parametrize("damage, count", [(flip, 600), (truncate, 80)])
def test_every_damage_of_the_newest_is_seen(tmp_path, damage, count):
    damaged_newest(tmp_path, count, damage)
