"""`make gpu`: what needs a GPU, with one table of the figures at the end. Without a GPU everything here skips."""
import pytest
import torch

from benchmarks.timing import markdown

ROWS: list[list[str]] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="PyTorch finds no GPU on this machine"))


@pytest.fixture
def figure():
    """Files a row of the table; the test fails where it does not hold."""
    def add(what: str, found: float | str, expected: str, holds: bool = True) -> None:
        ROWS.append([what, f"{found:.3g}" if isinstance(found, float) else str(found), expected, "yes" if holds else "NO"])
        assert holds, f"{what}: {found}, expected {expected}"
    return add


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
        terminalreporter.write_line(f"\n{count} x {name}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
        terminalreporter.write_line(markdown("what, found, expected, holds", ROWS))
        terminalreporter.write_line("\nPlease send this table as an issue of the repository, with bench-gpu.json if you "
                                    "have it (docs/GPU.md).")
