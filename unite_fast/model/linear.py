"""The Linear of every part of the model.

PyTorch's float32 products on x86 CPUs are MKL's, which uses only AVX2 on AMD processors. On those with AVX-512, oneDNN,
which PyTorch also includes, needs 0.42 to 0.57 of the time for the forward and the input's gradient, and 0.51 to 0.74
for the weight's (64 to 1,536 rows, widths of 128 to 768). It copies transposed operands: with kernels/cpu.c these
gradients take 0.77 to 1.07 and 0.48 to 1.0 of oneDNN's time (16 to 3,600 rows, widths of 96 to 4,096), and the forward
product 0.97 to 1.4. All on one core of an EPYC 9005.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.model.aligned import Padding, compute_dtype, pad
from unite_fast.model.casts import CastLinear, current_casts
from unite_kernels.cpu import cpuinfo, matmul, multiplies, sees_plainly
from unite_kernels.dispatch import transformed


class Linear(CastLinear):
    """x Wᵀ + b, on CPUs by the fastest library; under autocast in a training step see `Casts.linear`."""

    def forward(self, x: Tensor, padding: Padding | None = None, *, add_bias: bool = True) -> Tensor:
        """x Wᵀ, and b where `add_bias`; under `padding` x or the result have more columns."""
        # The compiler, whose products Inductor chooses, must not look further.
        if x.is_cpu and padding is None and add_bias and not torch.compiler.is_compiling() and prefers_onednn():
            tensors = (x, self.weight, self.bias)
            if x.numel() and not torch.is_autocast_enabled("cpu") and sees_plainly(*tensors):
                return _OneDnnLinear.apply(*tensors)
        casts = current_casts()
        if casts is not None and (found := casts.linear(x, self, padding, add_bias=add_bias)) is not None:
            return found
        weight = self.weight if padding is None else pad(self.weight, padding, dtype=compute_dtype(self.weight))
        return F.linear(x, weight, self.bias if add_bias else None)


@functools.cache
def prefers_onednn() -> bool:
    """Whether this is an AMD CPU with AVX-512 and PyTorch has oneDNN's product for tensors in PyTorch's own layout."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and cpuinfo("vendor_id") == "AuthenticAMD"
    )


def linear_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by the library that a Linear takes, without gradients: what rates are measured with."""
    onednn = x.is_cpu and x.dtype == torch.float32 and prefers_onednn()
    return _onednn_linear(x, weight) if onednn else F.linear(x, weight)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _multiplier(*tensors: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """a b of two of these, or of one turned."""
    return matmul if multiplies(*tensors) else lambda a, b: _onednn_linear(a, b.t())


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, len(weight))
        # Where autograd or a vmap looks on, whose gradients have no memory of their own: they see into PyTorch's alone.
        plain = not torch.is_grad_enabled() and not transformed() and torch._C._has_storage(grad)
        multiply = _multiplier(grads, rows, weight) if plain else torch.matmul
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            multiply(grads, weight).view(x.shape) if wants_x else None,
            multiply(grads.t(), rows) if wants_weight else None,
            grads.sum(0) if wants_bias else None,
        )
