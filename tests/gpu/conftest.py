"""`make gpu`: what needs a GPU, with one table of the figures at the end. Without a GPU everything here skips."""
import pytest
import torch

from benchmarks.timing import table

ROWS: list[dict] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="PyTorch finds no GPU on this machine"))


@pytest.fixture
def figure():
    """Files a row of the table; the test fails where it does not hold."""
    def add(what: str, found: object, expected: str, holds: bool = True) -> None:
        ROWS.append({"what": what, "found": found, "expected": expected, "holds": "yes" if holds else "NO"})
        assert holds, ROWS[-1]
    return add


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        about = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        terminalreporter.write_line(f"\n{about}\n\n{table(ROWS)}\n\nPlease send this table as an issue of the repository, "
                                    "with bench-gpu.json if you have it (docs/GPU.md).")
