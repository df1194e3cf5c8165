"""SwiGLU's gate on the packed output of one Linear (Shazeer 2020, "GLU variants improve Transformer").

Shapes: R rows (all leading dimensions together), F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .dispatch import (
    cdiv,
    check_contiguous,
    check_floats,
    check_parameter,
    device_of,
    next_power_of_2,
    operator,
    program_share,
    use_triton,
)
from .specialisation import Specialisation
from .toolchain import tl, triton

# Elements of a program's tile at 4 warps: 8 a thread and tensor, which is one 16-byte access in a 2-byte dtype. Hidden
# widths of 2048 and 3072 split without remainder; narrower ones than TILE share a program. Prediction for an H200: 16
# programs a multiprocessor, 64 KiB in flight.
TILE = 1024
WARPS = 4


# Tiles of a program where there is a bias. Forward, the 8 KiB of bias that it needs come from the cache once for all of
# them. Backward, the sums that a program writes are 5 % of the bytes it moves, and 34816 rows, 64 images of 544
# tokens, still make 2176 programs at F = 2048; fewer rows get fewer tiles, down to 8.
FORWARD_STEPS = 8
BACKWARD_STEPS = 32


def swiglu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`swiglu` in plain PyTorch."""
    dtype, x = x.dtype, x.float() if bias is None else x.float() + bias.float()
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(dtype)


@triton.jit
def _columns(F: tl.constexpr, BLOCK_F: tl.constexpr):
    return (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]


@triton.jit
def _halves(bias, column, F: tl.constexpr):
    """Biases of gate and up, each [1, BLOCK_F]."""
    gate = tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)
    return gate, tl.load(bias + F + column, mask=column < F, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, bias, out, rows, F: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    column = _columns(F, BLOCK_F)
    first = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    x += first * (2 * F)
    out += first * F
    if bias is not None:
        gate_bias, up_bias = _halves(bias, column, F)
    for step in tl.range(0, STEPS, num_stages=2):
        row = step * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (first + row < rows) & (column < F)
        gate = tl.load(x + row * (2 * F) + column, mask=inside).to(tl.float32)
        up = tl.load(x + F + row * (2 * F) + column, mask=inside).to(tl.float32)
        if bias is not None:
            gate += gate_bias
            up += up_bias
        tl.store(out + row * F + column, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad, x, bias, grad_x, partials, rows,
    F: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    column = _columns(F, BLOCK_F)
    first = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    grad += first * F
    x += first * (2 * F)
    grad_x += first * (2 * F)
    if bias is not None:
        gate_bias, up_bias = _halves(bias, column, F)
        gate_sum = tl.zeros([ROWS, BLOCK_F], tl.float32)
        up_sum = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for step in tl.range(0, STEPS, num_stages=2):
        row = step * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (first + row < rows) & (column < F)
        place = row * (2 * F) + column
        incoming = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + F + place, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            gate += gate_bias
            up += up_bias
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        grad_gate = incoming * up * slope
        grad_up = incoming * gate * sigmoid
        if bias is not None:
            gate_sum += grad_gate
            up_sum += grad_up
        tl.store(grad_x + place, grad_gate, mask=inside)
        tl.store(grad_x + F + place, grad_up, mask=inside)
    if bias is not None:
        partials += tl.program_id(0).to(tl.int64) * (2 * F) + tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        existing = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F) < F
        tl.store(partials, tl.sum(gate_sum, axis=0), mask=existing)
        tl.store(partials + F, tl.sum(up_sum, axis=0), mask=existing)


def _launch(x: Tensor, steps: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, rows and constants for x [..., 2F] and so many tiles a program."""
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    blocks = _blocks(width, steps)
    return (cdiv(rows, blocks["ROWS"] * steps), cdiv(width, blocks["BLOCK_F"])), rows, blocks


def _blocks(width: int, steps: int) -> dict[str, int]:
    block = min(TILE, next_power_of_2(width))
    return {"F": width, "BLOCK_F": block, "ROWS": TILE // block, "STEPS": steps}


def _backward_steps(x: Tensor) -> int:
    """Tiles of a backward program with a bias."""
    return program_share(x.numel() // (2 * TILE), BACKWARD_STEPS, least=8)


@operator("swiglu")
def _swiglu(x: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if out.numel():
        grid, rows, blocks = _launch(x, 1 if bias is None else FORWARD_STEPS)
        with device_of(x):
            _forward_kernel[grid](x, bias, out, rows, **blocks, num_warps=WARPS)
    return out


@_swiglu.register_fake
def _(x, bias):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@operator("swiglu_backward")
def _swiglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of the bias or empty)."""
    grad_x = torch.empty_like(x)
    if bias is None:
        if grad_x.numel():
            grid, rows, blocks = _launch(x, 1)
            with device_of(x):
                _backward_kernel[grid](grad.contiguous(), x, None, grad_x, None, rows, **blocks, num_warps=WARPS)
        return grad_x, x.new_empty(0)
    if not grad_x.numel():
        return grad_x, torch.zeros_like(bias)
    grid, rows, blocks = _launch(x, _backward_steps(x))
    partials = x.new_empty(grid[0], x.shape[-1], dtype=torch.float32)
    with device_of(x):
        _backward_kernel[grid](grad.contiguous(), x, bias, grad_x, partials, rows, **blocks, num_warps=WARPS)
    return grad_x, partials.sum(0).to(bias.dtype)


@_swiglu_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _swiglu_backward(grad, x, bias)
    return grad_x, None if bias is None else grad_bias


_swiglu.register_autograd(_backward, setup_context=_save)


def aot_specialisations() -> list[Specialisation]:
    """bfloat16, without a bias and with a float32 one, at the hidden widths int(8C/3) of C = 768, 1024 and 1152, the
    second with zeros up to a multiple of 16, without which no access could be wider than 4 bytes.
    """
    found = []
    for width in (2048, 2736, 3072):
        for form, name, kernel, steps, registers, pointers in (
            ("swiglu", "forward", _forward_kernel, 1, 40, ("x", "out")),
            ("swiglu", "backward", _backward_kernel, 1, 40, ("grad", "x", "grad_x")),
            ("bias_swiglu", "forward", _forward_kernel, FORWARD_STEPS, 64, ("x", "bias", "out")),
            (
                "bias_swiglu", "backward", _backward_kernel, BACKWARD_STEPS, 80,
                ("grad", "x", "bias", "grad_x", "partials"),
            ),
        ):  # fmt: skip
            absent = {name: None for name in ("bias", "partials") if name in kernel.arg_names and name not in pointers}
            types = {pointer: "*fp32" if pointer in ("bias", "partials") else "*bf16" for pointer in pointers}
            found.append(
                Specialisation(
                    f"{form}_{name}_bf16_{width}",
                    kernel,
                    types | {"rows": "i32"},
                    absent | _blocks(width, steps),
                    WARPS,
                    aligned=pointers,
                    max_registers=registers,
                )
            )
    return found


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(first half) · second half, of x + bias where there is one.

    A bias that is given here and not to the Linear before costs no pass of its own for its gradient, the sum over all
    rows, which the backward pass makes as it goes.

    Args:
        x: [..., 2F] contiguous, float32, float16 or bfloat16.
        bias: [2F], float32 or x's dtype.

    Returns:
        [..., F] of x's dtype.

    Raises:
        TypeError, ValueError: another dtype, an odd or missing last dimension, strides, a bias of another size.
    """
    check_floats("swiglu", "x", x)
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"swiglu: x has shape {tuple(x.shape)}; its last dimension holds two halves and must be even")
    check_contiguous("swiglu", "x", x)
    check_parameter("swiglu", "bias", bias, (x.shape[-1],), "x", x)
    if use_triton(x):
        return _swiglu(x, bias)
    if cpu.serves(x, bias):
        return cpu.swiglu(x if bias is None else x + bias)
    return swiglu_reference(x, bias)
