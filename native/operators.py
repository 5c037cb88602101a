"""HorNet's operators on CPUs: matrix products through oneDNN and the compiled kernels of `native.py`.

Measured on one AMD Zen 5 core at HorNet-T's shapes: torch's default float32 product reaches 83-119 GFLOP/s, the
same operands given to oneDNN by name 200-260 (of 260). Calling the operator, instead of a global switch, keeps
true float32 on CPUs where that switch would round to bfloat16. Under autocast the residual stream stays float32.
"""
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.gnconv import Operators, resize_filter
from native import kernels as native

DTYPES = (torch.float32, torch.bfloat16)
LARGEST_DFT = 48  # the transform as products grows with the third power of the side; from about here an FFT wins


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` are computed in: float32 where oneDNN has no bfloat16 products for this CPU.

    Ten times faster there than torch's own bfloat16 product, and the same sums: of bfloat16 values, in float32.
    """
    if dtype != torch.bfloat16 or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return dtype
    return torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False, onednn: bool = True) -> Tensor:
    """x (..., in) @ weight (out, in)^T + bias, then GELU if asked, by oneDNN, for which `weight` can be a packed one,
    or by torch's default library."""
    dtype = product_dtype(x.dtype)
    given = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if onednn:
        out = torch.ops.mkldnn._linear_pointwise(*given, *(("gelu", [], "none") if gelu else ("none", [], "")))
    else:
        with torch.autocast("cpu", enabled=False):  # which would make bfloat16 of float32 again
            out = F.gelu(F.linear(*given)) if gelu else F.linear(*given)
    return out.to(x.dtype)


def linear_grads(x: Tensor, weight: Tensor, grad: Tensor, ops: "CpuOperators") -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (rows, in), weight (out, in) and bias from grad (rows, out)."""
    if grad.dtype != product_dtype(grad.dtype):
        return tuple(d.to(grad.dtype) for d in linear_grads(x.float(), weight.float(), grad.float(), ops))
    if grad.dtype == torch.bfloat16 or not ops.onednn:  # the default library is at its peak here
        return grad @ weight, grad.t() @ x, grad.sum(0)
    d_x = product(grad, weight.t())
    if ops.compiled:
        return d_x, *native.weight_grad(x, grad)
    if grad.shape[1] > x.shape[1]:  # oneDNN copies its first operand: let it be the narrow one
        return d_x, product(x.t(), grad.t()).t().contiguous(), grad.sum(0)
    return d_x, product(grad.t(), x.t()), grad.sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, ops: "CpuOperators") -> Tensor:
        hidden = product(x, weight, bias, onednn=ops.onednn)
        out = native.gelu(hidden, with_slope=True) if gelu else hidden
        ctx.save_for_backward(x, weight, hidden if gelu else None)  # GELU's slope by now
        ctx.ops = ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, slope = ctx.saved_tensors
        grad = grad.contiguous() if slope is None else grad * slope
        d_x, d_weight, d_bias = linear_grads(x.flatten(0, -2), weight, grad.flatten(0, -2), ctx.ops)
        return d_x.view(x.shape), d_weight, d_bias, None, None


class _Recursion(torch.autograd.Function):
    """Operators.recursion in one piece: the gates' gradients are written side by side and need no concatenation."""

    @staticmethod
    def forward(ctx, ops: "CpuOperators", p: Tensor, q: Tensor, *parameters: Tensor) -> Tensor:
        hidden, states, start = p, [], 0
        for weight, bias in zip((None, *parameters[::2]), (None, *parameters[1::2])):
            if weight is not None:
                hidden = product(states[-1], weight, bias, onednn=ops.onednn)
                states.append(hidden)
            states.append(native.gate(hidden, q[..., start:start + hidden.shape[-1]]))
            start += hidden.shape[-1]
        ctx.save_for_backward(p, q, *parameters[::2], *states[:-1])
        ctx.ops = ops
        return states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        p, q, *rest = ctx.saved_tensors
        steps = len(rest) // 3
        weights, states = rest[:steps], rest[steps:]
        d_q, end, grads = torch.empty(q.shape, dtype=q.dtype), q.shape[-1], []
        grad = grad.contiguous()
        for k in reversed(range(steps + 1)):
            hidden = states[2 * k - 1] if k else p
            gate = slice(end - hidden.shape[-1], end)
            grad, end = native.gate_backward(grad, hidden, q[..., gate], d_q[..., gate]), gate.start
            if k:
                x = states[2 * k - 2]
                d_x, *both = linear_grads(x.flatten(0, -2), weights[k - 1], grad.flatten(0, -2), ctx.ops)
                grad, grads = d_x.view(x.shape), both + grads
        return None, grad, d_q, *grads


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.has_bias = bias is not None
        return native.depthwise(x, taps, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, taps = ctx.saved_tensors
        d_x, d_taps, d_bias = native.depthwise_backward(x, grad, taps)
        return d_x, d_taps, d_bias if ctx.has_bias else None


class _GlobalLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps, parts)
        return native.global_local(x, taps, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, taps, parts = ctx.saved_tensors
        return native.global_local_backward(x, grad.contiguous(), taps, parts)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, mean, rstd = native.layer_norm(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        return *native.layer_norm_backward(x, grad.contiguous(), weight, mean, rstd), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, gamma: Tensor, keep: Tensor | None, slot: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, gamma, keep, slot)
        return native.join(x, y, gamma, keep, slot)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        return grad, *native.join_backward(grad, *ctx.saved_tensors), None, None


def _ready(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: real CPU tensors of two types, outside compilers, tracers and transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack():
        return False
    return all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"
                             and t.dtype in DTYPES and t.numel() > 0) for t in tensors)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class CpuOperators(Operators):
    """The operators of a model on a CPU; whatever a kernel does not take falls back to plain PyTorch.

    Args:
        onednn: matrix products by oneDNN, else by torch's default library.
        compiled: use the kernels of `native.py`.
        packed: what is made of weights once per evaluation: id(weight) -> (weight, its matrix in oneDNN's own
            layout, bias) by `pack`, the rest by `_prepared`.
    """

    def __init__(self, onednn: bool = True, compiled: bool = True):
        self.onednn, self.compiled = onednn, compiled
        self.packed: dict[object, tuple] = {}

    def linear(self, x, weight, bias):
        return self._linear(x, weight, bias, gelu=False)

    def linear_gelu(self, x, weight, bias):
        return self._linear(x, weight, bias, gelu=True)

    def _linear(self, x, weight, bias, gelu):
        dtype = _compute_dtype(x)
        if bias is None or dtype not in DTYPES or not _ready(x, weight, bias):
            return super().linear_gelu(x, weight, bias) if gelu else super().linear(x, weight, bias)
        x = x.to(dtype)
        packed = None if torch.is_grad_enabled() else self.packed.get(id(weight))
        if packed is not None and packed[2].dtype == dtype:  # the matrix may be kept in a wider one
            return product(x, packed[1], packed[2], gelu)
        matrix, bias = weight.flatten(1).to(dtype), bias.to(dtype)
        if not torch.is_grad_enabled():
            return product(x, matrix, bias, gelu, self.onednn)
        if gelu and not self.compiled:
            return F.gelu(_Linear.apply(x, matrix, bias, False, self))
        return _Linear.apply(x, matrix, bias, gelu, self)

    def layer_norm(self, x, weight, bias, eps):
        dtype = _compute_dtype(x)
        types = (x.dtype, dtype)
        if not self.compiled or not _ready(x, weight, bias) or types not in (
                (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
            return super().layer_norm(x, weight, bias, eps)
        return _LayerNorm.apply(x.contiguous(), weight.float(), bias.float(), eps, dtype)

    def _prepared(self, make: Callable[[], tuple], *key) -> tuple:
        """What `make` gives, computed once while weights are packed, every time otherwise."""
        if torch.is_grad_enabled() or not self.packed:
            return make()
        if key not in self.packed:
            self.packed[key] = make()
        return self.packed[key]

    def depthwise(self, x, weight, bias, scale=1.0):
        dtype = _compute_dtype(x)
        if not self.compiled or dtype not in DTYPES or weight.shape[2:] not in ((3, 3), (7, 7)) or not _ready(
                x, weight, bias):
            return super().depthwise(x, weight, bias, scale)

        def make() -> tuple[Tensor, Tensor | None]:
            taps = (weight.float() * scale).flatten(1).t().contiguous()
            return taps, None if bias is None else (bias.float() * scale).contiguous()
        return _Depthwise.apply(x.to(dtype), *self._prepared(make, id(weight), scale))

    def global_local(self, x, weight, spectrum):
        """Both halves in one kernel, with the Fourier transform as small matrix products; FFT for large maps."""
        dtype, (height, width) = _compute_dtype(x), x.shape[1:3]
        if (not self.compiled or dtype not in DTYPES or max(height, width) > LARGEST_DFT or weight.shape[2] != 3
                or not _ready(x, weight, spectrum)):
            return super().global_local(x, weight, spectrum)

        def make() -> tuple[Tensor, Tensor]:
            resized = resize_filter(spectrum.float(), (height, width // 2 + 1))
            return weight.float().flatten(1).t().contiguous(), resized.permute(1, 2, 3, 0).contiguous()
        return _GlobalLocal.apply(x.to(dtype).contiguous(), *self._prepared(make, id(weight), height, width))

    def recursion(self, p, q, projections):
        dtype, given = _compute_dtype(q), [t for pair in projections for t in pair]
        if (not self.compiled or not torch.is_grad_enabled() or dtype not in DTYPES or None in given
                or not _ready(p, q, *given)):
            return super().recursion(p, q, projections)
        return _Recursion.apply(self, p.to(dtype), q.to(dtype), *(t.flatten(1).to(dtype) if t.ndim > 1 else t.to(dtype)
                                                            for t in given))

    def gate(self, x, gate):
        """Without gradients the product overwrites a projection's fresh output."""
        if not torch.is_grad_enabled() and x._base is None and _ready(x, gate) and x.dtype == gate.dtype:
            return x.mul_(gate)
        return super().gate(x, gate)

    def residual(self, x, branch: Callable[[Tensor], Tensor], gamma, keep):
        """As the plain one; dropped samples of a branch are not computed (one always is, so that every parameter
        has a gradient, if only zero, and all ranks communicate)."""
        if not self.compiled or gamma is None or not _ready(x, gamma):
            return super().residual(x, branch, gamma, keep)
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
            return native.join(x, y, gamma.float(), keep, slot, out=y)
        return _Join.apply(x, y, gamma.float(), keep, slot)

    def patch_conv(self, x, weight, bias):
        """In training as a matrix product over the patches; only the convolution's backward is slow."""
        size, (batch, height, width, channels) = weight.shape[2], x.shape
        if not torch.is_grad_enabled() or height % size or width % size or not _ready(x, weight):
            return super().patch_conv(x, weight, bias)
        x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(2, 3)
        return self.linear(x.flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)

    def pack(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Reorder the matrices of `model`'s Linear layers and 1x1 convolutions for evaluation in `dtype`."""
        if not self.onednn or dtype not in DTYPES:
            return
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and weight.shape[2:] in ((), (1, 1)):
                matrix = weight.detach().flatten(1).to(dtype).to(product_dtype(dtype)).contiguous()
                matrix = torch.ops.mkldnn._reorder_linear_weight(matrix)
                bias = None if module.bias is None else module.bias.detach().to(dtype)
                self.packed[id(weight)] = weight, matrix, bias
