"""What an optimizer step costs beside the passes: Muon, AdamW and EMA, and what the ranks tell each other.

Counted for the engine as it is (unite_fast/engine): float32 weights, gradients, states and averages, Newton-Schulz and
what it reads and gives in the compute dtype; Muon's weights are swept once before it and once after it, averages
included; ZeRO 1 and 2 update a slice a rank and orthogonalise each matrix on one rank; gradients are reduced once an
optimizer step.
Sizes are elements unless a name says bytes; Ψ is the number of trained elements, n the number of ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

from unite_fast.analysis.parts import DTYPE_BYTES, Dtype, Op, Part
from unite_fast.config import Config, OptimizerConfig, Sizes
from unite_fast.engine.backend import autocast_dtype
from unite_fast.engine.deepspeed_backend import BUCKET_ELEMENTS, bucket_elements, read_in_bf16
from unite_fast.engine.optim import in_stages, matrix_shape, parameter_groups, stages
from unite_fast.engine.reduction import spans
from unite_fast.engine.sharding import MatrixExchange
from unite_fast.modality import modality
from unite_kernels.optim import in_gram

FP32 = 4  # bytes
EXCHANGED = DTYPE_BYTES["bf16"]  # of an element that crosses to its matrix's owner on GPUs, as Newton-Schulz computes
# DeepSpeed pads a flat group of ZeRO 1 and 2 to whole slices of an even number of elements.
SLICE_ALIGNMENT = 2
# What brings the updated weights together: most of them, and those among bfloat16 ones that are read in float32.
UPDATED = ("updated weights", "updated weights of float32")


class Weights(NamedTuple):
    """The trained parameters of a model.

    Attributes:
        matrices: [rows, columns] of what Muon updates, in the order in which the model reads them; empty under AdamW.
        adamw: elements of the rest.
        without_gradient: elements among them that no pass reads (published checkpoints carry them).
        reconstruct, flow: elements of each parameter that a pass of this name reads.
        reconstruct_layers, flow_layers: modules that hold them, which ZeRO 3 gathers one by one.
    """

    matrices: tuple[tuple[int, int], ...]
    adamw: int
    without_gradient: int
    reconstruct: tuple[int, ...]
    flow: tuple[int, ...]
    reconstruct_layers: int
    flow_layers: int

    @property
    def muon(self) -> int:
        """Elements that Muon updates."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def total(self) -> int:
        """Ψ."""
        return self.muon + self.adamw


@functools.cache
def network_of(model: Sizes) -> nn.Module:
    """The network of these sizes without memory for its weights; one for all callers, to look at."""
    with torch.device("meta"):
        return modality(model.modality).network(model)


def reads(model: Sizes, phase: str, name: str) -> bool:
    """Whether the pass "reconstruct" or "flow" reads the parameter of this name."""
    if phase == "reconstruct":
        return not name.startswith("denoiser")
    return name.startswith(("encoder.", "latent_norm.") if model.shared else ("denoiser.", "denoiser_norm."))


@functools.cache
def trained_weights(model: Sizes, kind: str) -> Weights:
    """Sizes of a model's parameters under the optimizer `kind`, "muon" or "adamw"; allocates none."""
    built = network_of(model)
    groups = parameter_groups(built, kind)
    sizes = {name: p.numel() for name, p in built.named_parameters()}
    read = {phase: [name for name in sizes if reads(model, phase, name)] for phase in ("reconstruct", "flow")}
    layers = {phase: len({name.rpartition(".")[0] for name in names}) for phase, names in read.items()}
    return Weights(
        tuple(matrix_shape(p.shape) for p in groups.get("muon", {}).values()),
        sum(p.numel() for p in groups.get("adamw", {}).values()),
        sum(size for name, size in sizes.items() if name.endswith("time.special")),
        *(tuple(sizes[name] for name in names) for names in read.values()),
        *layers.values(),
    )


def newton_schulz_operations(rows: int, columns: int, steps: int, dtype: Dtype = "bf16") -> int:
    """Operations of the orthogonalisation of one matrix: three products a step, the Gram matrix on the short side.

    In float32 a few steps of long matrices take four products each of the Gram matrix alone, as
    `unite_kernels.newton_schulz` does.
    Symmetric products count in full, though kernels/cpu.c computes half of them: on a CPU it can take less time than
    the counted operations do at the rate of a large product.
    """
    short, long = sorted((rows, columns))
    if dtype == "fp32" and in_gram(short, long, steps):
        # The first step has no product to continue, the last no Gram matrix to prepare.
        return 4 * short * short * long + (8 * steps - 6) * short**3
    return steps * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)


def newton_schulz_op(rows: int, columns: int, steps: int, dtype: Dtype = "bf16") -> Op:
    """The orthogonalisation of one matrix."""
    short, long = sorted((rows, columns))
    # A step reads X twice and writes it, writes the Gram matrix and its polynomial and reads each once.
    moved = steps * DTYPE_BYTES[dtype] * (3 * short * long + 4 * short * short)
    operations = newton_schulz_operations(rows, columns, steps, dtype)
    return Op("Newton-Schulz", forward=operations, forward_bytes=moved)


def slice_elements(elements: int, ranks: int) -> int:
    """Elements of one rank's slice of a flat group under ZeRO 1 and 2."""
    return math.ceil(elements / (ranks * SLICE_ALIGNMENT)) * SLICE_ALIGNMENT


def flat_slices(weights: Weights, ranks: int) -> list[int]:
    """Elements of a rank's slice of each flat group of ZeRO 1 and 2."""
    found = [exchange.partition for exchange in exchanges(weights.matrices, ranks)] if weights.matrices else []
    return found + ([slice_elements(weights.adamw, ranks)] if weights.adamw else [])


def window_elements(weights: Weights, ranks: int, stage: int) -> list[int]:
    """Elements of each window in which ZeRO 0 to 2 reduce the gradients, all ranks' shares together."""
    parts, slices = (ranks, flat_slices(weights, ranks)) if stage else (1, [weights.muon, weights.adamw])
    bucket = bucket_elements(ranks, weights.total)
    return [parts * length for size in slices for _, length in spans(size, parts, bucket)]


def update_part(
    model: Sizes, optimizer: OptimizerConfig, *, stage: int = 0, ranks: int = 1, dtype: Dtype = "bf16"
) -> Part:
    """Clipping, Muon, AdamW and EMA of one optimizer step on the busiest rank, as a part with a forward only."""
    weights, itemsize = trained_weights(model, optimizer.kind), DTYPE_BYTES[dtype]
    share = 1 if stage == 0 else ranks
    mine, held = list(weights.matrices), weights.muon
    if share > 1 and weights.matrices:
        held = sum(exchange.partition for exchange in exchanges(weights.matrices, ranks))
        mine = _busiest(weights.matrices, ranks)
    adamw = math.ceil(weights.adamw / share)
    averages = 1 + len(optimizer.ema_decays)
    ops = [Op("gradient norm", forward_bytes=FP32 * (held + adamw))]
    if weights.matrices:
        # Gradient and momentum read, momentum and mean written.
        ops.append(Op("clip, momentum, Nesterov", forward_bytes=(3 * FP32 + itemsize) * held))
        if share > 1:  # into batches, back into a slice that was zeroed
            ops.append(Op("matrices of slices", forward_bytes=5 * itemsize * held))
        elements = sum(rows * columns for rows, columns in mine)
        ops.append(Op("normalisation", forward_bytes=3 * itemsize * elements))  # read for the norm, read, written
        ops += [newton_schulz_op(*shape, optimizer.newton_schulz_steps, dtype) for shape in mine]
        tall = sum(rows * columns for rows, columns in mine if rows > columns)
        ops.append(Op("tall matrices turned back", forward_bytes=2 * itemsize * tall))
        ops.append(Op("Muon's step and EMA", forward_bytes=(itemsize + 2 * FP32 * (1 + averages)) * held))
    # Gradients scaled, then the step; the average on its own.
    ops.append(Op("AdamW", forward_bytes=(2 + 7) * FP32 * adamw))
    ops.append(Op("EMA of AdamW's", forward_bytes=3 * FP32 * adamw * averages))
    return Part("update", tuple(ops), False, itemsize)


def _busiest(matrices: tuple[tuple[int, int], ...], ranks: int) -> list[tuple[int, int]]:
    owned: dict[int, list[tuple[int, int]]] = {}
    for exchange in exchanges(matrices, ranks):
        for owner, shape in zip(exchange.owners, exchange.shapes, strict=True):
            owned.setdefault(owner, []).append(shape)
    return max(owned.values(), key=lambda shapes: sum(newton_schulz_operations(*shape, 1) for shape in shapes))


def flat_matrices(matrices: tuple[tuple[int, int], ...]) -> list[list[tuple[int, int]]]:
    """The matrices of each flat group of ZeRO 1 and 2, in flat order."""
    groups = stages([rows * columns for rows, columns in matrices])
    return [[matrices[index] for index in group] for group in groups]


@functools.cache
def exchanges(matrices: tuple[tuple[int, int], ...], ranks: int) -> tuple[MatrixExchange, ...]:
    """Which rank orthogonalises which matrix, for each flat group."""
    load, found = [0] * ranks, []
    for group in flat_matrices(matrices):
        partition = slice_elements(sum(rows * columns for rows, columns in group), ranks)
        found.append(MatrixExchange(group, partition, 0, ranks, load))
    return tuple(found)


class Collective(NamedTuple):
    """One kind of communication of an optimizer step.

    Attributes:
        kind: "all_reduce", "reduce_scatter", "all_gather" or "all_to_all".
        what: it carries.
        elements: of the whole tensor (summed over calls); of "all_to_all" what all ranks together send.
        busiest: elements that the busiest rank sends or receives; of "all_to_all" alone not given by `elements`.
        messages: calls, each with all hops of the collective's algorithm; of "all_to_all" the busiest rank's sends.
        itemsize: bytes of an element.
    """

    kind: str
    what: str
    elements: int
    busiest: int
    messages: int = 1
    itemsize: int = FP32


class Gathered(NamedTuple):
    """Updated weights on their way to all ranks.

    Attributes:
        collective: that carries them.
        names: of the parameters that are read only behind it.
    """

    collective: Collective
    names: tuple[str, ...]


def gathered_weights(config: Config, *, ranks: int, device: Literal["cuda", "cpu"] = "cuda") -> tuple[Gathered, ...]:
    """What brings the updated weights together under ZeRO 1 and 2, in the order in which the engine sends it."""
    autocast = autocast_dtype(config, torch.device(device)) if ranks > 1 else None
    return _gathered(config.model, config.optimizer.kind, ranks, autocast, config.train.fp8)


@functools.cache
def _gathered(
    model: Sizes, kind: str, ranks: int, autocast: torch.dtype | None, fp8: bool
) -> tuple[Gathered, ...]:
    built = network_of(model)
    groups = in_stages(list(parameter_groups(built, kind).items()))
    rounded = read_in_bf16(built, groups, autocast, fp8=fp8)
    found, exact = [], {}
    for _, group in reversed(groups):  # AdamW's are behind Muon's, and those that are read first are last
        narrow = not rounded.isdisjoint(group)
        elements = ranks * slice_elements(sum(parameter.numel() for parameter in group.values()), ranks)
        itemsize = DTYPE_BYTES["bf16"] if narrow else FP32
        carried = Collective("all_gather", UPDATED[0], elements, elements, itemsize=itemsize)
        found.append(Gathered(carried, tuple(group)))
        exact |= {name: p.numel() for name, p in group.items() if narrow and name not in rounded}
    if exact:
        carried = _whole("all_reduce", UPDATED[1], sum(exact.values()), 1)
        found.insert(0, Gathered(carried, tuple(exact)))
    return tuple(found)


def collectives(
    config: Config,
    *,
    ranks: int,
    accumulation: int = 1,
    stage: int | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> list[Collective]:
    """Everything that crosses between ranks in one optimizer step.

    Under ZeRO 3 every pass gathers the parameters that it reads, before its forward and again before its backward;
    DeepSpeed keeps some of them for the next pass where memory allows, so this is the most that it sends.

    Args:
        config: model, draws, optimizer.
        ranks: n.
        accumulation: micro-batches an optimizer step.
        stage: ZeRO stage; the configuration's if None.
        device: of the ranks, which says what train.precision "auto" is.
    """
    stage = config.train.zero_stage if stage is None else stage
    weights = trained_weights(config.model, config.optimizer.kind)
    if ranks == 1:
        return []
    if stage == 0:
        return [_whole("all_reduce", "gradients", weights.total, len(window_elements(weights, ranks, stage)))]
    norm = _whole("all_reduce", "gradient norm", 1)
    if stage == 3:
        passes = [weights.reconstruct] + [weights.flow] * flow_passes(config)
        gathered = 2 * accumulation * sum(math.ceil(size / ranks) * ranks for sizes in passes for size in sizes)
        calls = 2 * accumulation * (weights.reconstruct_layers + flow_passes(config) * weights.flow_layers)
        return [
            _whole("all_gather", "parameters of each pass", gathered, calls),
            _whole("reduce_scatter", "gradients", weights.total - weights.without_gradient),
            norm,
        ]
    flat = ranks * sum(flat_slices(weights, ranks))
    found = [_whole("reduce_scatter", "gradients", flat, len(window_elements(weights, ranks, stage))), norm]
    if weights.matrices:
        total, busiest, messages = exchange_elements(weights.matrices, ranks)
        if total:
            found += [
                Collective("all_to_all", f"pieces of matrices {way}", total, busiest, messages, EXCHANGED)
                for way in ("to their owner", "back")
            ]
    return found + [gathered.collective for gathered in gathered_weights(config, ranks=ranks, device=device)]


def flow_passes(config: Config) -> int:
    """Forward passes of the denoiser in one micro-batch."""
    return math.ceil(config.objective.flow_draws / config.objective.chunk)


def _whole(kind: str, what: str, elements: int, messages: int | None = None) -> Collective:
    """Of a whole tensor, in calls of at most BUCKET_ELEMENTS unless their number is given."""
    return Collective(kind, what, elements, elements, messages or math.ceil(elements / BUCKET_ELEMENTS))


def travelling(matrices: tuple[tuple[int, int], ...], ranks: int) -> Iterator[tuple[int, int, int]]:
    """(holder, owner, elements) of every piece of a matrix that its holder does not orthogonalise itself."""
    for exchange in exchanges(matrices, ranks):
        partition, begin = exchange.partition, 0
        for owner, (rows, columns) in zip(exchange.owners, exchange.shapes, strict=True):
            end = begin + rows * columns
            for holder in range(begin // partition, (end - 1) // partition + 1):
                if holder != owner:
                    yield holder, owner, min(end, (holder + 1) * partition) - max(begin, holder * partition)
            begin = end


@functools.cache
def exchange_elements(matrices: tuple[tuple[int, int], ...], ranks: int) -> tuple[int, int, int]:
    """(all, busiest rank's, its messages): elements of matrices that leave their holder for the one rank that
    orthogonalises them. The way back is the same, with senders and receivers exchanged.
    """
    sent, received, messages = [0] * ranks, [0] * ranks, [0] * ranks
    for holder, owner, elements in travelling(matrices, ranks):
        sent[holder] += elements
        received[owner] += elements
        messages[holder] += 1
        messages[owner] += 1
    return sum(sent), max(*sent, *received), max(messages)
