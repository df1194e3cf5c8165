"""What stands between the convolutions of a frozen network such as VGG16: bias with ReLU, and with a 2×2 maximum pool.

Shapes: B batch, C channels, H×W map, in channels-last memory (B, H, W, C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import cdiv, check_floats, check_parameter, device_of, next_power_of_2, operator, use_triton
from .specialisation import Specialisation
from .toolchain import tl, triton

# Elements of a program's tile at 4 warps: 8 a thread and tensor, which is one 16-byte access in a 2-byte dtype. VGG's
# 64 to 512 channels divide it. Prediction for an H200: registers allow 16 programs a multiprocessor, 32 KiB in flight;
# of the pool's, which read 4 tiles forward and 9 backward, 9 and 6.
TILE = 1024
WARPS = 4
SIZES = ("height", "width")


def bias_relu_reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """`bias_relu` in plain PyTorch."""
    if bias is None:
        return F.relu(x)
    return F.relu((x.float() + bias.float().view(1, -1, 1, 1)).to(x.dtype))


def bias_relu_max_pool_reference(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`bias_relu_max_pool` in plain PyTorch."""
    found = bias_relu_reference(x, bias)
    return found, F.max_pool2d(found, 2)


@triton.jit
def _bias(bias, row, channel, C: tl.constexpr):
    """The channels' bias for every row, 0 without one: each thread reads what it adds, and waits for no other."""
    if bias is None:
        return 0.0
    return tl.load(bias + 0 * row + channel, mask=(0 * row + channel) < C).to(tl.float32)


@triton.jit
def _rectified(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _tile(rows, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """The tile's first element (int64), rows [ROWS, 1] from there on, channels [1, BLOCK_C], and which exist."""
    COLUMNS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    first = (tl.program_id(0) // COLUMNS).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    channel = ((tl.program_id(0) % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return first * C, row, channel, (first + row < rows) & (channel < C)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(x, bias, out, rows, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    base, row, channel, inside = _tile(rows, C, BLOCK_C, ROWS)
    place = row * C + channel
    value = tl.load(x + base + place, mask=inside).to(tl.float32)
    tl.store(out + base + place, _rectified(value + _bias(bias, row, channel, C)), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(grad, out, grad_x, rows, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    base, row, channel, inside = _tile(rows, C, BLOCK_C, ROWS)
    place = row * C + channel
    incoming = tl.load(grad + base + place, mask=inside).to(tl.float32)
    value = tl.load(out + base + place, mask=inside).to(tl.float32)
    tl.store(grad_x + base + place, tl.where(value <= 0.0, 0.0, incoming), mask=inside)


@triton.jit
def _windows(height, width, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """A row of windows of the map, those cut off at odd edges among them.

    Gives where their upper line begins in the map and theirs in the pool (int64), windows [ROWS, 1] by their column,
    channels [1, BLOCK_C], and which of their pixels exist: upper left, upper right, lower left, lower right. Where the
    last is missing there is no pool.
    """
    COLUMNS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    across = tl.cdiv(width, 2 * ROWS)
    program = tl.program_id(0) // COLUMNS
    line = program // across  # of the whole batch
    down = (height + 1) // 2
    sample, y = line // down, line % down
    column = (program % across) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = ((tl.program_id(0) % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    upper = (sample.to(tl.int64) * height + 2 * y) * width * C
    pooled = (sample.to(tl.int64) * (height // 2) + y) * (width // 2) * C
    left, right, real = 2 * column, 2 * column + 1, channel < C
    lower = tl.where(2 * y + 1 < height, width, 0)  # pixels of the lower line
    inside = ((left < width) & real, (right < width) & real, (left < lower) & real, (right < lower) & real)
    return upper, pooled, column, channel, inside


@triton.jit
def _pool_forward_kernel(
    x, bias, out, pooled, height, width, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):
    upper, base, column, channel, inside = _windows(height, width, C, BLOCK_C, ROWS)
    place = 2 * C * column + channel
    x += upper
    out += upper
    below = width * C + place
    first = tl.load(x + place, mask=inside[0]).to(tl.float32)
    second = tl.load(x + place + C, mask=inside[1]).to(tl.float32)
    third = tl.load(x + below, mask=inside[2]).to(tl.float32)
    fourth = tl.load(x + below + C, mask=inside[3]).to(tl.float32)
    added = _bias(bias, column, channel, C)
    first, second = _rectified(first + added), _rectified(second + added)
    third, fourth = _rectified(third + added), _rectified(fourth + added)
    tl.store(out + place, first, mask=inside[0])
    tl.store(out + place + C, second, mask=inside[1])
    tl.store(out + below, third, mask=inside[2])
    tl.store(out + below + C, fourth, mask=inside[3])
    most = _larger(_larger(first, second), _larger(third, fourth))
    tl.store(pooled + base + column * C + channel, most, mask=inside[3])


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pool_backward_kernel(
    grad, grad_pooled, out, grad_x, height, width, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):
    upper, base, column, channel, inside = _windows(height, width, C, BLOCK_C, ROWS)
    place = 2 * C * column + channel
    below = width * C + place
    out += upper
    first = tl.load(out + place, mask=inside[0]).to(tl.float32)
    second = tl.load(out + place + C, mask=inside[1]).to(tl.float32)
    third = tl.load(out + below, mask=inside[2]).to(tl.float32)
    fourth = tl.load(out + below + C, mask=inside[3]).to(tl.float32)
    through = tl.load(grad_pooled + base + column * C + channel, mask=inside[3], other=0.0).to(tl.float32)
    # All that is read before anything is written: a load does not overtake a store that may concern the same memory.
    of_first = _incoming(grad, upper + place, inside[0])
    of_second = _incoming(grad, upper + place + C, inside[1])
    of_third = _incoming(grad, upper + below, inside[2])
    of_fourth = _incoming(grad, upper + below + C, inside[3])
    # The first of equal numbers, and the last NaN, as PyTorch chooses; where no window is, `through` is 0.
    most, chosen = _later(first, 0, second, 1)
    most, chosen = _later(most, chosen, third, 2)
    most, chosen = _later(most, chosen, fourth, 3)
    _store(grad_x + upper + place, inside[0], first, tl.where(chosen == 0, through, 0.0) + of_first)
    _store(grad_x + upper + place + C, inside[1], second, tl.where(chosen == 1, through, 0.0) + of_second)
    _store(grad_x + upper + below, inside[2], third, tl.where(chosen == 2, through, 0.0) + of_third)
    _store(grad_x + upper + below + C, inside[3], fourth, tl.where(chosen == 3, through, 0.0) + of_fourth)


@triton.jit
def _later(most, chosen, value, index: tl.constexpr):
    """The maximum so far and where it is, with one value more."""
    takes = (value > most) | (value != value)
    return tl.where(takes, value, most), tl.where(takes, index, chosen)


@triton.jit
def _incoming(grad, place, inside):
    """The map's own gradient of one pixel, 0 where there is none."""
    if grad is None:
        return 0.0
    return tl.load(grad + place, mask=inside).to(tl.float32)


@triton.jit
def _store(grad_x, inside, value, grad):
    tl.store(grad_x, tl.where(value <= 0.0, 0.0, grad), mask=inside)


def _blocks(channels: int) -> dict[str, int]:
    block = min(TILE, next_power_of_2(channels))
    return {"C": channels, "BLOCK_C": block, "ROWS": TILE // block}


def _launch(x: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, rows (pixels) and constants for one map."""
    batch, channels, height, width = x.shape
    blocks, rows = _blocks(channels), batch * height * width
    return (cdiv(rows, blocks["ROWS"]) * cdiv(channels, blocks["BLOCK_C"]),), rows, blocks


def _pool_launch(x: Tensor) -> tuple[tuple[int], int, int, dict[str, int]]:
    """Grid, height, width and constants for a map and its pool."""
    batch, channels, height, width = x.shape
    blocks = _blocks(channels)
    lines, across = batch * cdiv(height, 2), cdiv(width, 2 * blocks["ROWS"])
    return (lines * across * cdiv(channels, blocks["BLOCK_C"]),), height, width, blocks


@operator("bias_relu")
def _bias_relu(x: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    if out.numel():
        grid, rows, blocks = _launch(x)
        with device_of(x):
            _forward_kernel[grid](x, bias, out, rows, **blocks, num_warps=WARPS)
    return out


@_bias_relu.register_fake
def _(x, bias):
    return torch.empty_like(x)


@operator("bias_relu_backward")
def _bias_relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    grad_x = torch.empty_like(out)
    if grad_x.numel():
        grid, rows, blocks = _launch(out)
        with device_of(out):
            _backward_kernel[grid](_channels_last(grad), out, grad_x, rows, **blocks, num_warps=WARPS)
    return grad_x


@_bias_relu_backward.register_fake
def _(grad, out):
    return torch.empty_like(out)


def _save(ctx, inputs, output):
    _save_map(ctx, inputs[1], output)


def _save_map(ctx, bias, out):
    ctx.save_for_backward(out)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    (out,) = ctx.saved_tensors
    return _with_bias(ctx, _bias_relu_backward(grad, out))


def _with_bias(ctx, grad_x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the bias, which a frozen network does not ask for."""
    if not ctx.needs_input_grad[1]:
        return grad_x, None
    return grad_x, grad_x.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)


_bias_relu.register_autograd(_backward, setup_context=_save)


@operator("bias_relu_max_pool")
def _bias_relu_max_pool(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, pooled = torch.empty_like(x), _empty_pool(x)
    if out.numel():
        grid, height, width, blocks = _pool_launch(x)
        with device_of(x):
            _pool_forward_kernel[grid](x, bias, out, pooled, height, width, **blocks, num_warps=WARPS)
    return out, pooled


@_bias_relu_max_pool.register_fake
def _(x, bias):
    return torch.empty_like(x), _empty_pool(x)


@operator("bias_relu_max_pool_backward")
def _bias_relu_max_pool_backward(grad: Tensor | None, grad_pooled: Tensor, out: Tensor) -> Tensor:
    grad_x = torch.empty_like(out)
    if grad_x.numel():
        grid, height, width, blocks = _pool_launch(out)
        grad = None if grad is None else _channels_last(grad)
        with device_of(out):
            _pool_backward_kernel[grid](
                grad, _channels_last(grad_pooled), out, grad_x, height, width, **blocks, num_warps=WARPS
            )
    return grad_x


@_bias_relu_max_pool_backward.register_fake
def _(grad, grad_pooled, out):
    return torch.empty_like(out)


def _save_pool(ctx, inputs, output):
    _save_map(ctx, inputs[1], output[0])
    # Where a map goes nowhere but into its pool, no zeros are made and read for its gradient.
    ctx.set_materialize_grads(False)


def _backward_pool(ctx, grad, grad_pooled):
    (out,) = ctx.saved_tensors
    if grad_pooled is not None:
        return _with_bias(ctx, _bias_relu_max_pool_backward(grad, grad_pooled, out))
    return (None, None) if grad is None else _with_bias(ctx, _bias_relu_backward(grad, out))


_bias_relu_max_pool.register_autograd(_backward_pool, setup_context=_save_pool)


def _empty_pool(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def aot_specialisations() -> list[Specialisation]:
    """VGG's maps in bfloat16; the gradient of a pooled map comes from the map, too, as LPIPS reads each."""
    found = []
    for channels in (64, 128, 256, 512):
        for name, kernel, pointers, sizes, registers in (
            ("bias_relu_forward", _forward_kernel, ("x", "bias", "out"), ("rows",), 32),
            ("bias_relu_backward", _backward_kernel, ("grad", "out", "grad_x"), ("rows",), 32),
            ("bias_relu_max_pool_forward", _pool_forward_kernel, ("x", "bias", "out", "pooled"), SIZES, 56),
            ("bias_relu_max_pool_backward", _pool_backward_kernel, ("grad", "grad_pooled", "out", "grad_x"), SIZES, 88),
        ):
            arguments = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(sizes, "i32")
            if "bias" in arguments:
                arguments["bias"] = "*fp32"
            found.append(
                Specialisation(
                    f"{name}_bf16_{channels}", kernel, arguments, _blocks(channels), num_warps=WARPS,
                    aligned=pointers, max_registers=registers,
                )
            )  # fmt: skip
    return found


def _check(operator: str, x: Tensor, bias: Tensor | None) -> None:
    check_floats(operator, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{operator}: x has shape {tuple(x.shape)}; it must be [B, C, H, W]")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{operator}: x has strides {tuple(x.stride())}; it must be channels-last, call "
            ".contiguous(memory_format=torch.channels_last)"
        )
    check_parameter(operator, "bias", bias, (x.shape[1],), "x", x)


def bias_relu(x: Tensor, bias: Tensor | None) -> Tensor:
    """max(x + bias, 0), rounded once; what a convolution without its bias leaves to do.

    Args:
        x: [B, C, H, W] in channels-last memory, which convolutions write; float32, float16 or bfloat16.
        bias: [C], float32 or x's dtype, or None for 0.

    Returns:
        [B, C, H, W] of x's dtype and strides. It is all that the backward pass keeps.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or strides other than these.
    """
    _check("bias_relu", x, bias)
    return _bias_relu(x, bias) if use_triton(x) else bias_relu_reference(x, bias)


def bias_relu_max_pool(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`bias_relu`, and its maximum in windows of 2×2 pixels, two apart.

    Without positions of the maxima: the backward pass finds them in the map. As in PyTorch's max_pool2d a window's
    gradient goes to the first of equal maxima, row by row, NaN is the largest number, and the last row or column of an
    odd height or width lies in no window.

    Args:
        x, bias: as in `bias_relu`, H and W at least 2.

    Returns:
        The map [B, C, H, W] of x's dtype and strides, and the pool [B, C, ⌊H/2⌋, ⌊W/2⌋] of its dtype, channels-last.
        The backward pass keeps the map alone.

    Raises:
        TypeError, ValueError: as in `bias_relu`.
    """
    operator = "bias_relu_max_pool"
    _check(operator, x, bias)
    if min(x.shape[1:]) < 1 or min(x.shape[2:]) < 2:
        raise ValueError(f"{operator}: x has shape {tuple(x.shape)}; a window takes a channel and 2×2 pixels")
    return _bias_relu_max_pool(x, bias) if use_triton(x) else bias_relu_max_pool_reference(x, bias)
