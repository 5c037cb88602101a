"""README's table of promises names tests that there are."""
import re

from tests.kits.docs import ROOT


def test_the_tests_that_prove_a_promise_exist():
    promises = re.findall(r"^\| .+? \| .+ \| (`tests/.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(promises) >= 12
    for name in re.findall(r"`(.+?)`", " ".join(promises)):
        found = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).glob("test_*.py"))
        assert found and all("def test_" in path.read_text() for path in found), name
