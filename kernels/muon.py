"""Muon's two sweeps over all weights, before and behind Newton–Schulz, each over many tensors in one launch.

Before it: clipping, momentum and the Nesterov mean, written where Newton–Schulz reads. After it: decay, step and the
moving averages of the weights. What a weight costs is then what must be read and written, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import (
    NAMESPACE,
    cdiv,
    check_contiguous,
    check_device,
    check_floats,
    check_tensors,
    device_of,
    upload,
    use_triton,
)
from .specialisation import Specialisation
from .toolchain import tl, triton

# Elements of a program's tile at 4 warps: 8 a thread, two 16-byte accesses in float32. A program goes over four tiles,
# so that finding its tensor (about seven dependent loads for the 115 matrices of preset B) stands beside 56 KiB moved.
# Prediction for an H200: 9 programs a multiprocessor (56 registers a thread), 72 KiB of loads in flight.
TILE = 1024
CHUNK = 4096
WARPS = 4
BEFORE, AFTER = 5, 4  # fields of a table's row; a moving average adds one


@triton.jit
def _row(table, tensors, FIELDS: tl.constexpr):
    """The row of the tensor that this program works on: the last one whose first program is not a later one."""
    program = tl.program_id(0).to(tl.int64)
    low = tensors * 0
    high = tensors
    while low + 1 < high:
        middle = (low + high) // 2
        later = tl.load(table + middle * FIELDS) > program
        low = tl.where(later, low, middle)
        high = tl.where(later, middle, high)
    return table + low * FIELDS


@triton.jit
def _at(field, begin, kind, ALIGNED: tl.constexpr):
    """The pointer that a field holds, of the type of `kind`, `begin` elements on."""
    pointer = tl.load(field).to(kind.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + begin


@triton.jit
def _lerp(a, b, weight):
    """a + weight (b − a) in the two forms of torch.lerp, exact at both ends."""
    step = b - a
    return tl.where(weight < 0.5, a + weight * step, b - step * (1.0 - weight))


@triton.jit
def _momentum_tile(gradient, buffer, mean, offset, inside, scale, momentum, share):
    g = tl.load(gradient + offset, mask=inside)
    if scale is not None:
        g *= scale
    m = _lerp(tl.load(buffer + offset, mask=inside), g, share)
    tl.store(buffer + offset, m, mask=inside)
    tl.store(mean + offset, _lerp(g, m, momentum), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _momentum_kernel(
    table, coefficient, full, low, tensors, momentum, share,
    FIELDS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row of the table: first program, elements, addresses of gradient, momentum and mean.

    `full` and `low` stand for the float32 tensors and the means, whose types they have; nothing is read from them.
    """
    row = _row(table, tensors, FIELDS)
    begin = (tl.program_id(0).to(tl.int64) - tl.load(row)) * CHUNK
    left = tl.load(row + 1) - begin
    gradient = _at(row + 2, begin, full, ALIGNED)
    buffer = _at(row + 3, begin, full, ALIGNED)
    mean = _at(row + 4, begin, low, ALIGNED)
    scale = None
    if coefficient is not None:
        scale = tl.load(coefficient)
    element = tl.arange(0, TILE)
    # A mask whose bound nobody knows forbids wide accesses, so only a tensor's last program has one.
    if left >= CHUNK:
        for tile in range(0, CHUNK, TILE):
            _momentum_tile(gradient, buffer, mean, tile + element, None, scale, momentum, share)
    else:
        for tile in range(0, left.to(tl.int32), TILE):
            offset = tile + element
            _momentum_tile(gradient, buffer, mean, offset, offset < left, scale, momentum, share)


@triton.jit
def _update_tile(
    row, begin, full, shares, parameter, update, offset, inside, keep, lr,
    AVERAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    p = keep * tl.load(parameter + offset, mask=inside)
    p -= lr * tl.load(update + offset, mask=inside).to(tl.float32)
    tl.store(parameter + offset, p, mask=inside)
    for index in tl.static_range(AVERAGES):
        average = _at(row + 4 + index, begin, full, ALIGNED) + offset
        share = tl.load(shares + index).to(tl.float64, bitcast=True).to(tl.float32)
        tl.store(average, _lerp(tl.load(average, mask=inside), p, share), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _update_kernel(
    table, full, low, tensors, keep, lr,
    AVERAGES: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row of the table: first program, elements, addresses of parameter, update and each average.

    Behind the rows stands the share of the weights in each average, as the bits of a float64: their number is any, and
    a kernel's arguments are fixed. `full` and `low` as in `_momentum_kernel`.
    """
    row = _row(table, tensors, FIELDS)
    shares = table + tensors * FIELDS
    begin = (tl.program_id(0).to(tl.int64) - tl.load(row)) * CHUNK
    left = tl.load(row + 1) - begin
    parameter = _at(row + 2, begin, full, ALIGNED)
    update = _at(row + 3, begin, low, ALIGNED)
    element = tl.arange(0, TILE)
    if left >= CHUNK:
        for tile in range(0, CHUNK, TILE):
            _update_tile(
                row, begin, full, shares, parameter, update, tile + element, None, keep, lr, AVERAGES, ALIGNED
            )
    else:
        for tile in range(0, left.to(tl.int32), TILE):
            offset = tile + element
            _update_tile(
                row, begin, full, shares, parameter, update, offset, offset < left, keep, lr, AVERAGES, ALIGNED
            )


def _table(columns: Sequence[Sequence[Tensor]], numbers: Sequence[float] = ()) -> tuple[Tensor, int, bool]:
    """What a kernel is told about its tensors, on their device; its programs; whether all addresses are of 16 bytes.

    Built anew for every launch, as gradients lie elsewhere after every backward; the copy waits for nothing.
    """
    rows, programs, aligned = [], 0, True
    for tensors in zip(*columns, strict=True):
        elements, addresses = tensors[0].numel(), [tensor.data_ptr() for tensor in tensors]
        rows.append([programs, elements, *addresses])
        programs += cdiv(elements, CHUNK)
        aligned = aligned and not any(address % 16 for address in addresses)
    bits = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
    table = torch.cat([torch.tensor(rows, dtype=torch.int64).flatten(), bits])
    return upload(table, columns[0][0].device), programs, aligned


@torch.library.custom_op(f"{NAMESPACE}::muon_momentum_", mutates_args=("momenta", "means"))
def _muon_momentum_(
    momenta: list[Tensor], gradients: list[Tensor], means: list[Tensor], momentum: float, coefficient: Tensor | None
) -> None:
    with device_of(momenta[0]):
        table, programs, aligned = _table([gradients, momenta, means])
        if programs:
            _momentum_kernel[(programs,)](
                table, coefficient, momenta[0], means[0], len(momenta), float(momentum), 1.0 - momentum,
                FIELDS=BEFORE, ALIGNED=aligned, CHUNK=CHUNK, TILE=TILE, num_warps=WARPS,
            )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::muon_update_", mutates_args=("params", "averages"))
def _muon_update_(
    params: list[Tensor], updates: list[Tensor], lr: float, weight_decay: float,
    averages: list[Tensor], decays: list[float],
) -> None:  # fmt: skip
    """`averages` are those of the first decay, then those of the second, …"""
    with device_of(params[0]):
        columns = [averages[start : start + len(params)] for start in range(0, len(averages), len(params))]
        table, programs, aligned = _table([params, updates, *columns], [1.0 - decay for decay in decays])
        if programs:
            _update_kernel[(programs,)](
                table, params[0], updates[0], len(params), 1.0 - lr * weight_decay, float(lr),
                AVERAGES=len(decays), FIELDS=AFTER + len(decays), ALIGNED=aligned, CHUNK=CHUNK, TILE=TILE,
                num_warps=WARPS,
            )  # fmt: skip


def aot_specialisations() -> list[Specialisation]:
    """Means and updates in bfloat16, as Newton–Schulz computes on CUDA; clipped, with one moving average and three."""
    tiles = {"ALIGNED": True, "CHUNK": CHUNK, "TILE": TILE}
    shared = {"table": "*i64", "full": "*fp32", "low": "*bf16", "tensors": "i32"}
    first = {"table": "*i64", "coefficient": "*fp32"} | shared | {"momentum": "fp32", "share": "fp32"}
    second = shared | {"keep": "fp32", "lr": "fp32"}
    pointers = ("table", "full", "low")
    return [
        Specialisation(
            "muon_momentum_bf16", _momentum_kernel, first, {"FIELDS": BEFORE} | tiles,
            num_warps=WARPS, aligned=(*pointers, "coefficient"), max_registers=56,
        ),
        *(
            Specialisation(
                f"muon_update_bf16_{count}", _update_kernel, second,
                {"AVERAGES": count, "FIELDS": AFTER + count} | tiles,
                num_warps=WARPS, aligned=pointers, max_registers=56,
            )
            for count in (1, 3)
        ),
    ]  # fmt: skip


def muon_momentum_reference(momenta, gradients, means, momentum, coefficient):
    """`muon_momentum_` in plain PyTorch, tensor by tensor: on a CPU what one operation wrote is then still in a cache
    for the next. The 39 matrices of the quickstart took 2.6 ms, as operations on the whole lists 4.1 ms."""
    for buffer, gradient, mean in zip(momenta, gradients, means, strict=True):
        work = mean.view_as(gradient) if mean.dtype == gradient.dtype else torch.empty_like(gradient)
        scaled = gradient if coefficient is None else torch.mul(gradient, coefficient, out=work)
        buffer.lerp_(scaled, 1.0 - momentum)
        torch.lerp(scaled, buffer, momentum, out=work)
        if mean.dtype != gradient.dtype:
            mean.copy_(work.view_as(mean))


@torch.no_grad()
def muon_momentum_(
    momenta: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    momentum: float,
    coefficient: Tensor | None = None,
) -> None:
    """What stands before Newton–Schulz in Muon (Jordan et al. 2024), over lists of tensors, in place.

    With g the clipped gradient, coefficient · gradient: momenta ← momenta + (1 − μ) (g − momenta), then
    means ← g + μ (momenta − g). Gradients stay as they are.

    Args:
        momenta, gradients: pairwise of one shape, float32, contiguous; of any size, a flat slice of all weights too.
        means: written; of as many elements as their gradients, contiguous, all of one floating dtype: what
            `newton_schulz` computes in, so that it casts nothing, and views of its batches [n, r, c], so that nothing
            has to be stacked.
        momentum: μ, in [0, 1].
        coefficient: 0-dim float32 on the device, which the host does not read: min(1, most / norm) clips to a global
            norm. None for 1.

    Raises:
        ValueError: different lengths, shapes or devices, strides, a momentum outside [0, 1].
        TypeError: another dtype.
    """
    operator = "muon_momentum_"
    _check_count(operator, "gradients", gradients, "momenta", momenta)
    _check_count(operator, "means", means, "momenta", momenta)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"{operator}: momentum is {momentum}; it must lie in [0, 1]")
    if not momenta:
        return
    _check_masters(operator, "momenta", momenta, momenta)
    _check_masters(operator, "gradients", gradients, momenta)
    _check_results(operator, "means", means, momenta)
    if coefficient is not None:
        check_tensors(operator, coefficient=coefficient)
        if coefficient.dim() or coefficient.dtype != torch.float32:
            raise ValueError(
                f"{operator}: coefficient is {coefficient.dtype} of shape {tuple(coefficient.shape)}; it must be 0-dim "
                "float32"
            )
        check_device(operator, "coefficient", coefficient, "momenta[0]", momenta[0])
    serve = _muon_momentum_ if use_triton(momenta[0]) else muon_momentum_reference
    serve(momenta, gradients, means, momentum, coefficient)


def muon_update_reference(params, updates, lr, weight_decay, averages, decays):
    """`muon_update_` in plain PyTorch, tensor by tensor as `muon_momentum_reference`."""
    for index, (parameter, update) in enumerate(zip(params, updates, strict=True)):
        if weight_decay:
            parameter.mul_(1.0 - lr * weight_decay)
        parameter.add_(update.view_as(parameter), alpha=-lr)
        for number, decay in enumerate(decays):
            averages[number * len(params) + index].lerp_(parameter, 1.0 - decay)


@torch.no_grad()
def muon_update_(
    params: list[Tensor],
    updates: list[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    averages: Sequence[list[Tensor]] = (),
    decays: Sequence[float] = (),
) -> None:
    """What stands behind Newton–Schulz in Muon, and moving averages of the weights, over lists of tensors, in place.

    params ← (1 − lr · weight_decay) · params − lr · updates, then for each decay
    averages ← decay · averages + (1 − decay) · params. The numbers may change with every call: no kernel is
    compiled again for them, and no device is waited for; torch.compile makes a new graph for each.

    Args:
        params: float32, contiguous; of any size, a flat slice of all weights too.
        updates: of as many elements as their parameters, contiguous, all of one floating dtype: what `newton_schulz`
            gave, scaled.
        lr, weight_decay: numbers on the host; the decay is decoupled (Loshchilov & Hutter 2019).
        averages: one list of tensors as params for each decay.
        decays: in [0, 1]; as many as averages.

    Raises:
        ValueError: different lengths, shapes or devices, strides, a decay outside [0, 1].
        TypeError: another dtype.
    """
    operator = "muon_update_"
    _check_count(operator, "updates", updates, "params", params)
    if len(averages) != len(decays):
        raise ValueError(f"{operator}: averages are {len(averages)} lists and decays {len(decays)}; give one for each")
    for number, (tensors, decay) in enumerate(zip(averages, decays, strict=True)):
        _check_count(operator, f"averages[{number}]", tensors, "params", params)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"{operator}: decays[{number}] is {decay}; it must lie in [0, 1]")
    if not params:
        return
    _check_masters(operator, "params", params, params)
    _check_results(operator, "updates", updates, params)
    for number, tensors in enumerate(averages):
        _check_masters(operator, f"averages[{number}]", tensors, params)
    serve = _muon_update_ if use_triton(params[0]) else muon_update_reference
    serve(params, updates, lr, weight_decay, [x for tensors in averages for x in tensors], list(decays))


def _check_count(operator: str, name: str, tensors: list[Tensor], first_name: str, first: list[Tensor]) -> None:
    if len(tensors) != len(first):
        raise ValueError(
            f"{operator}: {name} has {len(tensors)} tensors and {first_name} {len(first)}; give one for each"
        )


def _check_masters(operator: str, name: str, tensors: list[Tensor], first: list[Tensor]) -> None:
    """Float32 tensors of the shapes of the first list, contiguous, all on one device."""
    device = first[0].device
    for index, (tensor, like) in enumerate(zip(tensors, first, strict=True)):
        if not isinstance(tensor, Tensor):  # a weight without gradient, say
            check_tensors(operator, **{f"{name}[{index}]": tensor})
        if tensor.dtype != torch.float32:
            raise TypeError(f"{operator}: {name}[{index}] is {tensor.dtype}; it must be float32")
        if tensor.shape != like.shape:
            raise ValueError(
                f"{operator}: {name}[{index}] has shape {tuple(tensor.shape)}; it must be {tuple(like.shape)}"
            )
        # Hundreds of tensors a step: their names are made where one is refused.
        if tensor.device != device or not tensor.is_contiguous():
            _refuse_place(operator, f"{name}[{index}]", tensor, first[0])


def _check_results(operator: str, name: str, tensors: list[Tensor], first: list[Tensor]) -> None:
    """Tensors of one floating dtype with as many elements as those of the first list, contiguous, on their device."""
    check_floats(operator, f"{name}[0]", tensors[0])
    dtype, device = tensors[0].dtype, first[0].device
    for index, (tensor, like) in enumerate(zip(tensors, first, strict=True)):
        if tensor.dtype != dtype:
            raise TypeError(f"{operator}: {name}[{index}] is {tensor.dtype} and {name}[0] {dtype}; cast one of them")
        if tensor.numel() != like.numel():
            raise ValueError(
                f"{operator}: {name}[{index}] has shape {tuple(tensor.shape)}; it must have {like.numel()} elements"
            )
        if tensor.device != device or not tensor.is_contiguous():
            _refuse_place(operator, f"{name}[{index}]", tensor, first[0])


def _refuse_place(operator: str, name: str, tensor: Tensor, first: Tensor) -> None:
    check_device(operator, name, tensor, "the first tensor", first)
    check_contiguous(operator, name, tensor)
