"""What many tests share: one data folder for all runs of a worker, and what is logged."""
import logging

import pytest

from common.log import logger
from tests.kits.images import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """train/ and val/ of 52 and 14 images in three classes."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def logged(monkeypatch, caplog):
    """`logged.messages` are the sentences logged during a test."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return caplog
