"""ADM's centre crop in Pillow's integer arithmetic, from decoded 8-bit images of any size.

The protocol (Dhariwal and Nichol 2021, arXiv 2105.05233): halve with a box filter while the short side is at least
twice the target, resize the short side to the target with a bicubic filter, cut out the centre. Pillow resamples one
axis after the other, with weights that are integers of 2^-22 and rounds to 8 bits in between; so do the functions
here, of the pixels that the crop keeps alone.

Shapes: B images of h×w pixels, S side of the crop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import cdiv, check_contiguous, check_programs, check_tensors, device_of, operator, upload, use_triton
from .specialisation import Specialisation
from .toolchain import tl, triton

PRECISION = 22  # bits of a weight's fraction: 32 less 8 of a pixel and 2 for sums beyond 1 (Pillow, Resample.c)
HALF = 1 << (PRECISION - 1)
BLOCK = 512  # results of a program, 4 a thread: 8 took more than 64 registers
WARPS = 4
FIELDS = 10  # int64 numbers that describe an image's pass to the kernel


class Pass(NamedTuple):
    """One axis resampled: result i is Σ_k weights[i, k] · input[first[i] + k], in units of 2^-22."""

    vertical: bool
    first: Tensor  # [n] int32
    weights: Tensor  # [n, taps] int32


class CropPlan(NamedTuple):
    """How one size of images becomes S×S: the window of it that counts, and what is done with that."""

    rows: tuple[int, int]  # of the image, from and to
    columns: tuple[int, int]
    passes: tuple[Pass, ...]


def _bicubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, in Pillow's order of operations."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).double()


def resample_taps(size_in: int, size_out: int, filter_name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(first [n], weights [n, taps]) int32 of the results start … stop-1 of `size_out`, as Pillow computes them.

    Args:
        filter_name: "box" or "bicubic".
    """
    function, support = {"box": (_box, 0.5), "bicubic": (_bicubic, 2.0)}[filter_name]
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support *= stretch
    centre = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale
    low = (centre - support + 0.5).trunc().clamp_(min=0)
    high = (centre + support + 0.5).trunc().clamp_(max=size_in)
    taps = int((high - low).max())
    # Results at the far edge have fewer taps; theirs begin earlier, with weights of 0, to stay inside the image.
    first = low.clamp(max=size_in - taps)
    place = first[:, None] + torch.arange(taps, dtype=torch.float64)
    weights = function((place - centre[:, None] + 0.5) * (1.0 / stretch))
    weights = torch.where((place >= low[:, None]) & (place < high[:, None]), weights, 0.0)
    total = torch.zeros_like(centre)
    for column in weights.unbind(1):  # one by one: the sum depends on the order in its last bit
        total = total + column
    weights = weights / total[:, None] * (1 << PRECISION)
    weights = torch.where(weights < 0, weights - 0.5, weights + 0.5).trunc()
    return first.int(), weights.int()


def crop_sizes(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """(height, width) of the image, after each halving, and of the whole resized image that the crop is cut from."""
    sizes = [(height, width)]
    while min(sizes[-1]) >= 2 * side:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    scale = side / min(sizes[-1])
    return [*sizes, (round(sizes[-1][0] * scale), round(sizes[-1][1] * scale))]


@functools.lru_cache(maxsize=2048)  # 7 KB a plan of ImageNet; its photographs have some ten common sizes
def crop_plan(height: int, width: int, side: int, *, tall_first: bool = False) -> CropPlan:
    """The passes of ADM's crop.

    Args:
        height, width: of the image, at least 1.
        side: S.
        tall_first: Pillow's order from version 13 on: down an image's height first, where that shrinks by more than
            twice as many pixels as the width. False is the order of all versions before: always across first.
    """
    if min(height, width, side) < 1:
        raise ValueError(f"centre_crop: an image of {width}×{height} pixels and side {side}; none may be below 1")
    sizes = crop_sizes(height, width, side)
    windows, axes = [], []
    for axis in (0, 1):
        low = (sizes[-1][axis] - side) // 2
        window, passes = (low, low + side), []
        for stage in reversed(range(len(sizes) - 1)):
            size_in, size_out = sizes[stage][axis], sizes[stage + 1][axis]
            if size_in == size_out:
                passes.append(None)
                continue
            filter_name = "bicubic" if stage == len(sizes) - 2 else "box"
            first, weights = resample_taps(size_in, size_out, filter_name, *window)
            window = (int(first[0]), int(first[-1]) + weights.shape[1])
            passes.append(Pass(axis == 0, first - window[0], weights))
        windows.append(window)
        axes.append(passes[::-1])
    ordered = []
    for stage, (down, across) in enumerate(zip(*axes, strict=True)):
        lost_rows, lost_columns = (a - b for a, b in zip(sizes[stage], sizes[stage + 1], strict=True))
        down_first = tall_first and lost_rows > 0 and lost_rows > 2 * lost_columns
        ordered += [down, across] if down_first else [across, down]
    return CropPlan(*windows, tuple(part for part in ordered if part is not None))


def centre_crop_reference(pixels: Tensor, sizes: Sequence[tuple[int, int]], side: int, tall_first: bool) -> Tensor:
    """`centre_crop` in plain PyTorch."""
    results = pixels.new_empty(len(sizes), side, side, 3)
    offset = 0
    for index, (height, width) in enumerate(sizes):
        plan = crop_plan(height, width, side, tall_first=tall_first)
        image = pixels[offset : offset + 3 * height * width].view(height, width, 3)
        offset += 3 * height * width
        image = image[slice(*plan.rows), slice(*plan.columns)].int()
        for vertical, first, weights in plan.passes:
            axis = 0 if vertical else 1
            shape = (-1, 1, 1) if vertical else (-1, 1)
            total = HALF
            for tap, weight in enumerate(weights.to(image.device).unbind(1)):
                total = total + weight.view(shape) * image.index_select(axis, first.to(image.device) + tap)
            image = (total >> PRECISION).clamp_(0, 255)
        results[index] = image
    return results


@triton.jit
def _pass_kernel(source, target, table, firsts, weights, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """One pass of every image: source [outer, m, inner] with strides -> target [outer, n, inner], dense.

    A row of the table: where the source's window begins, strides of its outer and its resampled axis, where the target
    begins, its elements, n, inner, taps, and where `firsts` [n] and `weights` [taps, n] of this pass begin.
    """
    row = table + tl.program_id(1) * FIELDS
    base = tl.load(row)
    outer_stride = tl.load(row + 1)
    stride = tl.load(row + 2)
    target += tl.load(row + 3)
    elements = tl.load(row + 4).to(tl.int32)  # fewer than 2^31: the callers' images are
    n = tl.load(row + 5).to(tl.int32)
    inner = tl.load(row + 6).to(tl.int32)
    taps = tl.load(row + 7).to(tl.int32)
    firsts += tl.load(row + 8)
    weights += tl.load(row + 9)
    begin = tl.program_id(0) * BLOCK
    taps = tl.where(begin < elements, taps, 0)  # images differ in size, and the grid is the largest one's
    element = begin + tl.arange(0, BLOCK)
    inside = element < elements
    line = element // inner
    outer = line // n
    result = line - outer * n
    first = tl.load(firsts + result, mask=inside, other=0)
    place = source + base + outer * outer_stride + first * stride + (element - line * inner)
    total = tl.full([BLOCK], 1 << 21, tl.int32)
    for tap in range(taps):
        weight = tl.load(weights + tap * n + result, mask=inside, other=0)
        total += weight * tl.load(place + tap * stride, mask=inside, other=0).to(tl.int32)
    value = tl.minimum(tl.maximum(total >> 22, 0), 255)
    tl.store(target + element, value.to(tl.uint8), mask=inside)


@operator("centre_crop")
def _centre_crop(
    pixels: Tensor, table: Tensor, firsts: Tensor, weights: Tensor, side: int, scratch: int, blocks: list[int]
) -> Tensor:
    """One launch a row of passes: table [passes, B, FIELDS], whose first passes read `pixels` and all others what was
    written before; the results lie in front of `scratch` bytes for what comes between."""
    batch = table.shape[1]
    memory = pixels.new_empty(batch * side * side * 3 + scratch)
    if batch:
        with device_of(pixels):
            for index, programs in enumerate(blocks):
                _pass_kernel[(programs, batch)](
                    memory if index else pixels, memory, table[index], firsts, weights,
                    FIELDS=FIELDS, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
    return memory[: batch * side * side * 3].view(batch, side, side, 3).clone()


@_centre_crop.register_fake
def _(pixels, table, firsts, weights, side, scratch, blocks):
    return pixels.new_empty(table.shape[1], side, side, 3)


class _Tables:
    """What the kernel is told about a batch, gathered on the host."""

    def __init__(self, sizes: Sequence[tuple[int, int]], side: int, tall_first: bool):
        self.firsts: list[Tensor] = []
        self.weights: list[Tensor] = []
        self._where: dict[int, tuple[int, int]] = {}  # passes of equal images share their tables
        self._counts = [0, 0]
        self.scratch = 0
        results = len(sizes) * side * side * 3
        rows: list[list[list[int]]] = []  # of each image and pass
        offset = 0
        for index, (height, width) in enumerate(sizes):
            plan = crop_plan(height, width, side, tall_first=tall_first)
            passes = plan.passes or (_copy(side),)
            rows_here, columns_here = (stop - start for start, stop in (plan.rows, plan.columns))
            base, row_stride = offset + 3 * (plan.rows[0] * width + plan.columns[0]), 3 * width
            described = []
            for number, part in enumerate(passes):
                first_at, weights_at = self._place(part)
                n, taps = part.weights.shape
                if part.vertical:
                    shape, strides = (1, n, 3 * columns_here), (0, row_stride)
                    rows_here = n
                else:
                    shape, strides = (rows_here, n, 3), (row_stride, 3)
                    columns_here = n
                elements = shape[0] * shape[1] * shape[2]
                last = number == len(passes) - 1
                target = index * side * side * 3 if last else results + self.scratch
                described.append([base, *strides, target, elements, n, shape[2], taps, first_at, weights_at])
                self.scratch += 0 if last else elements
                base, row_stride = target, 3 * columns_here
            rows.append(described)
            offset += 3 * height * width
        depth = max(map(len, rows), default=0)
        idle = [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
        table = [[row[number] if number < len(row) else idle for row in rows] for number in range(depth)]
        self.blocks = [cdiv(max(row[4] for row in level), BLOCK) for level in table]
        self.table = torch.tensor(table, dtype=torch.int64).view(depth, len(sizes), FIELDS)

    def _place(self, part: Pass) -> tuple[int, int]:
        key = id(part.first)  # which stays in `firsts`; the pass itself may go, and another be made where it was
        if key not in self._where:
            self._where[key] = (self._counts[0], self._counts[1])
            self.firsts.append(part.first)
            self.weights.append(part.weights.T.flatten())
            self._counts[0] += part.first.numel()
            self._counts[1] += part.weights.numel()
        return self._where[key]


@functools.lru_cache(maxsize=8)
def _copy(side: int) -> Pass:
    """The pass of an image that needs none: every pixel times 1."""
    return Pass(False, torch.arange(side, dtype=torch.int32), torch.full((side, 1), 1 << PRECISION, dtype=torch.int32))


def aot_specialisations() -> list[Specialisation]:
    """The one form that the kernel has."""
    arguments = {"source": "*u8", "target": "*u8", "table": "*i64", "firsts": "*i32", "weights": "*i32"}
    return [
        # Photographs are bytes at any offset: the accesses are as narrow as they come, and neighbours' share a line.
        Specialisation(
            "centre_crop_u8", _pass_kernel, arguments, {"FIELDS": FIELDS, "BLOCK": BLOCK}, num_warps=WARPS,
            aligned=("table",), max_registers=48, load_bytes=1, store_bytes=1,
        )
    ]  # fmt: skip


def centre_crop(pixels: Tensor, sizes: Sequence[tuple[int, int]], side: int, *, tall_first: bool = False) -> Tensor:
    """ADM's centre crop of B images, bit for bit that of Pillow.

    Args:
        pixels: [n] uint8, the images [h, w, 3] one behind the other, n = Σ 3·h·w.
        sizes: (h, w) of each, on the host, each image below 2^29 pixels.
        side: S, at least 1.
        tall_first: the order of passes of Pillow 13 and later, see `crop_plan`.

    Returns:
        [B, S, S, 3] uint8.

    Raises:
        TypeError: pixels of another dtype.
        ValueError: sizes that do not add up to the pixels, or below 1; a side below 1.
    """
    check_tensors("centre_crop", pixels=pixels)
    if pixels.dtype != torch.uint8:
        raise TypeError(f"centre_crop: pixels are {pixels.dtype}; they must be uint8")
    check_contiguous("centre_crop", "pixels", pixels)
    needed = sum(3 * height * width for height, width in sizes)
    if pixels.shape != (needed,):
        raise ValueError(
            f"centre_crop: pixels have shape {tuple(pixels.shape)}; images of the given sizes take ({needed},)"
        )
    if not use_triton(pixels):
        return centre_crop_reference(pixels, sizes, side, tall_first)
    check_programs("centre_crop", "B", len(sizes))
    tables = _Tables(sizes, side, tall_first)
    empty = torch.zeros(1, dtype=torch.int32)
    firsts, weights = (torch.cat(parts or [empty]) for parts in (tables.firsts, tables.weights))
    return _centre_crop(
        pixels, *(upload(x, pixels.device) for x in (tables.table, firsts, weights)), side, tables.scratch,
        tables.blocks,
    )  # fmt: skip
