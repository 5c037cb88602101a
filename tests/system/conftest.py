"""One trained run for all tables, and each row's own folder."""
import pytest

import main
from tests.kits.faults import TRAIN, Place, command


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of one epoch (two updates) on two classes, with its moving average: a folder to copy."""
    place = Place(tmp_path_factory.mktemp("trained"))
    place.images()
    assert main.main(command(TRAIN, "--model_ema true --model_ema_eval true", place)) == 0
    for path in place.run.glob("checkpoint-e*"):  # saved before the evaluation: rows are about one numbered file
        path.unlink()
    return place.run


@pytest.fixture
def place(tmp_path, trained):
    """A row's own folder with two classes of images."""
    made = Place(tmp_path, trained)
    made.images()
    return made
