"""A whole HorNet block on a CPU: matrix products through oneDNN, everything else through the compiled
kernels.

`BlockRunner` is what `models.hornet.Block.runner` may hold. It looks at the block at each call and gives
NotImplemented for whatever it would change: a hook that must fire, a layer that was replaced, a mode that
wants to see every operation. Inside, tensors are (B, H, W, C), which is how channels_last (B, C, H, W) lie in
memory.

Measured on one AMD Zen 5 core at HorNet-T's shapes: torch's default float32 product reaches 83-119 GFLOP/s,
the same operands given to oneDNN by name 200-260 (of 260). Calling the operator, instead of a global switch,
keeps true float32 on CPUs where that switch would round to bfloat16. Under autocast the residual stream stays
float32.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as hooks

from models.gnconv import GlobalLocalFilter, GnConv, LayerNorm2d, global_filter, interleave, resize_filter
from models.hornet import Block, residual
from native import kernels

DTYPES = (torch.float32, torch.bfloat16)
LARGEST_DFT = 48  # the transform as products grows with the side's third power; from about here an FFT wins
_PLAIN_TENSORS = (Tensor, nn.Parameter)


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` are computed in: float32 where oneDNN has no bfloat16 products for this CPU.

    Ten times faster there than torch's own bfloat16 product, and the same sums: of bfloat16 values, in
    float32.
    """
    if dtype != torch.bfloat16:
        return dtype
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False,
            onednn: bool = True) -> Tensor:
    """x (..., in) @ weight (out, in)^T + bias, then GELU if asked, by oneDNN, for which `weight` can be a
    packed one, or by torch's default library.
    """
    dtype = product_dtype(x.dtype)
    given = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if onednn:
        after = ("gelu", [], "none") if gelu else ("none", [], "")
        out = torch.ops.mkldnn._linear_pointwise(*given, *after)
    else:
        with torch.autocast("cpu", enabled=False):  # which would make bfloat16 of float32 again
            out = F.gelu(F.linear(*given)) if gelu else F.linear(*given)
    return out.to(x.dtype)


class _Differentiable(torch.autograd.Function):
    """A function with a backward of its own: `forward(*arguments)` gives the output and the tensors that are
    kept, `backward(gradient, *kept)` a gradient for each argument.
    """

    @staticmethod
    def forward(ctx, forward: Callable, backward: Callable, *arguments) -> Tensor:
        out, kept = forward(*arguments)
        ctx.save_for_backward(*kept)
        ctx.function = backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, None, *ctx.function(grad, *ctx.saved_tensors)


class BlockRunner:
    """Computes a Block in place of its `forward`.

    Args:
        onednn: matrix products by oneDNN, else by torch's default library.
        compiled: use the kernels of `kernels.py`; without, what is no matrix product is plain PyTorch.

    Attributes:
        packed: what is made of weights once per evaluation: id(weight) -> (weight, its matrix in oneDNN's own
            layout, bias) by `pack`, the rest by `_prepared`.
    """

    def __init__(self, onednn: bool = True, compiled: bool = True):
        self.onednn, self.compiled = onednn, compiled
        self.packed: dict[object, tuple] = {}

    def __call__(self, block: Block, x: Tensor, keep: Tensor | None) -> Tensor:
        dtype = served_dtype(block, x, keep)
        if dtype is None or (self.compiled and kernels.library() is None):  # a model pickled elsewhere
            return NotImplemented
        first, second = (None, None) if keep is None else keep.unbind(1)
        x = x.permute(0, 2, 3, 1)
        x = self.join(x, lambda y: self._mix(block, y, dtype), block.gamma1, first)
        x = self.join(x, lambda y: self._mlp(block, y, dtype), block.gamma2, second)
        return x.permute(0, 3, 1, 2)

    def _mix(self, block: Block, x: Tensor, dtype: torch.dtype) -> Tensor:
        gnconv, norm = block.gnconv, block.norm1
        x = self.linear(self.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype), gnconv.proj_in, dtype)
        p, q = x.split((gnconv.dims[0], sum(gnconv.dims)), dim=-1)
        if type(gnconv.dwconv) is GlobalLocalFilter:
            q = self._filter(gnconv.dwconv, q, gnconv.scale, dtype)
        else:
            q = self.depthwise(q, gnconv.dwconv, gnconv.scale, dtype)
        return self.linear(self.recursion(p, q, gnconv.pws.children(), dtype), gnconv.proj_out, dtype)

    def _filter(self, layer: GlobalLocalFilter, x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        pre, post = layer.pre_norm, layer.post_norm
        x = self.layer_norm(x, pre.weight, pre.bias, pre.eps, dtype)
        x = self.global_local(x, layer.dw.weight, layer.complex_weight, dtype)
        return self.layer_norm(x, post.weight * scale, post.bias * scale, post.eps, dtype)

    def _mlp(self, block: Block, x: Tensor, dtype: torch.dtype) -> Tensor:
        norm = block.norm2
        x = self.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)
        return self.linear(self.linear(x, block.pwconv1, dtype, gelu=True), block.pwconv2, dtype)

    def linear(self, x: Tensor, layer: Any, dtype: torch.dtype, gelu: bool = False) -> Tensor:
        """x (..., in) through a Linear or 1x1 convolution, then the exact GELU if asked."""
        x = x.to(dtype)
        packed = None if torch.is_grad_enabled() else self.packed.get(id(layer.weight))
        if packed is not None and packed[2].dtype == dtype:  # the matrix may be kept in a wider one
            return product(x, packed[1], packed[2], gelu)
        matrix, bias = layer.weight.flatten(1).to(dtype), layer.bias.to(dtype)
        if not torch.is_grad_enabled():
            return product(x, matrix, bias, gelu, self.onednn)
        if gelu and not self.compiled:
            return F.gelu(self.linear(x, layer, dtype))
        return _Differentiable.apply(self._linear, self._linear_backward, x, matrix, bias, gelu)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> tuple[Tensor, tuple]:
        out = hidden = product(x, weight, bias, onednn=self.onednn)
        if not gelu:
            return out, (x, weight, None)
        out = kernels.gelu(hidden, with_slope=True)
        return out, (x, weight, hidden)  # GELU's slope by now

    def _linear_backward(self, grad: Tensor, x: Tensor, weight: Tensor, slope: Tensor | None) -> tuple:
        grad = grad.contiguous() if slope is None else grad * slope
        return *self._linear_grads(x, weight, grad), None

    def _linear_grads(self, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x (..., in), weight (out, in) and bias from grad (..., out)."""
        if grad.dtype != product_dtype(grad.dtype):
            grads = self._linear_grads(x.float(), weight.float(), grad.float())
            return grads[0].to(grad.dtype), grads[1].to(grad.dtype), grads[2].to(grad.dtype)
        shape, x, grad = x.shape, x.flatten(0, -2), grad.flatten(0, -2)
        if grad.dtype == torch.bfloat16 or not self.onednn:  # the default library is at its peak here
            return (grad @ weight).view(shape), grad.t() @ x, grad.sum(0)
        d_x = product(grad, weight.t()).view(shape)
        if self.compiled:
            return d_x, *kernels.weight_grad(x, grad)
        if grad.shape[1] > x.shape[1]:  # oneDNN copies its first operand: let it be the narrow one
            return d_x, product(x.t(), grad.t()).t().contiguous(), grad.sum(0)
        return d_x, product(grad.t(), x.t()), grad.sum(0)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Over the last axis, given in `dtype`."""
        if not self.compiled:
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        return _Differentiable.apply(kernels.layer_norm, kernels.layer_norm_backward, x.contiguous(),
                                     weight.float(), bias.float(), eps, dtype)

    def _prepared(self, make: Callable[[], tuple], *key) -> tuple:
        """What `make` gives, computed once while weights are packed, every time otherwise."""
        if torch.is_grad_enabled() or not self.packed:
            return make()
        if key not in self.packed:
            self.packed[key] = make()
        return self.packed[key]

    def depthwise(self, x: Tensor, layer: Any, scale: float, dtype: torch.dtype) -> Tensor:
        """x (B, H, W, C) through a depthwise convolution, whose weight and bias are multiplied by `scale`."""
        weight, bias = layer.weight, layer.bias
        if not self.compiled or weight.shape[2:] not in ((3, 3), (7, 7)):
            padding = (weight.shape[2] // 2, weight.shape[3] // 2)
            weight, bias = weight * scale, None if bias is None else bias * scale
            out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
            return out.permute(0, 2, 3, 1)

        def make() -> tuple[Tensor, Tensor | None]:
            taps = (weight.float() * scale).flatten(1).t().contiguous()
            return taps, None if bias is None else (bias.float() * scale).contiguous()
        return _Differentiable.apply(kernels.depthwise, kernels.depthwise_backward, x.to(dtype),
                                     *self._prepared(make, id(weight), scale))

    def global_local(self, x: Tensor, weight: Tensor, spectrum: Tensor, dtype: torch.dtype) -> Tensor:
        """Both halves in one kernel, with the Fourier transform as small matrix products; FFT for large maps.
        """
        height, width = x.shape[1:3]
        if not self.compiled or max(height, width) > LARGEST_DFT or weight.shape[2] != 3:
            local, remote = x.permute(0, 3, 1, 2).chunk(2, dim=1)
            local = F.conv2d(local, weight, None, padding=weight.shape[2] // 2, groups=weight.shape[0])
            return interleave(local, global_filter(remote, spectrum)).permute(0, 2, 3, 1)

        def make() -> tuple[Tensor, Tensor]:
            resized = resize_filter(spectrum.float(), (height, width // 2 + 1))
            return weight.float().flatten(1).t().contiguous(), resized.permute(1, 2, 3, 0).contiguous()
        return _Differentiable.apply(
            kernels.global_local, kernels.global_local_backward, x.to(dtype).contiguous(),
            *self._prepared(make, id(weight), height, width))

    def recursion(self, p: Tensor, q: Tensor, projections: Iterable[Any], dtype: torch.dtype) -> Tensor:
        """x = p * q[0], then x = layers[k](x) * q[k + 1]; q's parts lie side by side in its channels."""
        layers = list(projections)
        if self.compiled and torch.is_grad_enabled():
            parameters = [t.to(dtype) for layer in layers for t in (layer.weight.flatten(1), layer.bias)]
            return _Differentiable.apply(self._recursion, self._recursion_backward, p.to(dtype), q.to(dtype),
                                         *parameters)
        gates = q.split([p.shape[-1], *(layer.weight.shape[0] for layer in layers)], dim=-1)
        x = p * gates[0]
        for layer, gate in zip(layers, gates[1:]):
            x = self.linear(x, layer, dtype)
            # Without gradients the product overwrites the projection's fresh output.
            x = x * gate if torch.is_grad_enabled() or x.dtype != gate.dtype else x.mul_(gate)
        return x

    def _recursion(self, p: Tensor, q: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple]:
        states, start = [kernels.gate(p, q[..., :p.shape[-1]])], p.shape[-1]
        for weight, bias in zip(parameters[::2], parameters[1::2]):
            hidden = product(states[-1], weight, bias, onednn=self.onednn)
            states += hidden, kernels.gate(hidden, q[..., start:start + len(weight)])
            start += len(weight)
        return states[-1], (p, q, *parameters[::2], *states[:-1])

    def _recursion_backward(self, grad: Tensor, p: Tensor, q: Tensor, *rest: Tensor) -> tuple:
        """The gates' gradients are written side by side and need no concatenation."""
        steps = len(rest) // 3
        weights, states = rest[:steps], (p, *rest[steps:])
        d_q, end, grads = torch.empty(q.shape, dtype=q.dtype), q.shape[-1], []
        grad = grad.contiguous()
        for k in reversed(range(steps + 1)):
            hidden = states[2 * k]
            gate = slice(end - hidden.shape[-1], end)
            grad, end = kernels.gate_backward(grad, hidden, q[..., gate], d_q[..., gate]), gate.start
            if k:
                grad, *both = self._linear_grads(states[2 * k - 1], weights[k - 1], grad)
                grads = both + grads
        return grad, d_q, *grads

    def join(self, x: Tensor, branch: Callable[[Tensor], Tensor], gamma: Tensor | None,
             keep: Tensor | None) -> Tensor:
        """x + keep * gamma * branch(x); dropped samples of a branch are not computed (one always is, so that
        every parameter has a gradient, if only zero, and all ranks communicate).
        """
        if not self.compiled or gamma is None:
            out = residual(x.permute(0, 3, 1, 2), branch(x).permute(0, 3, 1, 2), gamma, keep)
            return out.permute(0, 2, 3, 1)
        x = x.to(torch.promote_types(x.dtype, gamma.dtype)).contiguous()
        count, slot, taken = x.shape[0], None, x
        if keep is not None and not keep.all():
            index = keep.nonzero()[:, 0] if keep.any() else torch.zeros(1, dtype=torch.int64)
            slot = torch.full((count,), -1).index_copy_(0, index, torch.arange(len(index)))
            taken = x.index_select(0, index)
        y = branch(taken).contiguous()
        if y.dtype != torch.bfloat16:
            y = y.to(x.dtype)
        keep = None if keep is None else keep.float().contiguous()
        if not torch.is_grad_enabled() and taken is x and y.dtype == x.dtype:
            return kernels.join(x, y, gamma.float(), keep, slot, out=y)[0]
        return _Differentiable.apply(kernels.join, kernels.join_backward, x, y, gamma.float(), keep, slot)

    def pack(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Reorder the matrices of the blocks of `model` for evaluation in `dtype`."""
        if not self.onednn or dtype not in DTYPES:
            return
        for block in model.modules():
            if type(block) is not Block or _dtype_as_built(block) is None:
                continue
            gnconv = block.gnconv
            layers: list[Any] = [block.pwconv1, block.pwconv2, gnconv.proj_in, gnconv.proj_out, *gnconv.pws]
            for layer in layers:
                matrix = layer.weight.detach().flatten(1).to(dtype).to(product_dtype(dtype)).contiguous()
                matrix = torch.ops.mkldnn._reorder_linear_weight(matrix)
                self.packed[id(layer.weight)] = layer.weight, matrix, layer.bias.detach().to(dtype)


def served_dtype(block: Block, x: Tensor, keep: Tensor | None) -> torch.dtype | None:
    """The type that `block` computes in where the fast path changes nothing that shows, else None."""
    if _watched() or type(x) is not Tensor or not x.is_cpu or x.ndim != 4 or not x.numel():
        return None
    if x.dtype not in DTYPES or (keep is not None and (type(keep) is not Tensor or not keep.is_cpu)):
        return None
    weights = _dtype_as_built(block)
    if weights is None:
        return None
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype if x.dtype == weights else None  # plain PyTorch has its say about a mixture
    dtype = torch.get_autocast_dtype("cpu")
    return dtype if dtype in DTYPES and (x.dtype, dtype) != (torch.bfloat16, torch.float32) else None


def _watched() -> bool:
    """Whether somebody looks at single operations: a compiler, tracer, transform, mode or global hook."""
    inside: Any = torch._C
    return bool(
        torch.compiler.is_compiling() or torch.jit.is_tracing() or inside._functorch.peek_interpreter_stack()
        or inside._len_torch_dispatch_stack() or inside._len_torch_function_stack()
        or forward_ad._current_level >= 0 or hooks._global_forward_hooks or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks or hooks._global_backward_pre_hooks)


@dataclass
class _Seen:
    """A block as it was at its last call; `states` are the `__dict__` of its modules, its own first."""

    modules: list[nn.Module]
    states: list[dict]
    parents: list[dict]
    convs: list[dict]
    filters: list[Any]
    facts: list = field(default_factory=list)
    dtype: torch.dtype | None = None


_SEEN: WeakKeyDictionary[Block, _Seen] = WeakKeyDictionary()
_TENSOR = attrgetter("__class__", "dtype", "is_cpu")
_FORM = itemgetter("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_KINDS = {"": Block, "norm1": LayerNorm2d, "norm2": nn.LayerNorm, "pwconv1": nn.Linear, "pwconv2": nn.Linear,
          "gnconv": GnConv, "gnconv.proj_in": nn.Conv2d, "gnconv.proj_out": nn.Conv2d,
          "gnconv.pws": nn.ModuleList}
_FILTER_KINDS = {"gnconv.dwconv": GlobalLocalFilter, "gnconv.dwconv.dw": nn.Conv2d,
                 "gnconv.dwconv.pre_norm": LayerNorm2d, "gnconv.dwconv.post_norm": LayerNorm2d}


def _dtype_as_built(block: Block) -> torch.dtype | None:
    """The type of the weights where every module in `block` is what the runner computes, without hooks.

    All facts are read at every call, from the modules' own dictionaries, since `nn.Module.__getattr__` would
    take most of the time. Remembered is only where they lie and what follows from them.
    """
    seen = _SEEN.get(block)
    if seen is None or _facts(seen) != seen.facts:
        seen = _SEEN[block] = _look(block)
    for state in seen.states[1:]:  # the block's own hooks fire around its runner
        if (state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
                or state["_backward_pre_hooks"] or "forward" in state or "_compiled_call_impl" in state):
            return None
    return seen.dtype


def _facts(seen: _Seen) -> list:
    """Types, children, parameters' types and places, forms of convolutions: all that decides but hooks."""
    tensors = [p for state in seen.states for p in state["_parameters"].values() if p is not None]
    return [*map(type, seen.modules), *map(_TENSOR, tensors), *map(_FORM, seen.convs),
            *[dict(state["_modules"]) for state in seen.parents], *[f.fourier for f in seen.filters]]


def _look(block: Block) -> _Seen:
    """Find the modules of `block` and decide whether the runner computes such a one."""
    named = dict(block.named_modules())
    states = {name: module.__dict__ for name, module in named.items()}
    seen = _Seen([*named.values()], [*states.values()], [s for s in states.values() if s["_modules"]],
                 [m.__dict__ for m in named.values() if type(m) is nn.Conv2d],
                 [m for m in named.values() if type(m) is GlobalLocalFilter])
    seen.facts = _facts(seen)
    kinds = _KINDS | {name: nn.Conv2d for name in named if name.startswith("gnconv.pws.")}
    kinds |= _FILTER_KINDS if seen.filters else {"gnconv.dwconv": nn.Conv2d}
    if ({name: type(module) for name, module in named.items()} == kinds
            and all(_computes(name, state) for name, state in states.items())
            and all(each.fourier is None for each in seen.filters)):
        seen.dtype = block.pwconv1.weight.dtype
    return seen


def _computes(name: str, state: dict) -> bool:
    """Whether the runner computes the module `name` of a block, whose type is as built, with this state."""
    depthwise = name in ("gnconv.dwconv", "gnconv.dwconv.dw")
    for p in state["_parameters"].values():
        if p is None and not (depthwise or name == ""):  # a layer's bias; layer scale can be left out
            return False
        if p is not None and not (type(p) in _PLAIN_TENSORS and p.is_cpu and p.dtype in DTYPES):
            return False
    if "kernel_size" not in state:
        return True
    size, groups = (state["kernel_size"][0], state["in_channels"]) if depthwise else (1, 1)
    return size % 2 == 1 and _FORM(state) == (
        (size, size), (1, 1), (size // 2, size // 2), (1, 1), groups, "zeros")
