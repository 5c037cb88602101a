"""README's table of promises names tests that there are."""
import re

import pytest

from tests.kits.docs import ROOT

PROMISES = re.findall(r"^\| (.+?) \| .+ \| (`tests/.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_there_are_promises():
    assert len(PROMISES) >= 12


@pytest.mark.parametrize("fault, proofs", PROMISES, ids=[fault[:40] for fault, _ in PROMISES])
def test_the_tests_that_prove_a_promise_exist(fault, proofs):
    for name in re.findall(r"`(.+?)`", proofs):
        found = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).glob("test_*.py"))
        assert found and all("def test_" in path.read_text() for path in found), name
