"""What every training looks at before it starts: it is silent when all is well."""
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from run.start import check_writable, memory_problems, process_problems


class Pair:
    """What rank 0 of two processes sees, the other being as `other` says."""

    world_size, rank, device, local_world_size = 2, 0, torch.device("cpu"), 2
    node_name = "one"

    def __init__(self, other=lambda mine: mine, factor=1):
        self.other, self.factor = other, factor

    def all_gather_object(self, mine):
        return [mine, self.other(mine) if isinstance(mine, tuple) else mine]

    def all_reduce_(self, tensor, op="sum"):
        return tensor.mul_(2).add_(1).mul_(self.factor)


def test_processes_must_agree():
    assert process_problems(Pair()) == []
    old = process_problems(Pair(lambda m: ("two", m[1] | {"timm": "0.4"}, m[2])))
    assert len(old) == 1 and "timm is " in old[0] and "0.4 on rank 1 (two)" in old[0]
    assert "on rank 0 (one)" in process_problems(Pair(factor=3))[0]


def test_shared_memory_is_counted_for_all_workers_of_a_node(tmp_path):
    class Node(Pair):
        local_world_size = 8

    options = SimpleNamespace(num_workers=10, batch_size=2 ** 20, input_size=224)
    (problem,) = memory_problems(options, Node(), str(tmp_path))
    assert "10 workers x 8 processes" in problem and "--shm-size=58717g" in problem  # 8 x 31 x 1.5 x 2^20 x 3 x 224^2
    assert memory_problems(SimpleNamespace(num_workers=0, batch_size=2 ** 20, input_size=224), Node(), str(tmp_path)) == []


def test_writing_is_tried_without_a_trace(tmp_path):
    check_writable("--output_dir", str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        check_writable("--output_dir", str(tmp_path / "file" / "run"))
    assert error.value.code == "unusable_folder" and "--output_dir" in str(error.value)
