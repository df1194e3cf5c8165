"""Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011), the same integers on every device.

A number has an address instead of a history: (seed, step, stream, draw, element). The key is the two halves of the
seed, the counter (element // 4, draw, step, stream), the four outputs the elements 4i … 4i+3. So a resumed run and a
replayed CUDA graph reproduce their draws, and splitting draws into chunks changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import cdiv, check_integer, check_programs, device_of, operator, use_triton
from .specialisation import Specialisation
from .toolchain import tl, triton

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57  # multipliers, Salmon et al. 2011, section 3
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, √3 − 1
ROUNDS = 10
WORD = 0xFFFFFFFF

Step = int | Tensor


def philox(counters: int, draws: Tensor, seed: int, step: Step, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit outputs of counters 0 … n−1 of each draw, every one an int64 tensor [S, n] in [0, 2³²).

    Args:
        counters: n.
        draws: [S] int64, the second counter word.
        seed: in [0, 2⁶³).
        step: int or 0-dim int64, the third counter word; its low 32 bits count.
        stream: the fourth, in [0, 2³²).
    """
    # The mask changes nothing, but Inductor takes a bare arange for an index, and its products for 32-bit numbers.
    c0, c1 = torch.arange(counters, device=draws.device)[None].bitwise_and(WORD), draws[:, None]
    c2, c3 = step_tensor(step, draws.device).bitwise_and(WORD), stream
    key_a, key_b = seed & WORD, seed >> 32
    for _ in range(ROUNDS):
        # The int64 product of two words wraps but keeps all 64 bits; the mask clears the sign bits that the shift
        # brings in and the high halves that c1 and c3 carry along.
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0 = ((b >> 32) ^ c1).bitwise_xor_(key_a).bitwise_and_(WORD)
        c2 = ((a >> 32) ^ c3).bitwise_xor_(key_b).bitwise_and_(WORD)
        c1, c3 = b, a
        key_a, key_b = (key_a + WEYL_A) & WORD, (key_b + WEYL_B) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def uniforms(count: int, draws: Tensor, seed: int, step: Step, stream: int) -> Tensor:
    """U[0, 1) in multiples of 2⁻²⁴: [S, count] float32."""
    words = philox(-(-count // 4), draws, seed, step, stream)
    return (torch.stack(words, dim=-1) >> 8).float().mul_(2.0**-24).flatten(1)[:, :count]


def normals(count: int, draws: Tensor, seed: int, step: Step, stream: int) -> Tensor:
    """N(0, 1) by Box and Muller (1958): [S, count] float32.

    Words 0 and 1 make elements 0 and 1, words 2 and 3 elements 2 and 3. The radius takes all 32 bits of its word, so
    the tails reach √(2·33 ln 2) = 6.8 standard deviations.
    """
    words = philox(-(-count // 4), draws, seed, step, stream)
    numbers = []
    for first in (0, 2):
        radius = words[first].float().mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
        # Centred on zero: an angle in [−π, π) has half the rounding error of one in [0, 2π).
        angle = (words[first + 1] - 2**31).float().mul_(2 * math.pi * 2.0**-32)
        numbers += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(numbers, dim=-1).flatten(1)[:, :count]


@triton.jit
def philox_words(counter, draw, seed, step, stream):
    """The four output words (uint32) of a block of counters."""
    return tl.philox(seed, counter.to(tl.uint32), draw.to(tl.uint32), step.to(tl.uint32), stream.to(tl.uint32))


@triton.jit
def uniform_of(word):
    """U[0, 1) in multiples of 2^-24, as `uniforms`."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two N(0, 1) numbers of two words, as `normals`.

    The turn is reduced to an eighth on the integer, where it is exact, and sine and cosine are Cephes's polynomials
    on [-pi/4, pi/4]: the library functions reduce arguments of any size, and their slow path takes a stack frame.
    """
    u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    turned = angle_word + 0xA0000000  # half a turn, as the angles of `normals` start at -pi, and half a quarter
    quarter = turned >> 30
    rest = (turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    angle = rest.to(tl.float32) * 1.4629180792671596e-09  # (pi / 2) / 2^30
    square = angle * angle
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * angle + angle
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - 0.5 * square + 1.0
    odd = (quarter & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where((quarter == 1) | (quarter == 2), -first, first)
    second = tl.where(quarter >= 2, -second, second)
    return radius * first, radius * second


@triton.jit
def interleave(a, b, c, d):
    """Four blocks [n] as one [4n]: a0 b0 c0 d0 a1 …"""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(4 * a.shape[0])


@triton.jit
def normal_block(counter, draw, seed, step, stream):
    """The normals of a block of n counters, [4n] float32."""
    w0, w1, w2, w3 = philox_words(counter, draw, seed, step, stream)
    a, b = normal_pair(w0, w1)
    c, d = normal_pair(w2, w3)
    return interleave(a, b, c, d)


@triton.jit
def uniform_block(counter, draw, seed, step, stream):
    """The uniforms of a block of n counters, [4n] float32."""
    w0, w1, w2, w3 = philox_words(counter, draw, seed, step, stream)
    return interleave(uniform_of(w0), uniform_of(w1), uniform_of(w2), uniform_of(w3))


@triton.jit(do_not_specialize=["seed", "stream", "first_draw"])
def _philox_kernel(out, step_pointer, seed, stream, first_draw, count, NORMAL: tl.constexpr, COUNTERS: tl.constexpr):
    step = tl.load(step_pointer)
    row = tl.program_id(1)
    counter = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    if NORMAL:
        numbers = normal_block(counter, first_draw + row, seed, step, stream)
    else:
        numbers = uniform_block(counter, first_draw + row, seed, step, stream)
    element = tl.program_id(0) * 4 * COUNTERS + tl.arange(0, 4 * COUNTERS)
    tl.store(out + row.to(tl.int64) * count + element, numbers, mask=element < count)


COUNTERS = 512  # a program makes 2048 numbers, 16 a thread
WARPS = 4


@operator("philox")
def _philox(step: Tensor, seed: int, stream: int, first_draw: int, draws: int, count: int, normal: bool) -> Tensor:
    out = torch.empty(draws, count, device=step.device)
    if out.numel():
        with device_of(out):
            _philox_kernel[(cdiv(count, 4 * COUNTERS), draws)](
                out, step, seed, stream, first_draw, count, NORMAL=normal, COUNTERS=COUNTERS, num_warps=WARPS
            )
    return out


@_philox.register_fake
def _(step, seed, stream, first_draw, draws, count, normal):
    return step.new_empty(draws, count, dtype=torch.float32)


def aot_specialisations() -> list[Specialisation]:
    """Normals and uniforms, float32."""
    types = ("*fp32", "*i64", "i64", "i32", "i32", "i32")
    names = ("out", "step_pointer", "seed", "stream", "first_draw", "count")
    return [
        Specialisation(
            f"philox_{name}",
            _philox_kernel,
            dict(zip(names, types, strict=True)),
            {"NORMAL": name == "normal", "COUNTERS": COUNTERS},
            num_warps=WARPS,
            aligned=("out", "step_pointer", "count"),
            max_registers=40,
            load_bytes=4,  # all it reads is the step
        )
        for name in ("normal", "uniform")
    ]


def check_address(function: str, seed: int, step: Step, stream: int, first_draw: int, device: torch.device) -> None:
    """Refuse an address outside the counter's words.

    Raises:
        ValueError: seed, stream, first_draw or an int step out of range, or a step tensor that is not 0-dim int64 on
            `device`.
        TypeError: a fractional one.
    """
    numbers = [("seed", seed, 63), ("stream", stream, 31), ("first_draw", first_draw, 31)]
    if not isinstance(step, Tensor):
        numbers.append(("step", step, 63))
    for name, value, bits in numbers:
        check_integer(function, name, value)
        if not 0 <= value < 2**bits:
            raise ValueError(f"{function}: {name} is {value}; it must lie in [0, 2**{bits})")
    if isinstance(step, Tensor):
        if step.dim() != 0 or step.dtype != torch.int64 or step.device != device:
            raise ValueError(
                f"{function}: step is a {step.dtype} tensor of shape {tuple(step.shape)} on {step.device}; "
                f"it must be a 0-dim int64 on {device}"
            )


def step_tensor(step: Step, device: torch.device) -> Tensor:
    """The step where a kernel can read it; an int is filled in there, without waiting for the device."""
    return step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)


def philox_uniform(
    shape: Sequence[int],
    seed: int,
    step: Step,
    stream: int,
    *,
    draws: int | None = None,
    first_draw: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """U[0, 1) numbers of the address (seed, step, stream), in multiples of 2⁻²⁴.

    Args:
        shape: of one draw.
        seed: in [0, 2⁶³).
        step: int in [0, 2⁶³) of which the low 32 bits count, or 0-dim int64 tensor on `device` (read there, without
            waiting for it).
        stream: in [0, 2³¹); what should be independent takes its own.
        draws: S for a leading dimension of draws first_draw … first_draw + S − 1; None for draw `first_draw` alone.
        device: None for PyTorch's default.
        dtype: a floating one. The numbers are made in float32 and rounded to it: in 16 bits, 1 is among them.

    Returns:
        [*shape], or [S, *shape] with `draws`.

    Raises:
        ValueError: an address out of range, a shape with a negative size, or (on CUDA) of 2³¹ numbers and more.
        TypeError: a fractional address, or a dtype that is not floating.
    """
    return _draw("philox_uniform", False, shape, seed, step, stream, draws, first_draw, device, dtype)


def philox_normal(
    shape: Sequence[int],
    seed: int,
    step: Step,
    stream: int,
    *,
    draws: int | None = None,
    first_draw: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """N(0, 1) numbers of the address (seed, step, stream); arguments, shapes and errors as in `philox_uniform`.

    A stream's normals and uniforms come from the same integers: draw them from different streams.
    """
    return _draw("philox_normal", True, shape, seed, step, stream, draws, first_draw, device, dtype)


def _draw(function, normal, shape, seed, step, stream, draws, first_draw, device, dtype):
    device = torch.empty(0, device=device).device  # "cuda" gains its index, None becomes the default device
    check_address(function, seed, step, stream, first_draw, device)
    if not dtype.is_floating_point:
        raise TypeError(f"{function}: dtype is {dtype}; it must be floating")
    rows, count = 1 if draws is None else draws, math.prod(shape)
    if min(rows, *shape, 0) < 0:
        raise ValueError(f"{function}: shape is {tuple(shape)} and draws {draws}; neither may be negative")
    step = step_tensor(step, device)
    word = 2 * stream  # odd words are the times of flow_noise: no stream of a caller can meet them
    if use_triton(step):
        check_programs(function, "draws", rows)
        if count >= 2**31:  # its elements are counted in 32 bits
            raise ValueError(f"{function}: shape is {tuple(shape)}; a draw takes fewer than 2**31 numbers, split it")
        numbers = _philox(step, seed, word, first_draw, rows, count, normal)
    else:
        law = normals if normal else uniforms
        numbers = law(count, torch.arange(first_draw, first_draw + rows, device=device), seed, step, word)
    return numbers.to(dtype).view(shape if draws is None else (draws, *shape))
