"""Per-head RMSNorm of queries and keys and their rotary embedding, on the packed output of one Linear.

The results are packed again, or three tensors apart: attention that takes q, k and v apart (PyTorch's,
FlashAttention 3) gives their gradients apart, and to pack these costs as many bytes as the operator's forward pass.

Shapes: B batch, N tokens, H heads, d head width, R rows of the rotary table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .dispatch import (
    cdiv,
    check_contiguous,
    check_eps,
    check_floats,
    check_integer,
    check_parameter,
    check_tensors,
    device_of,
    next_power_of_2,
    operator,
    use_triton,
)
from .rms import unit_rms
from .specialisation import Specialisation
from .toolchain import tl, triton

WARPS = 4
# A tile is ROWS heads of BLOCK_D numbers. Forward, 16 numbers a thread and tensor, two 16-byte accesses in a 2-byte
# dtype. Prediction for an H200: at 72 registers 7 programs a multiprocessor, 84 KiB of q, k and v in flight.
FORWARD_TILE = 2048
# Backward, half of it: five tensors and two sums at 16 numbers a thread take 136 to 163 registers, at 8 they take 80
# to 111. The loop fetches a tile ahead (num_stages=2, 14 KiB of shared memory). Prediction: 4 or 5 programs, 40 KiB and
# more in flight.
BACKWARD_TILE = 1024
# Tiles of a backward program: its partial sums of the weights are then 0.4 % of the bytes it moves (d = 64, 2-byte
# dtype: 512 bytes beside 128 KiB), and 64 images of 544 tokens and 12 heads still make 3264 programs.
STEPS = 8


def qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, unrotated, eps):
    """`qk_norm_rope` in plain PyTorch."""
    rotated = qkv.shape[1] - unrotated
    ahead = (0, 0, unrotated, 0)  # the identity for the leading tokens
    cos, sin = F.pad(cos[:rotated].float(), ahead, value=1.0), F.pad(sin[:rotated].float(), ahead)
    qk, v = qkv.split([2, 1], dim=2)
    qk = unit_rms(qk.float(), eps) * torch.stack([q_weight, k_weight])[:, None].float()
    pairs, cos, sin = qk.unflatten(-1, (-1, 2)), cos[:, None, None], sin[:, None, None]
    if torch.compiler.is_compiling():
        # Inductor leaves complex numbers to eager operators: with them 1.3 to 1.5 times the time on a CPU.
        a, b = pairs.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        # A pair as one complex number: twice as fast on a CPU as products of every second element.
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return torch.cat([pairs.flatten(-2).to(qkv.dtype), v], dim=2)


@triton.jit
def _rotate(x, cos, sin):
    """Rotate the interleaved pairs of a tile [ROWS, BLOCK_D] by tables [ROWS, BLOCK_D / 2]."""
    a, b = tl.split(tl.reshape(x, [cos.shape[0], cos.shape[1], 2]))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)


@triton.jit
def _tables(cos, sin, token, unrotated, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Table rows of the tokens [ROWS]; the identity for tokens that are not rotated."""
    pair = tl.arange(0, BLOCK_D // 2)
    turned = (valid & (token >= unrotated))[:, None] & (pair < D // 2)[None, :]
    offset = (token - unrotated)[:, None] * (D // 2) + pair[None, :]
    c = tl.load(cos + offset, mask=turned, other=1.0).to(tl.float32)
    return c, tl.load(sin + offset, mask=turned, other=0.0).to(tl.float32)


@triton.jit
def _unit(x, eps, D: tl.constexpr):
    """(x / root mean square, 1 / root mean square) of the rows of a tile."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    return x * inverse, inverse


@triton.jit
def _unit_backward(grad, unit, inverse, D: tl.constexpr):
    return inverse * (grad - unit * (tl.sum(grad * unit, axis=1) / D)[:, None])


@triton.jit(do_not_specialize=["rows", "tokens", "unrotated"])
def _forward_kernel(
    qkv, q_weight, k_weight, cos, sin, out, k_out, v_out, rows, tokens, unrotated, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (sample, token, head)
    place = row // H
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    offset = (place.to(tl.int64) * (3 * H * D) + (row % H) * D)[:, None] + column[None, :]
    # All loads before the first store, which the compiler may not move them across.
    q = tl.load(qkv + offset, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(qkv + H * D + offset, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(qkv + 2 * H * D + offset, mask=inside, other=0.0)
    c, s = _tables(cos, sin, place % tokens, unrotated, row < rows, D, BLOCK_D)
    wq = tl.load(q_weight + column, mask=column < D, other=0.0).to(tl.float32)
    wk = tl.load(k_weight + column, mask=column < D, other=0.0).to(tl.float32)
    unit_q, _ = _unit(q, eps, D)
    unit_k, _ = _unit(k, eps, D)
    if k_out is None:
        k_to, v_to, target = out + H * D, out + 2 * H * D, offset
    else:
        k_to, v_to, target = k_out, v_out, row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + target, _rotate(unit_q * wq[None, :], c, s), mask=inside)
    tl.store(k_to + target, _rotate(unit_k * wk[None, :], c, s), mask=inside)
    tl.store(v_to + target, v, mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens", "unrotated"])
def _backward_kernel(
    grad, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, grad_qkv, partials, rows, tokens, unrotated, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    wq = tl.load(q_weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    wk = tl.load(k_weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    sum_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, STEPS, num_stages=2):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
        place = row // H
        inside = (row < rows)[:, None] & (column < D)[None, :]
        offset = (place.to(tl.int64) * (3 * H * D) + (row % H) * D)[:, None] + column[None, :]
        if grad_k is None:
            k_from, v_from, source = grad + H * D, grad + 2 * H * D, offset
        else:
            k_from, v_from, source = grad_k, grad_v, row.to(tl.int64)[:, None] * D + column[None, :]
        q = tl.load(qkv + offset, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(qkv + H * D + offset, mask=inside, other=0.0).to(tl.float32)
        incoming_q = tl.load(grad + source, mask=inside, other=0.0).to(tl.float32)
        incoming_k = tl.load(k_from + source, mask=inside, other=0.0).to(tl.float32)
        incoming_v = tl.load(v_from + source, mask=inside, other=0.0)
        c, s = _tables(cos, sin, place % tokens, unrotated, row < rows, D, BLOCK_D)
        unit_q, inverse_q = _unit(q, eps, D)
        unit_k, inverse_k = _unit(k, eps, D)
        # The inverse of a rotation is the rotation by the negative angle.
        incoming_q = _rotate(incoming_q, c, -s)
        incoming_k = _rotate(incoming_k, c, -s)
        sum_q += incoming_q * unit_q
        sum_k += incoming_k * unit_k
        tl.store(grad_qkv + offset, _unit_backward(incoming_q * wq, unit_q, inverse_q, D), mask=inside)
        tl.store(grad_qkv + H * D + offset, _unit_backward(incoming_k * wk, unit_k, inverse_k, D), mask=inside)
        tl.store(grad_qkv + 2 * H * D + offset, incoming_v, mask=inside)
    partials += program.to(tl.int64) * (2 * D)
    tl.store(partials + column, tl.sum(sum_q, axis=0), mask=column < D)
    tl.store(partials + D + column, tl.sum(sum_k, axis=0), mask=column < D)


def _blocks(heads: int, width: int, tile: int) -> dict[str, int]:
    padded = next_power_of_2(width)
    return {"H": heads, "D": width, "BLOCK_D": padded, "ROWS": tile // padded}


def _forward(qkv, q_weight, k_weight, cos, sin, unrotated, eps, out, k_out=None, v_out=None) -> None:
    """Fill out [B, N, 3, H, d], or out, k_out and v_out [B, N, H, d]."""
    batch, tokens, _, heads, width = qkv.shape
    blocks = _blocks(heads, width, FORWARD_TILE)
    rows = batch * tokens * heads
    if rows:
        with device_of(qkv):
            _forward_kernel[(cdiv(rows, blocks["ROWS"]),)](
                qkv, q_weight, k_weight, cos, sin, out, k_out, v_out, rows, tokens, unrotated, eps,
                **blocks, num_warps=WARPS,
            )  # fmt: skip


def _apart(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:2], *qkv.shape[3:])
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


@operator("qk_norm_rope")
def _qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, unrotated: int, eps: float
) -> Tensor:
    out = torch.empty_like(qkv)
    _forward(qkv, q_weight, k_weight, cos, sin, unrotated, eps, out)
    return out


@_qk_norm_rope.register_fake
def _(qkv, q_weight, k_weight, cos, sin, unrotated, eps):
    return torch.empty_like(qkv)


@operator("qk_norm_rope_apart")
def _qk_norm_rope_apart(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, unrotated: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = _apart(qkv)
    _forward(qkv, q_weight, k_weight, cos, sin, unrotated, eps, *out)
    return out


@_qk_norm_rope_apart.register_fake
def _(qkv, q_weight, k_weight, cos, sin, unrotated, eps):
    return _apart(qkv)


@operator("qk_norm_rope_backward")
def _qk_norm_rope_backward(
    grads: list[Tensor],
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    unrotated: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, and of both weights as float32 [2, d], from that of the packed result, or those of the three
    apart."""
    batch, tokens, _, heads, width = qkv.shape
    blocks = _blocks(heads, width, BACKWARD_TILE)
    rows = batch * tokens * heads
    programs = cdiv(rows, blocks["ROWS"] * STEPS)
    grad_qkv = torch.empty_like(qkv)
    partials = qkv.new_empty(programs, 2, width, dtype=torch.float32)
    if rows:
        grad, grad_k, grad_v = [grad.contiguous() for grad in grads] if len(grads) == 3 else (*grads, None, None)
        with device_of(qkv):
            _backward_kernel[(programs,)](
                grad.contiguous(), grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, grad_qkv, partials,
                rows, tokens, unrotated, eps, **blocks, STEPS=STEPS, num_warps=WARPS,
            )  # fmt: skip
    return grad_qkv, partials.sum(0)


@_qk_norm_rope_backward.register_fake
def _(grads, qkv, q_weight, k_weight, cos, sin, unrotated, eps):
    return torch.empty_like(qkv), qkv.new_empty(2, qkv.shape[4], dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.unrotated, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, *grads):
    tensors = ctx.saved_tensors
    grad_qkv, sums = _qk_norm_rope_backward(list(grads), *tensors, ctx.unrotated, ctx.eps)
    grad_q_weight, grad_k_weight = (row.to(weight.dtype) for row, weight in zip(sums.unbind(), tensors[1:3]))
    return grad_qkv, grad_q_weight, grad_k_weight, None, None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_save)
_qk_norm_rope_apart.register_autograd(_backward, setup_context=_save)


def aot_specialisations() -> list[Specialisation]:
    """bfloat16 with float32 weights and tables, at the heads and head widths of C = 768, 1024 and 1152."""
    parameters = dict.fromkeys(("q_weight", "k_weight", "cos", "sin"), "*fp32")
    numbers = {"rows": "i32", "tokens": "i32", "unrotated": "i32", "eps": "fp32"}
    forward = {"qkv": "*bf16", **parameters, "out": "*bf16", "k_out": "*bf16", "v_out": "*bf16"}
    backward = {"grad": "*bf16", "grad_k": "*bf16", "grad_v": "*bf16", "qkv": "*bf16", **parameters}
    backward |= {"grad_qkv": "*bf16", "partials": "*fp32"}
    found = []
    for heads, width in ((12, 64), (16, 64), (16, 72)):
        for form, absent in (("", ("k_out", "v_out", "grad_k", "grad_v")), ("_apart", ())):
            for name, kernel, types, tile, steps, registers in (
                ("forward", _forward_kernel, forward, FORWARD_TILE, {}, 80),
                ("backward", _backward_kernel, backward, BACKWARD_TILE, {"STEPS": STEPS}, 112),
            ):
                pointers = {argument: kind for argument, kind in types.items() if argument not in absent}
                none = {argument: None for argument in types if argument in absent}
                found.append(
                    Specialisation(
                        f"qk_norm_rope{form}_{name}_bf16_{heads}x{width}",
                        kernel,
                        {**pointers, **numbers},
                        {**none, **_blocks(heads, width, tile), **steps},
                        WARPS,
                        aligned=tuple(pointers),
                        max_registers=registers,
                    )
                )
    return found


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, unrotated: int, *, eps: float = 1e-6
) -> Tensor:
    """RMSNorm of every head of q and k, then rotation of its interleaved pairs (2i, 2i+1); v passes unchanged.

    (a, b) → (a·cos − b·sin, b·cos + a·sin), Su et al. 2021, "RoFormer", eq. 34.

    Args:
        qkv: [B, N, 3, H, d] contiguous; d even and at most 256.
        q_weight, k_weight: [d] scales of the norms.
        cos, sin: [R, d/2] tables, R ≥ N − unrotated; token n ≥ unrotated takes row n − unrotated.
        unrotated: how many leading tokens are normalised but not rotated, in [0, N].
        eps: added to the mean square.

    Returns:
        [B, N, 3, H, d], new, contiguous.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or strides other than these, a negative eps.
    """
    arguments = (qkv, q_weight, k_weight, cos, sin, unrotated, eps)
    _check("qk_norm_rope", *arguments)
    return _packed(*arguments)


def qk_norm_rope_apart(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, unrotated: int, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` for attention that takes q, k and v apart: their gradients are read apart, too, never packed.

    Args:
        qkv, q_weight, k_weight, cos, sin, unrotated, eps: as in `qk_norm_rope`.

    Returns:
        (q, k, v), each [B, N, H, d]: of the Triton kernels three contiguous tensors, elsewhere parts of a packed one.

    Raises:
        TypeError, ValueError: as in `qk_norm_rope`.
    """
    arguments = (qkv, q_weight, k_weight, cos, sin, unrotated, eps)
    _check("qk_norm_rope_apart", *arguments)
    if use_triton(qkv):
        return _qk_norm_rope_apart(*arguments)
    return _packed(*arguments).unbind(2)


def _packed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, unrotated: int, eps: float):
    if use_triton(qkv):
        compute = _qk_norm_rope
    elif cpu.serves(qkv, q_weight, k_weight, cos, sin):
        compute = cpu.qk_norm_rope
    else:
        compute = qk_norm_rope_reference
    return compute(qkv, q_weight, k_weight, cos, sin, unrotated, eps)


def _check(operator, qkv, q_weight, k_weight, cos, sin, unrotated, eps) -> None:
    check_floats(operator, "qkv", qkv)
    check_eps(operator, eps)
    check_tensors(operator, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{operator}: qkv has shape {tuple(qkv.shape)}; it must be [B, N, 3, H, d]")
    tokens, width = qkv.shape[1], qkv.shape[4]
    if width % 2 or not 2 <= width <= 256:
        raise ValueError(f"{operator}: the head width is {width}; pairs need an even width from 2 to 256")
    check_integer(operator, "unrotated", unrotated)
    if not 0 <= unrotated <= tokens:
        raise ValueError(f"{operator}: unrotated is {unrotated}; it must lie in [0, {tokens}], the token count")
    rows = cos.shape[0] if cos.ndim == 2 else 0
    if rows < tokens - unrotated:
        raise ValueError(
            f"{operator}: cos has shape {tuple(cos.shape)}; {tokens - unrotated} rotated tokens need at least as "
            f"many rows of {width // 2}"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_parameter(operator, name, weight, (width,), "qkv", qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        check_parameter(operator, name, table, (rows, width // 2), "qkv", qkv)
        check_contiguous(operator, name, table)
    check_contiguous(operator, "qkv", qkv)
