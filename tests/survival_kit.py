"""Moved to tests/kits/runs.py."""
from tests.kits.images import write_images as write_pictures  # noqa: E402, F401
from tests.kits.runs import *  # noqa: F403
