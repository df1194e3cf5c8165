"""Products of weights whose rows end in the middle of what tensor cores load.

SwiGLU's hidden width int(8C/3) is 2730 at C = 1024 (UNITE, arXiv 2603.22283, the block). Rows of 5460 bytes begin at
addresses that TMA, which feeds Hopper's matrix units, cannot load. A copy of the weight with zeros between its rows'
ends and the next address that it can gives the same product, and it costs little: the weight is copied anyway, into
the products' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unite_kernels.dispatch import aligned


class Zeros(NamedTuple):
    """Where a copy of a weight has them.

    Attributes:
        dim: dimension, of `pieces` equal pieces behind one another, each `aligned` by zeros behind it.
        pieces: their number.
    """

    dim: int
    pieces: int = 1


class _Aligned(torch.autograd.Function):
    """See `with_zeros`."""

    @staticmethod
    def forward(ctx, x: Tensor, zeros: Zeros, dtype: torch.dtype) -> Tensor:
        found = x.new_empty(_shape_with_zeros(ctx, x, zeros), dtype=dtype)
        dim, pieces = zeros
        whole = found.unflatten(dim, (pieces, -1))
        whole.narrow(dim + 1, 0, ctx.width).copy_(x.unflatten(dim, (pieces, -1)))
        whole.narrow(dim + 1, ctx.width, whole.shape[dim + 1] - ctx.width).zero_()
        return found

    @staticmethod
    def backward(ctx, grad: Tensor):
        parts = without_zeros(grad, ctx.zeros, ctx.width).to(ctx.dtype)
        return parts.contiguous().flatten(ctx.zeros.dim, ctx.zeros.dim + 1), None, None


class _StandIn(_Aligned):
    """See `unread_with_zeros`."""

    @staticmethod
    def forward(ctx, x: Tensor, zeros: Zeros, dtype: torch.dtype) -> Tensor:
        return x.new_empty((), dtype=dtype).expand(_shape_with_zeros(ctx, x, zeros))


def _shape_with_zeros(ctx, x: Tensor, zeros: Zeros) -> list[int]:
    """The shape of x with zeros; what the backward needs is noted in ctx."""
    shape = list(x.shape)
    ctx.zeros, ctx.width, ctx.dtype = zeros, shape[zeros.dim] // zeros.pieces, x.dtype
    shape[zeros.dim] = zeros.pieces * aligned(ctx.width)
    return shape


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast casts a weight to for a product."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def with_zeros(x: Tensor, zeros: Zeros, *, dtype: torch.dtype) -> Tensor:
    """A weight with zeros behind each piece of a dimension.

    Args:
        x: any shape.
        zeros: where.
        dtype: of the result.

    Returns:
        x with each piece `aligned`; the gradient, in x's dtype, leaves the zeros out.
    """
    return _Aligned.apply(x, zeros, dtype)


def unread_with_zeros(x: Tensor, zeros: Zeros, *, dtype: torch.dtype) -> Tensor:
    """What stands for `with_zeros`' result where nobody reads its numbers, of which it has none: its shape, dtype and
    gradient."""
    return _StandIn.apply(x, zeros, dtype)


def without_zeros(x: Tensor, zeros: Zeros, width: int) -> Tensor:
    """A view of what `with_zeros` makes: its pieces of a width apart, [..., pieces, width, ...]."""
    return x.unflatten(zeros.dim, (zeros.pieces, -1)).narrow(zeros.dim + 1, 0, width)
