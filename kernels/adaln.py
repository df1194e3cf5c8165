"""Adaptive norms (adaLN, Peebles and Xie 2022, "Scalable diffusion models with transformers") and what stands before
them: the gated residual, and at a block boundary the norm that closes the block. Plain LayerNorm is the form without
modulation.

Shapes: B batch, N tokens, C width. Modulation is [B, C], one row a sample, broadcast over its tokens. Samples of
different lengths lie behind one another as [1, T, C], T tokens in all, with `offsets` [B + 1] to say where each begins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import adaln_kernels, cpu
from .dispatch import (
    check_contiguous,
    check_device,
    check_eps,
    check_floats,
    check_integer,
    check_like,
    check_parameter,
    check_tensors,
    operator,
    use_triton,
)
from .rms import unit_rms

MAX_WIDTH = 2048


class Spans(NamedTuple):
    """B samples of different lengths behind one another on the token axis of one tensor [1, T, C].

    Attributes:
        offsets: [B + 1] int32 on the tensor's device, rising from 0 to T: sample b has tokens offsets[b] …
            offsets[b + 1] without the last.
        longest: tokens of the longest sample, which sizes a launch without asking the device.
    """

    offsets: Tensor
    longest: int


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def adaln_reference(x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest, eps, layer):
    """All functions of this file in plain PyTorch: (residual or None, normed), float32 inside.

    Absent terms are None; layer chooses LayerNorm over RMSNorm, which has always a scale.
    """
    dtype = x.dtype
    residual = None

    def spread(term):  # [B, C] over the tokens
        if offsets is None:
            return term[:, None].float()
        return term.float().repeat_interleave(offsets.diff(), dim=0, output_size=x.shape[1])[None]

    if branch is not None:
        residual = x + branch if gate is None else torch.addcmul(x.float(), spread(gate), branch.float())
        if closing_weight is not None:
            residual = unit_rms(residual, eps) * closing_weight.float()
        # The norm reads the rounded stream, as the next operator will.
        residual = x = residual.to(dtype)
    if scale is None:
        return residual, F.layer_norm(x.float(), x.shape[-1:], _float(weight), _float(bias), eps).to(dtype)
    factor = 1 + spread(scale)
    if layer:
        normed = F.layer_norm(x.float(), x.shape[-1:], _float(weight), _float(bias), eps)
    else:
        normed = unit_rms(x.float(), eps)
        # On [B, 1, C] where samples have one length, so that the tokens are multiplied once.
        factor = factor if weight is None else factor * weight.float()
    normed = normed * factor if shift is None else torch.addcmul(spread(shift), normed, factor)
    return residual, normed.to(dtype)


@operator("adaln")
def _operator(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    closing_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    offsets: Tensor | None,
    longest: int,
    eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor]:
    """(residual, normed); residual is empty where there is no branch."""
    residual, normed = adaln_kernels.forward(
        x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest, eps, layer
    )
    return _present(residual, x), normed


@_operator.register_fake
def _(x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest, eps, layer):
    return x.new_empty(0) if branch is None else torch.empty_like(x), torch.empty_like(x)


@operator("adaln_backward")
def _backward_operator(
    grad_residual: Tensor | None,
    grad_normed: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    closing_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    offsets: Tensor | None,
    longest: int,
    eps: float,
    layer: bool,
) -> list[Tensor]:
    """What `adaln_kernels.backward` returns, without what is None."""
    grads = adaln_kernels.backward(
        None if grad_residual is None else grad_residual.contiguous(), grad_normed.contiguous(),
        x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest, eps, layer,
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@_backward_operator.register_fake
def _(
    grad_residual, grad_normed, x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest,
    eps, layer,
):  # fmt: skip
    inputs = (x, None if gate is None else branch, gate, shift, scale)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs if t is not None]
    vectors = adaln_kernels.vector_count(weight, closing_weight, bias)
    return grads + ([x.new_empty(vectors, x.shape[2], dtype=torch.float32)] if vectors else [])


def _present(tensor: Tensor | None, x: Tensor) -> Tensor:
    """Operators return tensors only: an empty one stands for None."""
    return x.new_empty(0) if tensor is None else tensor


def _save(ctx, inputs, output):
    x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, ctx.longest, ctx.eps, ctx.layer = inputs
    stream = output[0] if branch is not None and closing_weight is None else x
    ctx.has_branch, ctx.gated = branch is not None, gate is not None
    branch = branch if ctx.gated else None
    ctx.save_for_backward(stream, branch, gate, closing_weight, weight, bias, shift, scale, offsets)
    # Where the residual goes nowhere, as behind the last block, no zeros are made and read for its gradient.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_residual, grad_normed):
    tensors = ctx.saved_tensors
    if grad_normed is None:
        if grad_residual is None:
            return (None,) * 12
        grad_normed = torch.zeros_like(tensors[0])
    if not ctx.has_branch:
        grad_residual = None
    _, _, gate, closing_weight, weight, bias, shift, scale, _ = tensors
    found = iter(_backward_operator(grad_residual, grad_normed, *tensors, ctx.longest, ctx.eps, ctx.layer))
    grad_x = next(found)
    grad_branch = next(found) if ctx.gated else grad_x if ctx.has_branch else None
    terms = [None if term is None else next(found) for term in (gate, shift, scale)]
    sums = next(found, None)
    vectors = [
        None if vector is None else sums[row].to(vector.dtype)
        for vector, row in ((closing_weight, 1), (weight, 0), (bias, 1))
    ]
    return grad_x, grad_branch, terms[0], *vectors, *terms[1:], None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)


def _adaln(operator, x, branch, gate, closing_weight, weight, bias, shift, scale, spans, eps, layer):
    check_floats(operator, "x", x)
    if x.ndim != 3 or not 1 <= x.shape[2] <= MAX_WIDTH:
        raise ValueError(f"{operator}: x has shape {tuple(x.shape)}; it must be [B, N, C] with C from 1 to {MAX_WIDTH}")
    check_contiguous(operator, "x", x)
    check_eps(operator, eps)
    batch, _, width = x.shape
    offsets, longest = None, 0
    if spans is not None:
        batch = _check_spans(operator, x, spans)
        offsets, longest = spans
    if branch is not None:
        check_like(operator, "branch", branch, "x", x)
    for name, vector in (("closing_weight", closing_weight), ("weight", weight), ("bias", bias)):
        check_parameter(operator, name, vector, (width,), "x", x)
    for name, term in (("gate", gate), ("shift", shift), ("scale", scale)):
        check_parameter(operator, name, term, (batch, width), "x", x)
    if use_triton(x):
        compute = _operator
    elif not layer and cpu.serves(x, branch, gate, closing_weight, weight, shift, scale):
        return cpu.adaln(x, branch, gate, closing_weight, weight, shift, scale, offsets, eps)
    else:
        compute = adaln_reference
    return compute(x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest, eps, layer)


def _check_spans(operator: str, x: Tensor, spans: Spans) -> int:
    """Number of samples. On other devices than a CPU the offsets' values are the caller's to keep."""
    if not isinstance(spans, tuple) or len(spans) != 2:
        raise TypeError(f"{operator}: spans is a {type(spans).__name__}; it must be Spans(offsets, longest)")
    offsets, longest = spans
    check_tensors(operator, offsets=offsets)
    if x.shape[0] != 1 or offsets.ndim != 1 or offsets.numel() < 2 or offsets.dtype != torch.int32:
        raise ValueError(
            f"{operator}: with spans x must be [1, T, C] and the offsets [B + 1] int32; here x is {tuple(x.shape)} and "
            f"the offsets are {tuple(offsets.shape)} {offsets.dtype}"
        )
    check_integer(operator, "the longest span", longest)
    if not min(1, x.shape[1]) <= longest <= max(1, x.shape[1]):
        raise ValueError(f"{operator}: the longest span is {longest}; it must lie in [1, {x.shape[1]}], the tokens")
    check_device(operator, "offsets", offsets, "x", x)
    check_contiguous(operator, "offsets", offsets)
    cpu.check_offsets(operator, offsets, x.shape[1], longest)
    return offsets.numel() - 1


def rms_norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    *,
    spans: Spans | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMSNorm(x) · weight · (1 + scale) + shift.

    Args:
        x: [B, N, C] contiguous, C ≤ 2048, float32, float16 or bfloat16.
        weight: [C], or None for 1.
        shift, scale: [B, C], each float32 or x's dtype, rows of any stride; shift may be None for 0.
        spans: x is [1, T, C], B samples of different lengths behind one another, see `Spans`.
        eps: added to the mean square.

    Returns:
        [B, N, C] of x's dtype. Statistics are float32.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or strides other than these, a negative eps.
    """
    check_tensors("rms_norm_modulate", scale=scale)
    return _adaln("rms_norm_modulate", x, None, None, None, weight, None, shift, scale, spans, eps, False)[1]


def gated_residual_rms_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    *,
    spans: Spans | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """residual = x + gate · branch; normed = RMSNorm(residual) · weight · (1 + scale) + shift.

    Args:
        x, branch: [B, N, C] contiguous, of one dtype.
        gate: [B, C].
        weight, shift, scale, spans, eps: as in `rms_norm_modulate`.

    Returns:
        (residual, normed), each [B, N, C] of x's dtype.

    Raises:
        TypeError, ValueError: as in `rms_norm_modulate`.
    """
    check_tensors("gated_residual_rms_norm_modulate", branch=branch, gate=gate, scale=scale)
    return _adaln(
        "gated_residual_rms_norm_modulate", x, branch, gate, None, weight, None, shift, scale, spans, eps, False
    )


def block_boundary(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    closing_weight: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    *,
    spans: Spans | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The end of a block that closes with a norm, and the start of the next (UNITE, arXiv 2603.22283, the block).

    x_next = RMSNorm(x + gate · branch) · closing_weight; normed = RMSNorm(x_next) · weight · (1 + scale) + shift.

    Args:
        x, branch: [B, N, C] contiguous, of one dtype.
        gate: [B, C].
        closing_weight: [C].
        weight, shift, scale: the next block's opening norm, as in `rms_norm_modulate`, and so `spans`.
        eps: added to the mean square, in both norms.

    Returns:
        (x_next, normed), each [B, N, C] of x's dtype.

    Raises:
        TypeError, ValueError: as in `rms_norm_modulate`.
    """
    check_tensors("block_boundary", branch=branch, gate=gate, closing_weight=closing_weight, scale=scale)
    return _adaln("block_boundary", x, branch, gate, closing_weight, weight, None, shift, scale, spans, eps, False)


def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, scale: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """(LayerNorm(x) · weight + bias) · (1 + scale) + shift, the form of DiT, SiT and JiT blocks.

    Args:
        x: [B, N, C] contiguous, C ≤ 2048, float32, float16 or bfloat16.
        weight, bias: [C], or None for 1 and 0.
        shift, scale, eps: as in `rms_norm_modulate`.

    Returns:
        [B, N, C] of x's dtype. Statistics are float32.

    Raises:
        TypeError, ValueError: as in `rms_norm_modulate`.
    """
    check_tensors("layer_norm_modulate", scale=scale)
    return _adaln("layer_norm_modulate", x, None, None, None, weight, bias, shift, scale, None, eps, True)[1]


def gated_residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """residual = x + gate · branch; normed = (LayerNorm(residual) · weight + bias) · (1 + scale) + shift.

    Args:
        x, branch: [B, N, C] contiguous, of one dtype.
        gate: [B, C].
        weight, bias, shift, scale, eps: as in `layer_norm_modulate`.

    Returns:
        (residual, normed), each [B, N, C] of x's dtype.

    Raises:
        TypeError, ValueError: as in `rms_norm_modulate`.
    """
    check_tensors("gated_residual_layer_norm_modulate", branch=branch, gate=gate, scale=scale)
    return _adaln(
        "gated_residual_layer_norm_modulate", x, branch, gate, None, weight, bias, shift, scale, None, eps, True
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) · weight + bias (Ba et al. 2016), without the casts to and from float32 that autocast makes around
    PyTorch's.

    Args:
        x: [B, N, C] contiguous, C ≤ 2048, float32, float16 or bfloat16.
        weight, bias: [C], each float32 or x's dtype.
        eps: added to the variance.

    Returns:
        [B, N, C] of x's dtype. Statistics are float32.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or strides other than these, a negative eps.
    """
    check_tensors("layer_norm", weight=weight, bias=bias)
    return _adaln("layer_norm", x, None, None, None, weight, bias, None, None, None, eps, True)[1]


def residual_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """residual = x + branch; normed = LayerNorm(residual) · weight + bias: inside of a pre-norm block.

    Args:
        x, branch: [B, N, C] contiguous, of one dtype.
        weight, bias, eps: as in `layer_norm`.

    Returns:
        (residual, normed), each [B, N, C] of x's dtype.

    Raises:
        TypeError, ValueError: as in `layer_norm`.
    """
    check_tensors("residual_layer_norm", branch=branch, weight=weight, bias=bias)
    return _adaln("residual_layer_norm", x, branch, None, None, weight, bias, None, None, None, eps, True)
