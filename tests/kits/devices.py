"""Devices that are not there: operations on them are checked and counted, not computed."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What makes a tensor without starting a kernel.
_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "lift_fresh",
         "set_", "resize_", "is_pinned", "_pin_memory", "record_stream", "is_same_size", "_local_scalar_dense",
         "device", "_record_function_enter_new", "_record_function_exit"}
# What makes the host wait, whatever its arguments.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
          "unique_consecutive", "bincount", "histc", "repeat_interleave"}


class Launches(TorchDispatchMode):
    """Counts the operations that start kernels, a fused or foreach one as one: `total`."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.total += not function.is_view and function.overloadpacket.__name__ not in _FREE
        return function(*arguments, **(keywords or {}))


class HostWaits(RuntimeError):
    """An operation brought something from the device to the host."""


class NoHostReads(TorchDispatchMode):
    """Raises HostWaits where the host would wait for a device other than the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name, given = function.overloadpacket.__name__, _on_cpu((arguments, keywords))
        if name in _WAITS and not all(given):
            raise HostWaits(name)
        result = function(*arguments, **(keywords or {}))
        sources, made = (given[1:], given[:1]) if name == "copy_" else (given, _on_cpu(result))
        if any(made) and not all(sources):
            raise HostWaits(name)
        return result


def _on_cpu(tree: object) -> list[bool]:
    return [leaf.device.type == "cpu" for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def fake_cuda(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within, CUDA tensors can be made, of shapes and types alone, and their mixture with others raises.

    With autocast to `dtype`, set by hand: `torch.autocast("cuda")` switches itself off without a GPU.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        if dtype is not None:
            torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", dtype is not None)
        _foreach_utils._foreach_supported_types.append(FakeTensor)  # else each tensor would be clipped by itself
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        _foreach_utils._foreach_supported_types.remove(FakeTensor)
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def to_cuda(model: nn.Module) -> nn.Module:
    """`model`, built on the CPU, with CUDA parameters; inside `fake_cuda`."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"), p.requires_grad)
    return model
