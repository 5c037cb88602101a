"""`make quickstart` on a machine that lacks something says so in one sentence before anything is made."""
import os
import shutil
import subprocess

import pytest

from tests.kits.docs import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.mark.parametrize("lacks, sentence", [
    ("", "was not found: install Python 3.11 or later (Debian: apt install python3 python3-venv)."),
    ("version", "is too old: Python 3.11 or later is needed"),
    ("ensurepip", "Python's venv module is missing: install it (Debian: apt install python3-venv).")])
@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_what_is_missing_is_one_sentence(tmp_path, lacks, sentence, target):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    if lacks:  # an interpreter that fails when the Makefile asks it about this
        python.write_text(f'#!/bin/sh\ncase "$*" in *{lacks}*) exit 1;; esac\n')
        python.chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    ended = subprocess.run(["make", f"PYTHON={python}", target], cwd=tmp_path, env=outside, capture_output=True, text=True,
                           timeout=60)
    assert ended.returncode == 2 and sentence in ended.stdout, ended
    assert len(ended.stdout.strip().splitlines()) == 1, ended
    assert not (tmp_path / ".venv").exists()
