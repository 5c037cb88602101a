"""Moved to tests/kits/processes.py."""
from tests.kits.processes import *  # noqa: F403
