"""Moved to tests/kits/docs.py."""
from tests.kits.docs import *  # noqa: F403
