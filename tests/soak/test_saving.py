"""The long form of tests/system/test_checkpoint_kill.py: `make soak`."""
import pytest

from tests.system.test_checkpoint_kill import damaged_newest, flip, kill_while_saving, truncate

pytestmark = pytest.mark.slow


def test_250_kills_while_saving_leave_no_unusable_folder(tmp_path):
    kill_while_saving(tmp_path, 250)


def test_600_flipped_bits_are_seen(tmp_path):
    damaged_newest(tmp_path, 600, flip)


def test_80_truncations_are_seen(tmp_path):
    damaged_newest(tmp_path, 80, truncate)
