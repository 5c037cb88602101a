"""Moved to tests/kits/toy.py."""
from tests.kits.toy import *  # noqa: F403
