"""One data folder for all runs of a worker."""
import pytest

from tests.kits.images import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """train/ and val/ of 52 and 14 noise images in three classes."""
    return write_images(tmp_path_factory.mktemp("images"))
