"""Moved to tests/kits/fill.py."""
from tests.kits.fill import *  # noqa: F403
