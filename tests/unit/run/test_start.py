"""What is looked at before a start: it is silent when all is well."""
from types import SimpleNamespace

import torch

from run.start import check_writable, process_problems
from tests.kits.errors import refused


def test_processes_must_agree():
    def problems(**change):
        """Of rank 0 of two processes, the other being as `change` says."""
        return process_problems(SimpleNamespace(
            node_name="one", device=torch.device("cpu"), all_gather_object=lambda mine: [mine, ("two", mine[1] | change)]))
    assert problems() == []
    for name in ("timm", "kernels", "code"):
        (old,) = problems(**{name: "0.4"})
        assert old.startswith(f"{name} is ") and "0.4 on rank 1 (two)" in old


def test_writing_is_tried_without_a_trace(tmp_path):
    check_writable("--output_dir", str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with refused("unusable_folder", "--output_dir"):
        check_writable("--output_dir", str(tmp_path / "file" / "run"))
