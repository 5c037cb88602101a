"""Imports point one way: each room knows the libraries of its job and the leaf `common`, not its neighbours."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"common", "config", "models", "datasets", "optim", "launch", "run", "report", "native", "tools", "benchmarks", "engine",
         "main", "training", "evaluation", "dryrun", "scoring", "tests"}
MAY_KNOW = {
    "common": set(),
    "config": {"common"},
    "models": {"common", "native"},
    "datasets": {"common", "native"},
    "optim": {"common"},
    "launch": {"common"},
    "run": {"common", "config", "engine"},  # the figures of an epoch
    "engine": {"common"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of the modules a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_KNOW)
def test_a_room_knows_only_its_own_and_the_leaf(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        strangers = imported(path) & ROOMS - MAY_KNOW[room] - {room}
        assert not strangers, f"{path.relative_to(ROOT)} imports {', '.join(sorted(strangers))}"


def test_no_prints_and_no_cuda_calls_in_the_rooms():
    for room in MAY_KNOW:
        for path in [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                    assert name not in ("print", "cuda"), f"{path.relative_to(ROOT)}:{node.lineno} calls {name}"
