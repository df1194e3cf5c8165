"""Products of weights whose rows end in the middle of what tensor cores load.

SwiGLU's hidden width int(8C/3) is 2730 at C = 1024 (UNITE, arXiv 2603.22283, the block). Rows of 5460 bytes begin at
addresses that TMA, which feeds Hopper's matrix units, cannot load. A copy of the weight with zeros between its rows'
ends and the next address that it can gives the same product, and it costs little: the weight is copied anyway, into
the products' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unite_kernels.dispatch import aligned


class _Aligned(torch.autograd.Function):
    """See `with_zeros`."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, pieces: int, dtype: torch.dtype) -> Tensor:
        parts = x.unflatten(dim, (pieces, -1))
        width = parts.shape[dim + 1]
        ctx.dim, ctx.pieces, ctx.width, ctx.dtype = dim, pieces, width, x.dtype
        shape = list(parts.shape)
        shape[dim + 1] = aligned(width)
        found = x.new_empty(shape, dtype=dtype)
        found.narrow(dim + 1, 0, width).copy_(parts)
        found.narrow(dim + 1, width, shape[dim + 1] - width).zero_()
        return found.flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        parts = grad.unflatten(ctx.dim, (ctx.pieces, -1)).narrow(ctx.dim + 1, 0, ctx.width)
        return parts.to(ctx.dtype).contiguous().flatten(ctx.dim, ctx.dim + 1), None, None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast casts a weight to for a product."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def with_zeros(x: Tensor, dim: int, *, pieces: int = 1, dtype: torch.dtype) -> Tensor:
    """A weight with zeros behind each piece of a dimension.

    Args:
        x: any shape.
        dim: of `pieces` equal pieces behind one another.
        dtype: of the result.

    Returns:
        x with each piece `aligned`; the gradient, in x's dtype, leaves the zeros out.
    """
    return _Aligned.apply(x, dim, pieces, dtype)
