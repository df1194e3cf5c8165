"""Padding of weights whose rows end in the middle of what tensor cores load.

SwiGLU's hidden width int(8C/3) is 2730 at C = 1024 (UNITE, arXiv 2603.22283, the block). Rows of 5460 bytes begin at
addresses that TMA, which feeds Hopper's matrix units, cannot load. A copy of the weight, zero-padded so that each row
begins at an address that it can, gives the same product, and it costs little: the weight is copied anyway, into the
compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unite_kernels.dispatch import aligned


class Padding(NamedTuple):
    """Where a copy of a weight is padded: each chunk of a dimension gets zeros at its end, up to an `aligned` width.

    Attributes:
        dim: the dimension.
        chunks: number of its equal chunks, as of `torch.chunk`: 2 where SwiGLU's gate and value follow one another.
    """

    dim: int
    chunks: int = 1


class _Pad(torch.autograd.Function):
    """See `pad`."""

    @staticmethod
    def forward(ctx, x: Tensor, padding: Padding, dtype: torch.dtype) -> Tensor:
        padded = x.new_empty(_padded_shape(ctx, x, padding), dtype=dtype)
        dim, chunks = padding
        chunked = padded.unflatten(dim, (chunks, -1))
        chunked.narrow(dim + 1, 0, ctx.width).copy_(x.unflatten(dim, (chunks, -1)))
        chunked.narrow(dim + 1, ctx.width, chunked.shape[dim + 1] - ctx.width).zero_()
        return padded

    @staticmethod
    def backward(ctx, grad: Tensor):
        chunks = unpad(grad, ctx.padding, ctx.width).to(ctx.dtype)
        return chunks.contiguous().flatten(ctx.padding.dim, ctx.padding.dim + 1), None, None


class _Placeholder(_Pad):
    """See `padded_placeholder`."""

    @staticmethod
    def forward(ctx, x: Tensor, padding: Padding, dtype: torch.dtype) -> Tensor:
        return x.new_empty((), dtype=dtype).expand(_padded_shape(ctx, x, padding))


def _padded_shape(ctx, x: Tensor, padding: Padding) -> list[int]:
    """The shape of x with padding; what the backward needs is noted in ctx."""
    shape = list(x.shape)
    ctx.padding, ctx.width, ctx.dtype = padding, shape[padding.dim] // padding.chunks, x.dtype
    shape[padding.dim] = padding.chunks * aligned(ctx.width)
    return shape


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast casts x to for a matrix product; its own dtype without autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def pad(x: Tensor, padding: Padding, *, dtype: torch.dtype) -> Tensor:
    """A padded copy of a weight or bias.

    Args:
        x: any shape.
        padding: where.
        dtype: of the result.

    Returns:
        x with each chunk zero-padded to an `aligned` width; the gradient, in x's dtype, leaves the padding out.
    """
    return _Pad.apply(x, padding, dtype)


def padded_placeholder(x: Tensor, padding: Padding, *, dtype: torch.dtype) -> Tensor:
    """The shape, dtype and gradient of `pad`'s result without its numbers, which must not be read.

    An FP8 product reads the quantized copy that `Casts.fp8_weight` keeps, never the weight itself. What it still needs
    of the padded weight is the shape and a way for the gradient back to the parameter, so this is one uninitialised
    element, expanded: it takes no memory and no copy.
    """
    return _Placeholder.apply(x, padding, dtype)


def unpad(x: Tensor, padding: Padding, width: int) -> Tensor:
    """A view of a padded tensor without its padding: [..., chunks, width, ...], `width` being that of a chunk."""
    return x.unflatten(padding.dim, (padding.chunks, -1)).narrow(padding.dim + 1, 0, width)
