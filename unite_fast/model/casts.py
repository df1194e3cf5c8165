"""Linears of a training step: weights are cast once for all passes, and matrix products accumulate their gradients.

Under PyTorch's autocast a weight's gradient is computed in bfloat16, cast to float32, and added to that of the other
passes: two more launches per weight and pass, and 20 bytes moved per element. cuBLAS can add a product of bfloat16
matrices directly to a float32 matrix, which moves 8 bytes and rounds nothing to bfloat16.

Gradients accumulate inside `one_micro_batch` like this:

- Before and after each backward, a weight's `grad` is what PyTorch promises: None, or the float32 sum so far.
- In a backward, `_weight_gradient` takes the sum out of `grad`, which is None from then on, adds the product to it in
  place, and returns it as if it were the gradient of this pass. Autograd finds nothing to add it to, so it "steals" it:
  the returned tensor itself becomes `grad`, and hooks run as ever. Had `grad` kept it, it would be added to itself.
- Of a weight that one backward reads twice the second product finds no sum and is returned alone; autograd adds both.
- After the micro-batch, `Casts.open` being False, a graph that is left returns products alone, which autograd adds.

Autograd steals only a tensor that nothing else refers to, with the strides of the parameter (PyTorch's
accumulate_grad.h), so no one may keep the sum. If it copied instead, numbers would stay right, but every backward would
move each weight's gradient once more and hold it twice: `test_gradients_accumulate_in_place_without_a_copy` fails then.

So inside a micro-batch `torch.autograd.grad` of a weight carries its sum away, a backward that fails midway loses sums,
and a weight's tensor hook (`Tensor.register_hook`) is given the sum. Post-accumulate hooks see what they always see.
Shapes: x [..., I], weight [O, I], bias [O].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import unite_kernels as uk
from unite_fast.model.aligned import Padding, compute_dtype, pad, unpad


class CastLinear(nn.Linear):
    """A Linear whose weight `Casts` may keep.

    Attributes:
        cast_with: Linears, this one included, whose weights are cast in one launch because all are used soon.
    """

    cast_with: tuple[CastLinear, ...] = ()


def cast_together(*linears: CastLinear) -> None:
    """Cast the weights of all these Linears together, when the first one is needed."""
    for linear in linears:
        linear.cast_with = linears


class _Operands(NamedTuple):
    """What a Linear's product takes, with or without its bias: casts of the parameters."""

    linear: CastLinear  # kept, lest another takes its id
    parameter: nn.Parameter
    bias_parameter: nn.Parameter | None
    weight: Tensor
    bias: Tensor | None
    padding: Padding | None
    casts: Casts


class Casts:
    """Weights in the compute dtype, and in FP8, as `one_micro_batch` keeps them for Linears.

    Attributes:
        open: True while the micro-batch lasts, in which gradients accumulate as the module's docstring says.
    """

    def __init__(self) -> None:
        self.open = True
        # By id() of a Linear, padding, and whether with its bias; None where PyTorch's own serves.
        self._operands: dict[tuple[int, Padding | None, bool], _Operands | None] = {}
        # By id() of a parameter, which a Linear keeps: its cast.
        self._copies: dict[int, Tensor] = {}
        # By id() of a parameter, kept beside it, and padding.
        self._fp8: dict[tuple[int, Padding | None], tuple[Tensor, uk.Quantized]] = {}

    def close(self) -> None:
        """Drop the copies; gradients computed from here on are not accumulated in place."""
        self.open = False
        self._operands.clear()
        self._copies.clear()
        self._fp8.clear()

    def linear(
        self, x: Tensor, linear: CastLinear, padding: Padding | None = None, *, add_bias: bool = True
    ) -> Tensor | None:
        """x Wᵀ + b in autocast's dtype, or None where PyTorch's Linear serves: without autocast, under ZeRO 3, whose
        parameters are there in their module's forward alone, where weights are no float32 leaves, and on devices not of
        `adds_products`.

        Inside `one_micro_batch` only `Tensor.backward` may ask for the gradient of W, not `torch.autograd.grad`, as the
        module's docstring says.

        Args:
            x: [..., I], of more columns where `padding` gives the weight more.
            linear: with a weight [O, I].
            padding: of the weight in the product.
            add_bias: False leaves b out.
        """
        if not torch.is_autocast_enabled(x.device.type):
            return None
        key = id(linear), padding, add_bias
        if key not in self._operands:
            self._operands[key] = self._cast(linear, compute_dtype(x), padding, add_bias)
        operands = self._operands[key]
        return None if operands is None else _apply(x, operands.parameter, operands.bias_parameter, operands)

    @torch.no_grad()
    def fp8_weight(self, weight: Tensor, padding: Padding | None) -> uk.Quantized:
        """A weight in E4M3 for `fp8_linear`, padded if so; kept after the first call."""
        key = id(weight), padding
        if key not in self._fp8:
            whole = weight if padding is None else pad(weight, padding, dtype=compute_dtype(weight))
            self._fp8[key] = weight, uk.fp8_quantize(whole.contiguous(), torch.float8_e4m3fn)
        return self._fp8[key][1]

    @torch.no_grad()
    def _cast(
        self, linear: CastLinear, dtype: torch.dtype, padding: Padding | None, add_bias: bool
    ) -> _Operands | None:
        weight, bias = linear.weight, linear.bias if add_bias else None
        trained = weight.dtype == torch.float32 and weight.is_leaf and not hasattr(weight, "ds_id")
        if not (trained and adds_products(weight.device)):
            return None
        if padding is not None:
            found = pad(weight, padding, dtype=dtype), None if bias is None else bias.to(dtype)
        else:
            if id(weight) not in self._copies:
                given = [p for other in linear.cast_with or (linear,) for p in (other.weight, other.bias)]
                parameters = [parameter for parameter in given if parameter is not None]
                copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
                torch._foreach_copy_(copies, parameters)
                self._copies |= zip(map(id, parameters), copies, strict=True)
            found = self._copies[id(weight)], None if bias is None else self._copies[id(bias)]
        return _Operands(linear, weight, bias, *found, padding, self)


# Not thread-local: recomputation, which reads it as well, runs in autograd's thread.
_casts: Casts | None = None


@contextmanager
def one_micro_batch(device: str) -> Iterator[None]:
    """Context around the passes of a micro-batch and their backwards, during which no weight changes.

    Autocast drops its cached casts when its outermost context ends. This context is an outer, disabled autocast, so
    that they last for all passes. Linears take theirs from `Casts`.

    Args:
        device: device type.
    """
    global _casts
    before, _casts = _casts, Casts()
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _casts.close()
        _casts = before


def current_casts() -> Casts | None:
    """The casts of the enclosing `one_micro_batch`; None under torch.compile, which places casts itself."""
    return None if torch.compiler.is_compiling() else _casts


class _CastProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, operands):
        cast = operands.weight
        rounded = x if x.dtype == cast.dtype else x.to(cast.dtype)
        ctx.save_for_backward(rounded)
        ctx.dtype, ctx.operands = x.dtype, operands
        return F.linear(rounded, cast, operands.bias)

    @staticmethod
    def backward(ctx, grad):
        return (_once_differentiable_gradients if torch.is_grad_enabled() else _gradients)(ctx, grad)


# `Function.apply` first looks for functorch's transforms, in which no training step runs. The `apply` of its base class
# does without: 2 of 11 µs of the host.
_apply = super(torch.autograd.Function, _CastProduct).apply


def _gradients(ctx, grad):
    """Of what `_CastProduct.forward` takes."""
    (x,), cast = ctx.saved_tensors, ctx.operands.weight
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, len(cast))
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    multiply = torch.mm if ctx.dtype == cast.dtype else product
    # First what only reads: a GPU's second cache may still hold some of what was written last.
    grad_bias = grads.sum(0, dtype=torch.float32) if wants_bias else None
    grad_x = multiply(grads, cast).view(x.shape) if wants_x else None
    return grad_x, _weight_gradient(ctx.operands, grads.t(), rows) if wants_weight else None, grad_bias, None


# Not around all of them: without a graph to make it changes nothing, and takes the host 3 µs of 22.
_once_differentiable_gradients = once_differentiable(_gradients)


def _weight_gradient(operands: _Operands, left: Tensor, right: Tensor) -> Tensor:
    """left [O, R] · right [R, I], float32, without padding; in a micro-batch added to the sum taken out of `grad`."""
    parameter, padding = operands.parameter, operands.padding
    total = parameter.grad if operands.casts.open else None
    if total is not None:
        parameter.grad = None  # autograd makes the sum that is returned the new `grad`: see the module's docstring
    if padding is None:
        return product(left, right) if total is None else add_product(total, left, right)
    dim, chunks = padding
    found = unpad(product(left, right), padding, parameter.shape[dim] // chunks)
    if total is None:
        return found.contiguous().flatten(dim, dim + 1)
    total.unflatten(dim, (chunks, -1)).add_(found)
    return total


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [O, R] · right [R, I] of 16-bit matrices as float32 [O, I]."""
    if left.is_cpu:  # has no such product
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total` [O, I] float32, to which `product` is added in place."""
    if left.is_cpu:
        return total.addmm_(left.float(), right.float())
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


@functools.cache
def adds_products(device: torch.device) -> bool:
    """Whether `add_product` works on a device, by trial: PyTorch refuses it with ROCm, and partly with TunableOp."""
    if device.type != "cuda":
        return True
    try:
        add_product(torch.zeros(16, 16, device=device), *torch.zeros(2, 16, 16, device=device, dtype=torch.bfloat16))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True
