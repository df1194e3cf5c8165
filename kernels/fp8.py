"""Matrix products in FP8, forward and backward (Micikevicius et al. 2022, "FP8 formats for deep learning").

Each tensor under one scale that puts its largest number at the format's largest: E4M3 for inputs and weights, E5M2 for
gradients. A product of 8-bit operands wants both of them along the dimension that it sums over, so what a forward and
its backward sum over differently is written both ways while it is in registers. There a bias's gradient is summed, too.
Shapes: R rows (all leading dimensions together), C columns; M rows, K inputs, N outputs of a Linear.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import (
    aligned,
    cdiv,
    check_contiguous,
    check_device,
    check_floats,
    check_parameter,
    check_programs,
    check_tensors,
    device_of,
    first_derivatives,
    operator,
    use_triton,
)
from .specialisation import Specialisation
from .toolchain import tl, triton

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# The least number that a tensor's largest is taken for: the factor that lifts it is finite in float32 down to 1.7e-34.
LEAST = 1e-30
MIN_CAPABILITY = (8, 9)  # Ada; H100 and H200 have 9.0
# Elements of a tile of the search for the largest, tiles of a program: 8 a thread at 4 warps, which is one 16-byte
# access in a 2-byte dtype; 6528 programs for 64 images of 544 tokens at C = 3072, each with one atomic at the end.
TILE, STEPS, WARPS = 1024, 16, 4
# Rows and columns of a tile that is written both ways: 32 numbers a thread at 8 warps, whole 64-byte lines of either.
ROWS, COLUMNS, CAST_WARPS = 128, 64, 8
# Rows of a tile that is summed as well: 16 numbers a thread take 64 registers on sm_90 by Triton 3.6 and 40 by 3.9, 32
# take 116 and 64. Sums of so many rows, written and read once more, are 2 % of the bytes that a bfloat16
# gradient moves.
SUM_ROWS = 64


class Quantized(NamedTuple):
    """A matrix x [R, C] in eight bits along either side, as `fp8_quantize` makes it: x ≈ rows · scale.

    Attributes:
        rows: [R, C].
        columns: [C, R up to a multiple of 16], the transpose with zeros behind it.
        scale: 0-dim float32.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor


def fp8_quantize_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8_quantize` in plain PyTorch."""
    x = x.float()
    largest = (x.abs().amax() if x.numel() else x.new_zeros(())).clamp(min=LEAST)
    rows = (x * (LARGEST[dtype] / largest)).to(dtype)
    columns = torch.zeros(x.shape[1], aligned(x.shape[0]), dtype=dtype, device=x.device)
    columns[:, : x.shape[0]] = rows.t()
    return rows, columns, largest / LARGEST[dtype]


# Triton is to see whether 16 divides `numbers` and `stride`: accesses of 16 bytes hang on it.
@triton.jit
def _largest_kernel(x, largest, numbers, TILE: tl.constexpr, STEPS: tl.constexpr):
    """The bits of the largest magnitude: those of numbers that are not negative are ordered as they are, NaN last."""
    first = tl.program_id(0).to(tl.int64) * (TILE * STEPS)
    x += first
    found = tl.zeros([TILE], tl.int32)
    for step in tl.range(0, STEPS, num_stages=2):
        place = step * TILE + tl.arange(0, TILE)
        value = tl.load(x + place, mask=first + place < numbers, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.abs(value).to(tl.int32, bitcast=True))
    tl.atomic_max(largest, tl.max(found, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["R"])
def _quantize_kernel(
    x, largest, rows, columns, scale, partials, R, stride,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """`rows` [R, C] and `columns` [C, stride], with zeros from R on, of x times one factor; `scale` is its inverse.

    `partials` [⌈stride / ROWS⌉, C], where they are wanted: sums of x over the rows of a tile.
    """
    top = tl.load(largest).to(tl.float32, bitcast=True)
    # NaN is not below, and so stays.
    top = tl.where(top < LEAST, LEAST, top)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row[:, None] * C + column[None, :]
    inside = (first + row[:, None] < R) & (column[None, :] < C)
    value = tl.load(x + first * C + place, mask=inside, other=0.0).to(tl.float32)
    found = (value * tl.div_rn(LARGEST, top)).to(rows.dtype.element_ty)
    tl.store(rows + first * C + place, found, mask=inside)
    turned = column[:, None].to(tl.int64) * stride + row[None, :]
    filled = (first + row[None, :] < stride) & (column[:, None] < C)
    tl.store(columns + first + turned, tl.trans(found), mask=filled)
    if partials is not None:
        tl.store(partials + tl.program_id(0).to(tl.int64) * C + column, tl.sum(value, axis=0), mask=column < C)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, tl.div_rn(top, LARGEST))


@operator("fp8_quantize")
def _fp8_quantize(x: Tensor, wide: bool, summed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, C]; in E5M2 where `wide`; last its sums over rows, [C] float32, empty unless `summed`."""
    _require_fp8(x)  # Triton's compiler would say it in its own words
    rows, columns, scale, sums = _empty(x, wide, summed)
    if not x.numel():
        return rows, columns.zero_(), scale.fill_(LEAST / LARGEST[rows.dtype]), sums.zero_()
    R, C = x.shape
    largest = torch.zeros((), dtype=torch.int32, device=x.device)
    check_programs("fp8_quantize", "the number of columns over 64", cdiv(C, COLUMNS))
    blocks = _blocks(C, rows.dtype, summed)
    grid = cdiv(columns.shape[1], blocks["ROWS"]), cdiv(C, COLUMNS)
    partials = x.new_empty(grid[0], C, dtype=torch.float32) if summed else None
    with device_of(x):
        _largest_kernel[(cdiv(R * C, TILE * STEPS),)](x, largest, R * C, TILE=TILE, STEPS=STEPS, num_warps=WARPS)
        _quantize_kernel[grid](
            x, largest, rows, columns, scale, partials, R, columns.shape[1], **blocks, num_warps=CAST_WARPS
        )
    return rows, columns, scale, sums if partials is None else partials.sum(0)


@_fp8_quantize.register_fake
def _(x, wide, summed):
    return _empty(x, wide, summed)


def _empty(x: Tensor, wide: bool, summed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, C = x.shape
    dtype = torch.float8_e5m2 if wide else torch.float8_e4m3fn
    scale = x.new_empty((), dtype=torch.float32)
    sums = x.new_empty(C if summed else 0, dtype=torch.float32)
    return x.new_empty(R, C, dtype=dtype), x.new_empty(C, aligned(R), dtype=dtype), scale, sums


def _blocks(columns: int, dtype: torch.dtype, summed: bool) -> dict[str, object]:
    rows = SUM_ROWS if summed else ROWS
    return {"C": columns, "ROWS": rows, "COLUMNS": COLUMNS, "LARGEST": LARGEST[dtype], "LEAST": LEAST}


def aot_specialisations() -> list[Specialisation]:
    """Inputs and gradients of the Linears of C = 768 in bfloat16, their weights in float32."""
    found = []
    for of in ("bf16", "fp32"):
        found.append(
            Specialisation(
                f"fp8_largest_{of}", _largest_kernel, {"x": f"*{of}", "largest": "*i32", "numbers": "i32"},
                {"TILE": TILE, "STEPS": STEPS}, WARPS, aligned=("x", "numbers"), max_registers=64, store_bytes=0,
            )
        )  # fmt: skip
    for name, of, to, dtype, partials in (
        ("e4m3", "bf16", "fp8e4nv", torch.float8_e4m3fn, False),
        ("e5m2", "bf16", "fp8e5", torch.float8_e5m2, False),
        ("e5m2_sums", "bf16", "fp8e5", torch.float8_e5m2, True),
        ("weight_e4m3", "fp32", "fp8e4nv", torch.float8_e4m3fn, False),
    ):
        for columns in (768, 2048, 4096):
            pointers = {"x": f"*{of}", "largest": "*i32", "rows": f"*{to}", "columns": f"*{to}", "scale": "*fp32"}
            pointers |= {"partials": "*fp32"} if partials else {}
            found.append(
                Specialisation(
                    f"fp8_quantize_{name}_{columns}", _quantize_kernel, pointers | {"R": "i32", "stride": "i32"},
                    ({} if partials else {"partials": None}) | _blocks(columns, dtype, partials), CAST_WARPS,
                    aligned=("x", "rows", "columns", "partials", "stride"),
                    max_registers=80, store_bytes=8, capabilities=(90, 100),
                )
            )  # fmt: skip
    return found


def fp8_quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """A matrix in eight bits, along its rows and along its columns: x ≈ rows · scale.

    Args:
        x: [R, C] contiguous, float32, float16 or bfloat16. Its largest magnitude becomes the format's largest number;
            one below 1e-30 counts as 1e-30. With inf or NaN in x everything comes out as NaN.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        Both, and the scale.

    Raises:
        TypeError, ValueError: other dtypes, dimensions or strides.
    """
    check_floats("fp8_quantize", "x", x)
    if dtype not in LARGEST:
        raise TypeError(f"fp8_quantize: dtype is {dtype}; it must be torch.float8_e4m3fn or torch.float8_e5m2")
    if x.dim() != 2:
        raise ValueError(f"fp8_quantize: x has shape {tuple(x.shape)}; it must be [R, C]")
    check_contiguous("fp8_quantize", "x", x)
    return Quantized(*_quantize(x, dtype, summed=False)[:3])


def _quantize(x: Tensor, dtype: torch.dtype, *, summed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`fp8_quantize`, and where they are wanted the sums of x over its rows, [C] float32."""
    if use_triton(x):
        *found, sums = _fp8_quantize(x, dtype is torch.float8_e5m2, summed)
        return *found, sums if summed else None
    return *fp8_quantize_reference(x, dtype), x.sum(0, dtype=torch.float32) if summed else None


class _Linear(torch.autograd.Function):
    """See `fp8_linear`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, *quantized: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        x_rows, x_columns, x_scale = fp8_quantize(rows, torch.float8_e4m3fn)
        w_rows, w_columns, w_scale = quantized
        ctx.save_for_backward(x_columns, x_scale, w_columns, w_scale)
        ctx.shape, ctx.dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Forward sums may be kept in fewer bits, as gradients' are not: what FP8 training is known to bear.
        out = _product(x_rows, w_rows, x_scale, w_scale, x.dtype, bias, fast=True)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @first_derivatives("fp8_linear", "take F.linear")  # found through the gradient alone, as no input is kept
    def backward(ctx, saved, grad: Tensor):
        x_columns, x_scale, w_columns, w_scale = saved
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        g_rows, g_columns, g_scale, g_sums = _quantize(grad, torch.float8_e5m2, summed=ctx.needs_input_grad[2])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(g_rows, w_columns, g_scale, w_scale, ctx.dtype, fast=False).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(g_columns, x_columns, g_scale, x_scale, ctx.weight_dtype, fast=False)
        if ctx.needs_input_grad[2]:
            grad_bias = g_sums.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    fast: bool,
) -> Tensor:
    """a [M, K] times the transpose of b [N, K], with their scales, plus bias; on a CPU as sums in float32."""
    if not a.is_cuda:
        with torch.autocast(a.device.type, enabled=False):
            found = (a.float() @ b.float().t()) * (scale_a * scale_b)
            return (found if bias is None else found + bias.float()).to(dtype)
    inside = None if bias is None or dtype is torch.float32 else bias.to(dtype)  # cuBLASLt adds none to float32
    found = torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b, bias=inside, out_dtype=dtype, use_fast_accum=fast
    )
    return found + bias if bias is not None and inside is None else found


def _require_fp8(x: Tensor) -> None:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else MIN_CAPABILITY
    if capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        raise RuntimeError(f"fp8_quantize: needs a GPU of compute capability {least} or newer; {x.device} has {found}")


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, quantized: Quantized | None = None) -> Tensor:
    """x Wᵀ + bias with operands of eight bits, and so the gradients of both; on a CPU it is emulated.

    The backward pass keeps x and the weight in eight bits. It has no derivative itself: that is refused where the
    incoming gradient depends on x or the weight, and left out where it is constant, as behind a plain sum.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight: [N, K], one of these. K and N must be multiples of 16, what the matrix units take.
        bias: [N], float32 or x's dtype, or None; rounded to x's dtype on a GPU.
        quantized: `fp8_quantize(weight, torch.float8_e4m3fn)`, made once where several calls share the weight; its own
            numbers are then not read, and a change of them is not seen.

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: other dtypes, devices or sizes, or a weight quantized in another format.
        RuntimeError: a GPU without FP8.
    """
    check_floats("fp8_linear", "x", x)
    check_tensors("fp8_linear", weight=weight)
    check_floats("fp8_linear", "weight", weight)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fp8_linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be [..., K] and [N, K]"
        )
    check_device("fp8_linear", "weight", weight, "x", x)
    if aligned(weight.shape[0]) != weight.shape[0] or aligned(weight.shape[1]) != weight.shape[1]:
        raise ValueError(f"fp8_linear: weight has shape {tuple(weight.shape)}; both sizes must be multiples of 16")
    check_parameter("fp8_linear", "bias", bias, (weight.shape[0],), "x", x)
    if quantized is None:
        quantized = fp8_quantize(weight.detach().contiguous(), torch.float8_e4m3fn)
    else:
        _check_quantized(quantized, weight)
    return _Linear.apply(x, weight, bias, *quantized)


def _check_quantized(quantized: Quantized, weight: Tensor) -> None:
    """Refuse what `fp8_quantize` does not make of a weight of this shape."""
    if not isinstance(quantized, Quantized):
        raise TypeError(f"fp8_linear: quantized is a {type(quantized).__name__}; it must be what fp8_quantize returns")
    rows, columns, _ = quantized
    if rows.shape != weight.shape or columns.shape != weight.shape[::-1]:
        raise ValueError(
            f"fp8_linear: quantized has rows {tuple(rows.shape)} and columns {tuple(columns.shape)}; "
            f"they must be those of weight, {tuple(weight.shape)}, and of its transpose"
        )
    if rows.dtype != torch.float8_e4m3fn or columns.dtype != torch.float8_e4m3fn:
        raise TypeError(f"fp8_linear: quantized is {rows.dtype}; a weight must be torch.float8_e4m3fn")
    for part in quantized:
        check_device("fp8_linear", "quantized", part, "weight", weight)
