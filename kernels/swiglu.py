"""SwiGLU's gate on the packed output of one Linear (Shazeer 2020, "GLU variants improve Transformer").

Shapes: R rows (all leading dimensions together), F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .dispatch import NAMESPACE, check_contiguous, check_floats, device_of, use_triton
from .specialisation import Specialisation
from .toolchain import tl, triton

# Elements of a program's tile at 4 warps: 8 a thread and tensor, which is one 16-byte access in a 2-byte dtype. Hidden
# widths of 2048 and 3072 split without remainder; narrower ones than TILE share a program. Prediction for an H200: 16
# programs a multiprocessor, 64 KiB in flight.
TILE = 1024
WARPS = 4


def swiglu_reference(x: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch."""
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(x.dtype)


@triton.jit
def _tile(rows, F: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr):
    """The tile's first row (int64), its rows [ROWS, 1] counted from there, columns [1, BLOCK_F] and which exist."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    return first, row, column, (first + row < rows) & (column < F)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(x, out, rows, F: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr):
    first, row, column, inside = _tile(rows, F, BLOCK_F, ROWS)
    x += first * (2 * F) + row * (2 * F) + column
    gate = tl.load(x, mask=inside).to(tl.float32)
    up = tl.load(x + F, mask=inside).to(tl.float32)
    tl.store(out + first * F + row * F + column, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(grad, x, grad_x, rows, F: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr):
    first, row, column, inside = _tile(rows, F, BLOCK_F, ROWS)
    base = first * (2 * F)
    place = row * (2 * F) + column
    incoming = tl.load(grad + first * F + row * F + column, mask=inside).to(tl.float32)
    gate = tl.load(x + base + place, mask=inside).to(tl.float32)
    up = tl.load(x + base + F + place, mask=inside).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_x + base + place, incoming * up * slope, mask=inside)
    tl.store(grad_x + base + F + place, incoming * gate * sigmoid, mask=inside)


def _launch(x: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, rows and constants for x [..., 2F]."""
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    blocks = _blocks(width)
    return (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(width, blocks["BLOCK_F"])), rows, blocks


def _blocks(width: int) -> dict[str, int]:
    block = min(TILE, triton.next_power_of_2(width))
    return {"F": width, "BLOCK_F": block, "ROWS": TILE // block}


@torch.library.custom_op(f"{NAMESPACE}::swiglu", mutates_args=())
def _swiglu(x: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if out.numel():
        grid, rows, blocks = _launch(x)
        with device_of(x):
            _forward_kernel[grid](x, out, rows, **blocks, num_warps=WARPS)
    return out


@_swiglu.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op(f"{NAMESPACE}::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad_x = torch.empty_like(x)
    if grad_x.numel():
        grid, rows, blocks = _launch(x)
        with device_of(x):
            _backward_kernel[grid](grad.contiguous(), x, grad_x, rows, **blocks, num_warps=WARPS)
    return grad_x


@_swiglu_backward.register_fake
def _(grad, x):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_save)


def aot_specialisations() -> list[Specialisation]:
    """bfloat16 at the hidden widths int(8C/3) of C = 768, 1024 and 1152."""
    found = []
    for width in (2048, 2730, 3072):
        # Rows of 2730 start at any even element, so no access may be wider than two of them.
        widest = 16 if width % 8 == 0 else 4
        shape = {
            "constants": _blocks(width),
            "num_warps": WARPS,
            "max_registers": 40,
            "load_bytes": widest,
            "store_bytes": widest,
        }
        for name, kernel, pointers in (
            ("forward", _forward_kernel, ("x", "out")),
            ("backward", _backward_kernel, ("grad", "x", "grad_x")),
        ):
            arguments = dict.fromkeys(pointers, "*bf16") | {"rows": "i32"}
            found.append(Specialisation(f"swiglu_{name}_bf16_{width}", kernel, arguments, aligned=pointers, **shape))
    return found


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) · second half.

    Args:
        x: [..., 2F] contiguous, float32, float16 or bfloat16.

    Returns:
        [..., F] of the same dtype.

    Raises:
        TypeError, ValueError: another dtype, an odd or missing last dimension, strides.
    """
    check_floats("swiglu", "x", x)
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"swiglu: x has shape {tuple(x.shape)}; its last dimension holds two halves and must be even")
    check_contiguous("swiglu", "x", x)
    if use_triton(x):
        return _swiglu(x)
    return cpu.swiglu(x) if cpu.serves(x) else swiglu_reference(x)
