"""The Triton kernels of `adaln`, their launches and what is compiled of them ahead of time.

One forward and one backward kernel serve every form; absent pointers are None and their code is not compiled.
A tile is ROWS tokens of BLOCK_C numbers, BLOCK_C the power of two from C on: lanes beyond C cost registers, no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import cdiv, device_of, next_power_of_2, program_share
from .specialisation import Specialisation
from .toolchain import tl, triton


@dataclass(frozen=True)
class Launch:
    """Launch choices of a kernel at one width: BLOCK_C, warps, and ROWS of a tile."""

    block: int
    warps: int
    rows: int


# Tokens a forward program walks through: the modulation it loads once (two or three float32 vectors) is then 12 to 19 %
# of the bytes of its tokens, and comes from the L2 cache.
FORWARD_CHUNK = 16
# The chunk that is compiled ahead of time, see `backward_chunk`. It is a constant of the kernel: as a run-time argument
# it takes the block boundary from 128 to 140 registers, and of 8 warps then one program fits a multiprocessor, not two.
AHEAD_CHUNK = 32
# Columns and chunks of a tile of the kernel that adds up the partial sums.
SUM_COLUMNS, SUM_CHUNKS = 64, 16


def _launch(width: int, numbers: int, most_warps: int) -> Launch:
    """8 numbers a thread and row in a 2-byte dtype, one 16-byte access, so that the vectors a program keeps (factor,
    offset, gate, running sums) cost 8 registers each, until `most_warps` are reached; `numbers` a thread and tile.

    Rows of 384 take 2 warps: with 4, and two rows of a tile side by side, the backward pass of the block boundary
    takes 155 registers instead of 128.
    """
    block = max(64, next_power_of_2(width))
    warps = min(max(1, block // 256), most_warps)
    return Launch(block, warps, max(1, numbers * 32 * warps // block))


def forward_launch(width: int) -> Launch:
    """Rows of 1152 take 4 warps with 16 numbers a thread: of 8 warps, 3 would have no columns, but all would have to
    wait for each other at every row."""
    return _launch(width, numbers=16, most_warps=4)


def backward_launch(width: int, closing: bool) -> Launch:
    """Four tensors and up to four running sums at 16 numbers a thread need 190 registers, which halves the programs
    that fit: 8, beyond 1024 columns 16, but for the block boundary (`closing`), which would take all 255 registers."""
    return _launch(width, numbers=8, most_warps=8 if closing else 4)


def backward_chunk(batch: int, tokens: int) -> int:
    """Tokens whose sums one backward program keeps in registers before it writes them, 8 to 64.

    32 at 64 images of 544 tokens. The partial sums are at most 8 % of the bytes moved, and mostly stay in the L2 cache
    until they are added up.
    """
    return program_share(batch * tokens, most=64, least=8)


@triton.jit
def _statistics(v, inside, eps, C: tl.constexpr, LAYER: tl.constexpr):
    """Rows without mean (LayerNorm alone) over their standard deviation or root mean square, and its inverse."""
    if LAYER:
        v = tl.where(inside, v - (tl.sum(v, axis=1) / C)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(v * v, axis=1) / C + eps)[:, None]
    return v * inverse, inverse


@triton.jit
def _rms_backward(grad, unit, inverse, C: tl.constexpr):
    """Gradient of rows from that of their unit rows; both zero beyond C."""
    return (grad - unit * (tl.sum(grad * unit, axis=1) / C)[:, None]) * inverse


@triton.jit
def _two_sums(a, b):
    """Row sums of both, [ROWS, 1] each, in one exchange between the warps."""
    first, second = tl.split(tl.sum(tl.join(a, b), axis=1))
    return first[:, None], second[:, None]


@triton.jit
def _layer_norm_backward(grad, v, inside, eps, C: tl.constexpr):
    """(gradient of the rows v from that of their unit rows, the unit rows); beyond C the first is not zero.

    Two exchanges between the warps instead of four: Σ grad · unit is Σ grad · (v − mean) over the standard deviation,
    and so does not wait for it. The RMSNorms take their two one after the other: together, the block boundary has
    139 registers instead of 128.
    """
    total, grad_total = _two_sums(v, grad)
    v = tl.where(inside, v - total / C, 0.0)
    squares, inner = _two_sums(v * v, grad * v)
    inverse = tl.rsqrt(squares / C + eps)
    unit = v * inverse
    return (grad - unit * (inner * inverse / C) - grad_total / C) * inverse, unit


@triton.jit
def _span(offsets, sample, tokens):
    """First row and token count of a sample: samples of one length, or as `offsets` says."""
    start = sample * tokens
    if offsets is not None:
        start = tl.load(offsets + sample).to(tl.int64)
        tokens = (tl.load(offsets + sample + 1) - start).to(tl.int32)
    return start, tokens


@triton.jit
def _vector(pointer, column, width):
    return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _factor(weight, scale, offset, column, width):
    """weight · (1 + scale), of which one at least is there."""
    if scale is None:
        factor = _vector(weight, column, width)
    else:
        factor = 1.0 + _vector(scale + offset, column, width)
        if weight is not None:
            factor *= _vector(weight, column, width)
    return factor


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _forward_kernel(
    x, branch, gate, closing_weight, weight, bias, shift, scale, residual, normed, offsets,
    tokens, chunks, gate_stride, shift_stride, scale_stride, eps,
    C: tl.constexpr, LAYER: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    column = tl.arange(0, BLOCK_C)
    # normed = unit · factor + offset
    factor = _factor(weight, scale, sample * scale_stride, column, C)
    if bias is not None:
        offset = _vector(bias, column, C)
        if scale is not None:
            offset *= 1.0 + _vector(scale + sample * scale_stride, column, C)
        if shift is not None:
            offset += _vector(shift + sample * shift_stride, column, C)
    elif shift is not None:
        offset = _vector(shift + sample * shift_stride, column, C)
    if gate is not None:
        gating = _vector(gate + sample * gate_stride, column, C)[None, :]
    if closing_weight is not None:
        closing = _vector(closing_weight, column, C)[None, :]
    start, tokens = _span(offsets, sample, tokens)
    base = (start + first) * C
    for step in tl.range(0, CHUNK // ROWS, num_stages=2):
        row = step * ROWS + tl.arange(0, ROWS)
        inside = (first + row < tokens)[:, None] & (column < C)[None, :]
        place = base + row[:, None] * C + column[None, :]
        v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if branch is not None:
            b = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                b *= gating
            v += b
            if closing_weight is not None:
                v, _ = _statistics(v, inside, eps, C, False)
                v *= closing
            # The norm reads the rounded stream, as the backward pass and the next operator will.
            rounded = v.to(x.dtype.element_ty)
            tl.store(residual + place, rounded, mask=inside)
            v = rounded.to(tl.float32)
        v, _ = _statistics(v, inside, eps, C, LAYER)
        v *= factor[None, :]
        if bias is not None or shift is not None:
            v += offset[None, :]
        tl.store(normed + place, v, mask=inside)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _backward_kernel(
    grad_residual, grad_normed, x, branch, gate, closing_weight, weight, scale, grad_x, grad_branch, partials, offsets,
    tokens, chunks, gate_stride, scale_stride, eps,
    C: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """x is the normed stream (the residual, where there is a branch), or with a closing norm that before the gate: it
    lives anyway, as the input of an earlier operator, and the gated sum is cheaper to repeat than to keep.
    A branch without a gate is not read: its gradient is that of x.
    """
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    column = tl.arange(0, BLOCK_C)
    factor = _factor(weight, scale, sample * scale_stride, column, C)
    unit_sum = tl.zeros([BLOCK_C], tl.float32)  # Σ grad · unit: scale and weight
    if OFFSET:
        grad_sum = tl.zeros([BLOCK_C], tl.float32)  # Σ grad: shift and bias
    if gate is not None:
        gating = _vector(gate + sample * gate_stride, column, C)[None, :]
        gate_sum = tl.zeros([BLOCK_C], tl.float32)
    if closing_weight is not None:
        closing = _vector(closing_weight, column, C)[None, :]
        closing_sum = tl.zeros([BLOCK_C], tl.float32)
    start, tokens = _span(offsets, sample, tokens)
    base = (start + first) * C
    for step in tl.range(0, CHUNK // ROWS, num_stages=3):
        row = step * ROWS + tl.arange(0, ROWS)
        inside = (first + row < tokens)[:, None] & (column < C)[None, :]
        place = base + row[:, None] * C + column[None, :]
        v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed + place, mask=inside, other=0.0).to(tl.float32)
        if grad_residual is not None:
            stream = tl.load(grad_residual + place, mask=inside, other=0.0).to(tl.float32)
        if branch is not None:
            b = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        if closing_weight is not None:
            closed_unit, closed_inverse = _statistics(v + gating * b, inside, eps, C, False)
            v = (closed_unit * closing).to(x.dtype.element_ty).to(tl.float32)
        if OFFSET:
            grad_sum += tl.sum(grad, axis=0)
        if LAYER:
            grad_v, unit = _layer_norm_backward(grad * factor[None, :], v, inside, eps, C)
            unit_sum += tl.sum(grad * unit, axis=0)
            grad = grad_v
        else:
            unit, inverse = _statistics(v, inside, eps, C, False)
            unit_sum += tl.sum(grad * unit, axis=0)
            grad = _rms_backward(grad * factor[None, :], unit, inverse, C)
        if grad_residual is not None:
            grad += stream
        if branch is not None:
            if closing_weight is not None:
                # Lanes beyond C hold no mean here: a closing norm is an RMSNorm, and so is the norm behind it.
                closing_sum += tl.sum(grad * closed_unit, axis=0)
                grad = _rms_backward(grad * closing, closed_unit, closed_inverse, C)
            gate_sum += tl.sum(grad * b, axis=0)
            tl.store(grad_branch + place, grad * gating, mask=inside)
        tl.store(grad_x + place, grad, mask=inside)
    partials += tl.program_id(0).to(tl.int64) * (PARTS * C) + column
    tl.store(partials, unit_sum, mask=column < C)
    if gate is not None:
        tl.store(partials + C, gate_sum, mask=column < C)
    if closing_weight is not None:
        tl.store(partials + 2 * C, closing_sum, mask=column < C)
    if OFFSET:
        tl.store(partials + (PARTS - 1) * C, grad_sum, mask=column < C)


@triton.jit
def _chunk_sum(partials, chunks, column, width, PARTS: tl.constexpr, CHUNKS: tl.constexpr):
    """Sum over the chunks of one sample and part, in their order: [columns]."""
    total = tl.zeros(column.shape, tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        tile = tl.load(partials + chunk[:, None] * (PARTS * width) + column[None, :], mask=inside, other=0.0)
        total += tl.sum(tile, axis=0)
    return total


@triton.jit(do_not_specialize=["chunks"])
def _sum_kernel(
    partials, weight, bias, scale, grad_gate, grad_shift, grad_scale, per_sample, chunks, width, scale_stride,
    CLOSING: tl.constexpr, OFFSET: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Per-sample gradients of the modulation, and each sample's share [B, 2, C] of the weight and of the closing
    weight or the bias, of which a form has one at most."""
    blocks = tl.cdiv(width, COLUMNS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    partials += sample * chunks * (PARTS * width)
    place = sample * width + column
    unit_sum = _chunk_sum(partials, chunks, column, width, PARTS, CHUNKS)
    slope = unit_sum
    if weight is not None:
        slope *= _vector(weight, column, width)
    if per_sample is not None:
        modulation = 1.0 + _vector(scale + sample * scale_stride, column, width)
        per_sample += sample * (2 * width) + column
        tl.store(per_sample, unit_sum * modulation, mask=inside)
    if OFFSET:
        grad_sum = _chunk_sum(partials + (PARTS - 1) * width, chunks, column, width, PARTS, CHUNKS)
        if grad_shift is not None:
            tl.store(grad_shift + place, grad_sum, mask=inside)
        if bias is not None:
            slope += grad_sum * _vector(bias, column, width)
            tl.store(per_sample + width, grad_sum * modulation, mask=inside)
    tl.store(grad_scale + place, slope, mask=inside)
    if grad_gate is not None:
        tl.store(grad_gate + place, _chunk_sum(partials + width, chunks, column, width, PARTS, CHUNKS), mask=inside)
    if CLOSING:
        closing_sum = _chunk_sum(partials + 2 * width, chunks, column, width, PARTS, CHUNKS)
        tl.store(per_sample + width, closing_sum, mask=inside)


def _stride(term: Tensor | None) -> int:
    return 0 if term is None else term.stride(0)


def _sizes(x: Tensor, offsets: Tensor | None, longest: int) -> tuple[int, int, int]:
    """(samples, tokens of the longest, width)."""
    batch, tokens, width = x.shape
    return (batch, tokens, width) if offsets is None else (offsets.numel() - 1, longest, width)


def forward(
    x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest, eps, layer
) -> tuple[Tensor | None, Tensor]:
    """(residual or None, normed), as `adaln_reference`."""
    batch, tokens, width = _sizes(x, offsets, longest)
    residual = None if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    launch = forward_launch(width)
    chunk = max(FORWARD_CHUNK, launch.rows)
    chunks = cdiv(tokens, chunk)
    if normed.numel():
        with device_of(x):
            _forward_kernel[(batch * chunks,)](
                x, branch, gate, closing_weight, weight, bias, shift, scale, residual, normed, offsets,
                tokens, chunks, _stride(gate), _stride(shift), _stride(scale), eps,
                C=width, LAYER=layer, BLOCK_C=launch.block, ROWS=launch.rows, CHUNK=chunk,
                num_warps=launch.warps,
            )  # fmt: skip
    return residual, normed


def backward(
    grad_residual, grad_normed, x, branch, gate, closing_weight, weight, bias, shift, scale, offsets, longest,
    eps, layer,
):  # fmt: skip
    """Gradients of (x, branch, gate, shift, scale) and, float32 [`vector_count`, C], of the vectors; None for what is
    None.

    x is the normed stream, or the stream before the gate where there is a closing norm. The gradient of a branch
    without a gate is None, too: it is that of x.
    """
    batch, tokens, width = _sizes(x, offsets, longest)
    launch = backward_launch(width, closing_weight is not None)
    chunk = max(backward_chunk(batch, tokens), launch.rows)
    chunks = cdiv(tokens, chunk)
    offset = bias is not None or shift is not None
    parts = 1 + (gate is not None) + (closing_weight is not None) + offset
    grad_x = torch.empty_like(x)
    grad_branch = None if gate is None else torch.empty_like(x)
    terms = [None if term is None else torch.empty_like(term, memory_format=torch.contiguous_format)
             for term in (gate, shift, scale)]  # fmt: skip
    partials = x.new_empty(batch, chunks, parts, width, dtype=torch.float32)
    vectors = vector_count(weight, closing_weight, bias)
    per_sample = sums = None
    if scale is not None and vectors:
        per_sample = x.new_empty(batch, 2, width, dtype=torch.float32)
    with device_of(x):
        if batch * chunks:  # also without tokens: what is summed below is written here
            _backward_kernel[(batch * chunks,)](
                grad_residual, grad_normed, x, None if gate is None else branch, gate, closing_weight, weight, scale,
                grad_x, grad_branch, partials, offsets, tokens, chunks, _stride(gate), _stride(scale), eps,
                C=width, LAYER=layer, OFFSET=offset, PARTS=parts, BLOCK_C=launch.block, ROWS=launch.rows,
                CHUNK=chunk, num_warps=launch.warps,
            )  # fmt: skip
        if batch and scale is not None:
            _sum_kernel[(batch * cdiv(width, SUM_COLUMNS),)](
                partials, weight, bias, scale, *terms, per_sample, chunks, width, _stride(scale),
                CLOSING=closing_weight is not None, OFFSET=offset, PARTS=parts,
                COLUMNS=SUM_COLUMNS, CHUNKS=SUM_CHUNKS, num_warps=4,
            )  # fmt: skip
    if vectors:
        # The sum over samples is PyTorch's, which is deterministic too, and one launch for both vectors. Without
        # modulation nothing is summed by sample.
        sums = (partials.flatten(0, 1) if scale is None else per_sample)[:, :vectors].sum(0)
    return grad_x, grad_branch, *terms, sums


def vector_count(weight: Tensor | None, closing_weight: Tensor | None, bias: Tensor | None) -> int:
    """Rows of the vectors' gradients: the first is the weight's, the second the closing weight's or the bias's."""
    return 2 if closing_weight is not None or bias is not None else int(weight is not None)


def aot_specialisations() -> list[Specialisation]:
    """bfloat16 with float32 weights: the RMS forms at C = 768, 1024 and 1152, and with samples of different lengths
    (packed) at 384; the LayerNorm forms (without weight and bias, as in DiT) at 1152, and without modulation (but with
    both) at the decoders' 384, 768 and 1024. A form's sum kernel takes any width, and samples of any lengths."""
    forms = {
        "rms_norm": {"widths": (768, 1024, 1152)},
        "gated_rms_norm": {"widths": (768, 1024, 1152), "gated": True},
        "block_boundary": {"widths": (768, 1024, 1152), "gated": True, "closing": True},
        "packed_rms_norm": {"widths": (384,), "packed": True},
        "packed_gated_rms_norm": {"widths": (384,), "packed": True, "gated": True},
        "packed_block_boundary": {"widths": (384,), "packed": True, "gated": True, "closing": True},
        "layer_norm": {"widths": (1152,), "layer": True},
        "gated_layer_norm": {"widths": (1152,), "layer": True, "gated": True},
        "affine_layer_norm": {"widths": (384, 768, 1024), "layer": True, "affine": True},
        "residual_layer_norm": {"widths": (384, 768, 1024), "layer": True, "affine": True, "residual": True},
    }
    return [entry for name, form in forms.items() for entry in _specialise(name, **form)]


def _specialise(
    form: str, widths: tuple[int, ...], *, layer=False, gated=False, closing=False, packed=False, affine=False,
    residual=False,
) -> list[Specialisation]:
    streams = ("x", "branch", "residual", "normed", "grad_residual", "grad_normed", "grad_x", "grad_branch")
    terms = ("gate", "shift", "scale", "grad_gate", "grad_shift", "grad_scale")
    types = dict.fromkeys(streams + terms, "*bf16")
    types |= dict.fromkeys(("closing_weight", "weight", "bias", "partials", "per_sample"), "*fp32")
    types |= dict.fromkeys(("tokens", "chunks", "width"), "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(("gate_stride", "shift_stride", "scale_stride"), "i32") | {"offsets": "*i32"}
    absent = set() if packed else {"offsets"}
    if affine:
        absent |= {"shift", "scale"}
    else:
        absent |= {"bias"} | ({"weight", "per_sample"} if layer else set())
    if not gated:
        absent |= {"gate", "grad_branch", "grad_gate"}
        absent |= set() if residual else {"branch", "residual", "grad_residual"}
    if not closing:
        absent |= {"closing_weight"}

    def entry(name, kernel, constants, **options):
        unread = {"branch"} if kernel is _backward_kernel and not gated else set()
        constants = constants | {argument: None for argument in kernel.arg_names if argument in absent | unread}
        arguments = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        aligned = tuple(a for a, t in arguments.items() if t.startswith("*") or a.endswith("_stride") or a == "width")
        return Specialisation(f"{form}_{name}", kernel, arguments, constants, aligned=aligned, **options)

    sums = {"OFFSET": True, "PARTS": 2 + gated + closing}
    columns = {"CLOSING": closing, "COLUMNS": SUM_COLUMNS, "CHUNKS": SUM_CHUNKS}
    found = []
    if not packed and not affine:  # sums lie behind one another either way; without modulation PyTorch adds them up
        found.append(entry("sum_bf16", _sum_kernel, columns | sums, num_warps=4, max_registers=64, store_bytes=2))
    for width in widths:
        norm = {"C": width, "LAYER": layer}
        # Prediction for an H200: 6 programs of 4 warps a multiprocessor at 80 registers, 4 at 128; with one tile of
        # 16 numbers a thread fetched ahead, or two of 8, they have 32 KiB and more in flight, where 4.3 TB/s at
        # 0.8 µs, read and written, need 26. At 1152, 3 programs at 128 and 2 at 240 have as much.
        launch = forward_launch(width)
        found.append(
            entry(
                f"forward_bf16_{width}",
                _forward_kernel,
                norm | {"BLOCK_C": launch.block, "ROWS": launch.rows, "CHUNK": FORWARD_CHUNK},
                num_warps=launch.warps,
                max_registers=80 if launch.rows > 1 else 128,
            )
        )
        launch = backward_launch(width, closing)
        # The block boundary takes 128, or up to 154 by some versions of Triton and capabilities. Three programs of 4
        # warps instead of four then have 48 KiB in flight; but of 8 warps one would fit instead of two.
        fitting = 240 if launch.block > 256 * launch.warps else 160 if closing and launch.warps <= 4 else 128
        found.append(
            entry(
                f"backward_bf16_{width}",
                _backward_kernel,
                norm | sums | {"BLOCK_C": launch.block, "ROWS": launch.rows, "CHUNK": AHEAD_CHUNK},
                num_warps=launch.warps,
                max_registers=fitting,
            )
        )
    return found
