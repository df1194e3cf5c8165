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
    program_share,
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
# Rows and columns of a tile that is written both ways: 16 numbers a thread at 8 warps, whole 64-byte lines of either. A
# program takes the tiles of `cast_steps` below one another, and the next is on its way meanwhile (two stages). Triton
# 3.6 and 3.9 then both turn bfloat16 by matrix loads from shared memory (LDSM); without stages 3.9 turns it byte by
# byte. On sm_90 and sm_100 that takes 31 to 35 registers, with sums over rows 63 or 64. Counted from machine code, not
# measured: at 4 and 16 tiles the busiest pipe of an H200 needs 0.44 and 0.35 of the time that a bfloat16 tensor takes
# at 4.3 TB/s, with sums 0.52 and 0.39; one tile a program, of 128 rows and with sums 64, takes 0.50 in 3.6 and 0.57 in
# 3.9, with sums 0.98 and 1.36. A float32 weight is too small for more than one tile a program: 0.47 (of 128 rows 0.37).
ROWS, COLUMNS, CAST_WARPS = 64, 64, 8


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


@triton.jit
def _sum_rows(x):
    """tl.sum(x, axis=0) for a multiple of 8 rows, 8 of them in one thread first.

    `tl.split` makes Triton turn x through shared memory once, in 4 stores and 4 loads of 16 bytes a lane, so that 2
    shuffles are left; `tl.sum` alone takes 54 (Triton 3.6) or 96 (3.9), 3 and 4 times the cycles of that pipe.
    """
    eighths = tl.reshape(x, [x.shape[0] // 8, 2, 2, 2, x.shape[1]])
    low, high = tl.split(tl.permute(eighths, (0, 4, 1, 2, 3)))
    low, high = tl.split(low + high)
    low, high = tl.split(low + high)
    return tl.sum(low + high, axis=0)


@triton.jit(do_not_specialize=["R"])
def _quantize_kernel(
    x, largest, rows, columns, scale, partials, R, stride,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """`rows` [R, C] and `columns` [C, stride], with zeros from R on, of x times one factor; `scale` is its inverse.

    `partials` [⌈stride / (ROWS · STEPS)⌉, C], where they are wanted: sums of x over a program's rows.
    """
    top = tl.load(largest).to(tl.float32, bitcast=True)
    # NaN is not below, and so stays.
    top = tl.where(top < LEAST, LEAST, top)
    factor = tl.div_rn(LARGEST, top)
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row[:, None] * C + column[None, :]
    turned = column[:, None].to(tl.int64) * stride + row[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, STEPS, num_stages=2):
        first = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS
        inside = (first + row[:, None] < R) & (column[None, :] < C)
        value = tl.load(x + first * C + place, mask=inside, other=0.0).to(tl.float32)
        found = (value * factor).to(rows.dtype.element_ty)
        tl.store(rows + first * C + place, found, mask=inside)
        filled = (first + row[None, :] < stride) & (column[:, None] < C)
        tl.store(columns + first + turned, tl.trans(found), mask=filled)
        if partials is not None:
            total += value
    if partials is not None:
        tl.store(partials + tl.program_id(0).to(tl.int64) * C + column, _sum_rows(total), mask=column < C)
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
    blocks = _blocks(R, C, rows.dtype)
    grid = cdiv(columns.shape[1], ROWS * blocks["STEPS"]), cdiv(C, COLUMNS)
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


def cast_steps(rows: int, columns: int) -> int:
    """Tiles below one another that one program quantizes and sums before it writes their sums, 1 to 16.

    4 for 64 images of 544 tokens at C = 768: the partial sums are then 0.5 % of the bytes moved, with one tile 2 %.
    """
    return program_share(cdiv(rows, ROWS) * cdiv(columns, COLUMNS), most=16, least=1)


def _blocks(rows: int, columns: int, dtype: torch.dtype) -> dict[str, object]:
    steps = cast_steps(rows, columns)
    return {
        "C": columns, "ROWS": ROWS, "COLUMNS": COLUMNS, "STEPS": steps, "LARGEST": LARGEST[dtype], "LEAST": LEAST
    }  # fmt: skip


def aot_specialisations() -> list[Specialisation]:
    """Of the Linears of C = 768: inputs and gradients in bfloat16, 64 images of 544 tokens, and weights in float32."""
    found = []
    for of in ("bf16", "fp32"):
        found.append(
            Specialisation(
                f"fp8_largest_{of}", _largest_kernel, {"x": f"*{of}", "largest": "*i32", "numbers": "i32"},
                {"TILE": TILE, "STEPS": STEPS}, WARPS, aligned=("x", "numbers"), max_registers=64, store_bytes=0,
            )
        )  # fmt: skip
    for name, of, to, dtype, partials, rows in (
        ("e4m3", "bf16", "fp8e4nv", torch.float8_e4m3fn, False, 64 * 544),
        ("e5m2", "bf16", "fp8e5", torch.float8_e5m2, False, 64 * 544),
        ("e5m2_sums", "bf16", "fp8e5", torch.float8_e5m2, True, 64 * 544),
        ("weight_e4m3", "fp32", "fp8e4nv", torch.float8_e4m3fn, False, 768),
    ):
        for columns in (768, 2048, 4096):
            pointers = {"x": f"*{of}", "largest": "*i32", "rows": f"*{to}", "columns": f"*{to}", "scale": "*fp32"}
            pointers |= {"partials": "*fp32"} if partials else {}
            found.append(
                Specialisation(
                    f"fp8_quantize_{name}_{columns}", _quantize_kernel, pointers | {"R": "i32", "stride": "i32"},
                    ({} if partials else {"partials": None}) | _blocks(rows, columns, dtype), CAST_WARPS,
                    aligned=("x", "rows", "columns", "partials", "stride"),
                    max_registers=64 if partials else 40, capabilities=(90, 100),
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
