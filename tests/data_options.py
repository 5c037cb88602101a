"""Moved to tests/kits/options.py."""
from tests.kits.options import *  # noqa: F403
