"""Moved to tests/kits/runs.py."""
from tests.kits.runs import *  # noqa: F403

write_pictures = write_images  # noqa: F405
