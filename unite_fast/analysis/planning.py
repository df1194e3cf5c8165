"""Predicts a run before it starts: memory, micro-batch, seconds a step, epochs, GPU-hours, share of communication.

A step is compute, then communication, then the update. Two things overlap: under ZeRO 0 to 2 gradients travel in
windows while the last backward still runs, under ZeRO 1 and 2 updated weights while the next step's forward already
does. Compute and update are the counted floor over an efficiency; communication is the α–β model of ring and tree
algorithms (Thakur et al. 2005) on stated links. Nothing in a step makes the host wait, so it runs ahead, collectives
included, and a step takes the longer of all that and of launching its kernels; how far the driver lets it run ahead is
not modelled. `unite_fast.analysis.simulation` plays the same step message by message.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

from unite_fast.analysis.chunks import chunk_in_room, neutral_fits
from unite_fast.analysis.counts import repeats
from unite_fast.analysis.devices import GPUS, Gpu, Network
from unite_fast.analysis.extent import Extent, Population
from unite_fast.analysis.launches import LAUNCH_SECONDS, host_seconds
from unite_fast.analysis.memory import Memory, predict
from unite_fast.analysis.overlap import arrivals, departures
from unite_fast.analysis.parts import Rates
from unite_fast.analysis.update import UPDATED, Collective, collectives, flow_passes, update_part
from unite_fast.config import Config
from unite_fast.engine.batch import Batch, micro_batch_candidates, resolve_batch
from unite_fast.errors import UserError
from unite_fast.modality import counted_operations, modality_of

# No training step has been timed on a GPU yet. The project's goals on one H200 (430 images/s for B and 150 for L at
# S = 3, 165 and 49 at S = 14) are 0.71 to 0.77 of the counted floor, and this is what they ask for.
ASSUMED_EFFICIENCY = 0.75
# Left for the CUDA context, NCCL's buffers and the allocator's fragmentation: an assumption.
USABLE_MEMORY = 0.92


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; of gradients and weights what the last backward and the next forward do not hide.

    Attributes:
        host: what the host takes meanwhile to launch the step's kernels; 0 where launches are not counted.
    """

    compute: float
    gradients: float
    exchange: float
    weights: float
    update: float
    host: float

    @property
    def launching(self) -> float:
        """What the step takes longer because of the host."""
        return max(0.0, self.host - self.compute - self.communication - self.update)

    @property
    def communication(self) -> float:
        return self.gradients + self.exchange + self.weights

    @property
    def total(self) -> float:
        return self.compute + self.launching + self.communication + self.update


@dataclass(frozen=True)
class Plan:
    """A run as predicted.

    Attributes:
        stage: ZeRO stage. optimizer: "muon", or "adamw" under stage 3.
        ranks: GPUs. global_batch, micro_batch, accumulation: samples, samples, micro-batches.
        draws_per_chunk: flow draws in one forward and backward.
        extent: of a micro-batch in the mean.
        memory: of a rank, on the busiest micro-batch. fits: whether it does.
        seconds: of a step.
        mfu: counted operations a second over the device's stated peak in bfloat16, under train.fp8 as well.
    """

    stage: int
    optimizer: str
    ranks: int
    global_batch: int
    micro_batch: int
    accumulation: int
    draws_per_chunk: int
    extent: Extent
    memory: Memory
    fits: bool
    seconds: StepTime
    mfu: float

    @property
    def samples_per_second(self) -> float:
        return self.global_batch / self.seconds.total

    def epoch_hours(self, samples: int) -> float:
        return samples / self.samples_per_second / 3600


def plan(
    config: Config,
    gpu: Gpu,
    network: Network,
    *,
    ranks: int,
    stage: int,
    efficiency: float = ASSUMED_EFFICIENCY,
    launch: float = LAUNCH_SECONDS,
    population: Population | None = None,
) -> Plan:
    """One line of the plan.

    Args:
        config: the run. A global batch that it gives is kept whatever the number of ranks; of micro-batch `auto` the
            largest that fits is taken, with the largest samples that could come, and then of draws_per_chunk `auto` the
            largest beside it, as the trainer measures both.
        ranks: GPUs.
        stage: ZeRO stage; 3 trains with AdamW, since Muon needs whole matrices, and without FP8 and torch.compile,
            which it refuses.
        efficiency: of compute and update, as a share of the counted floor.
        launch: seconds that the launch of a kernel takes the host.
        population: its training samples; those of `Modality.population` if None.

    Raises:
        UserError: the ranks cannot share the global batch, or train.fp8 is on and the GPU has no FP8.
    """
    if config.train.fp8 and gpu.fp8 is None:
        raise UserError(
            f"train.fp8 needs a GPU with FP8 products ({', '.join(other.name for other in GPUS if other.fp8)}), "
            f"{gpu.name} has none: set train.fp8 to false"
        )
    train, optimizer = config.train.model_copy(update={"zero_stage": stage}), config.optimizer
    if stage == 3:
        train = train.model_copy(update={"fp8": False, "compile": False})
        optimizer = optimizer.model_copy(update={"kind": "adamw"})
    config = config.model_copy(update={"optimizer": optimizer, "train": train})
    if train.micro_batch == "auto":
        batches = [resolve_batch(train, ranks, size) for size in reversed(micro_batch_candidates(train, ranks))]
    else:
        batches = [resolve_batch(train, ranks)]
    modality = modality_of(config)
    population = population or modality.population(config)

    room = gpu.memory * USABLE_MEMORY

    def fits(batch: Batch) -> bool:
        return neutral_fits(config, modality.largest(config, batch.micro_batch), room, ranks=ranks, stage=stage)

    micro, accumulation, total = next((b for b in batches[:-1] if fits(b)), batches[-1])
    config = chunk_in_room(config, modality.largest(config, micro), room, ranks=ranks, stage=stage)
    held = predict(config, extent=population.busiest(micro), ranks=ranks, stage=stage, single=accumulation == 1)
    extent = population.mean(micro)
    seconds = step_time(config, gpu.rates, network, ranks, stage, extent, accumulation, efficiency, launch)
    operations = counted_operations(config, extent) * accumulation
    return Plan(
        stage, config.optimizer.kind, ranks, total, micro, accumulation, config.objective.chunk, extent, held,
        held.peak <= room, seconds, operations / seconds.total / gpu.matmul,
    )  # fmt: skip


def step_time(
    config: Config,
    rates: Rates,
    network: Network,
    ranks: int,
    stage: int,
    extent: Extent,
    accumulation: int,
    efficiency: float,
    launch: float,
) -> StepTime:
    """Seconds of one optimizer step of `accumulation` micro-batches of that extent, by what it does."""
    gradients = exchange = weights = 0.0
    if ranks > 1 and stage < 3:
        backward = last_backward(config, rates, extent) / efficiency
        gradients = left_of_reduction(config, network, ranks, stage, backward)
    if ranks > 1 and stage in (1, 2):
        weights = left_of_gather(config, rates, network, ranks, extent, efficiency)
    for collective in collectives(config, ranks=ranks, accumulation=accumulation, stage=stage):
        if stage < 3 and collective.what in ("gradients", *UPDATED):
            continue
        seconds = collective_time(collective, ranks, network)
        if collective.kind == "all_to_all":
            exchange += seconds
        elif collective.kind == "all_gather":
            weights += seconds
        else:
            gradients += seconds
    update = update_part(config.model, config.optimizer, stage=stage, ranks=ranks).floor(1, rates)[0]
    compute = accumulation * compute_time(config, rates, extent)
    host = host_seconds(config, accumulation, launch)
    return StepTime(compute / efficiency, gradients, exchange, weights, update / efficiency, host)


def compute_time(config: Config, rates: Rates, extent: Extent) -> float:
    """Floor of both passes of one micro-batch, seconds."""
    objective = config.objective
    passes = flow_passes(config)
    seconds = 0.0
    counted = modality_of(config).counted(config, extent, dtype="bf16", device="cuda")
    for name, (part, samples) in counted.items():
        if name == "denoise":
            draws = repeats(name, objective) / passes  # the last chunk may be smaller; the mean costs the same
            seconds += passes * sum(part.floor(samples * draws, rates))
        else:
            seconds += sum(part.floor(samples, rates))
    return seconds


def fp8_share(config: Config, extent: Extent) -> float:
    """Share of the operations of both passes on micro-batches of this extent that run in FP8; 0 without train.fp8."""
    counted = modality_of(config).counted(config, extent, dtype="bf16", device="cuda")
    taken = sum(part.in_fp8 * n * repeats(name, config.objective) for name, (part, n) in counted.items())
    return taken / counted_operations(config, extent)


def last_backward(config: Config, rates: Rates, extent: Extent) -> float:
    """Floor of the last backward of an optimizer step, seconds: a chunk of draws or pass one, whichever comes last."""
    counted = modality_of(config).counted(config, extent, dtype="bf16", device="cuda")
    if not config.objective.stop_gradient:
        return sum(part.floor(samples, rates)[1] for name, (part, samples) in counted.items() if name != "denoise")
    part, samples = counted["denoise"]
    return part.floor(samples * repeats("denoise", config.objective) / flow_passes(config), rates)[1]


def gradient_windows(config: Config, ranks: int, stage: int) -> list[tuple[float, Collective]]:
    """(share of the last backward after which it can leave, collective) of the windows of gradients, ZeRO 0 to 2."""
    phase = "flow" if config.objective.stop_gradient else "reconstruct"
    kind = "reduce_scatter" if stage else "all_reduce"
    leaving = departures(config.model, config.optimizer.kind, ranks=ranks, stage=stage, phase=phase)
    return [(after, Collective(kind, "gradients", elements, elements)) for after, elements in leaving]


def left_of_reduction(config: Config, network: Network, ranks: int, stage: int, backward: float) -> float:
    """Seconds that the reduction of the gradients goes on after a last backward of so many."""
    done = 0.0
    for after, window in gradient_windows(config, ranks, stage):
        done = max(done, after * backward) + collective_time(window, ranks, network)
    return done - backward


def needed_weights(
    config: Config, rates: Rates, extent: Extent, ranks: int, efficiency: float
) -> list[tuple[float, Collective]]:
    """(seconds after which a step's first forward reads them, collective) of the updated weights of ZeRO 1 and 2."""
    counted = modality_of(config).counted(config, extent, dtype="bf16", device="cuda")
    forward = {name: part.floor(samples, rates)[0] / efficiency for name, (part, samples) in counted.items()}
    found = []
    for (collective, _), part, before in arrivals(config, ranks=ranks):
        begin = forward["tokenize"] if part == "decode" else 0.0
        found.append((begin + before * forward[part], collective))
    return found


def left_of_gather(
    config: Config, rates: Rates, network: Network, ranks: int, extent: Extent, efficiency: float
) -> float:
    """Seconds for which a step's first forward waits for the weights that the step before has updated."""
    come = waited = 0.0
    for needed, collective in needed_weights(config, rates, extent, ranks, efficiency):
        come += collective_time(collective, ranks, network)
        waited = max(waited, come - needed)
    return waited


def collective_time(collective: Collective, ranks: int, network: Network) -> float:
    """Seconds of a collective over all ranks."""
    if ranks == 1:
        return 0.0
    hop, bandwidth = network.hop(ranks), network.bandwidth(ranks)
    size = collective.itemsize * collective.elements
    if collective.kind == "all_to_all":
        # Single messages from one GPU to one other: each has its own adapter to itself.
        link = network.node_link if ranks <= network.per_node else min(network.node_link, network.link)
        return collective.messages * hop + collective.itemsize * collective.busiest / (link * network.share)
    calls = collective.messages
    ring = (ranks - 1) * (hop + size / calls / ranks / bandwidth)
    if collective.kind != "all_reduce":
        return calls * ring
    return calls * min(2 * ring, tree_time(size / calls, ranks, hop, bandwidth))


def tree_time(size: float, ranks: int, hop: float, bandwidth: float) -> float:
    """A pipelined tree up and down (NCCL's choice for many ranks): bytes pass once each way, hops are log₂ n."""
    return 2 * (math.ceil(math.log2(ranks)) * hop + size / bandwidth)


SCALE = (8, 16, 32, 64, 128, 256, 512, 1024)
# Scaling is called broken where a GPU does less than this share of the work it does in the smallest run that fits.
BROKEN = 0.8


def scaling(
    config: Config,
    gpu: Gpu,
    network: Network,
    *,
    stage: int,
    efficiency: float = ASSUMED_EFFICIENCY,
    launch: float = LAUNCH_SECONDS,
    population: Population | None = None,
) -> list[Plan]:
    """The same run on 8 to 1,024 GPUs, as far as they can share its global batch."""
    plans = []
    population = population or modality_of(config).population(config)
    options = dict(efficiency=efficiency, launch=launch, population=population)
    for ranks in SCALE:
        with suppress(UserError):
            plans.append(plan(config, gpu, network, ranks=ranks, stage=stage, **options))
    return plans


LOSSES = {
    "compute": "small micro-batches, which read all weights for few samples",
    "launching": "launching kernels, as many for a few samples as for many",
    "gradients": "reducing the gradients behind the last backward",
    "exchange": "exchanging matrices for Muon",
    "weights": "gathering the weights",
    "update": "the update, whose largest matrix one rank orthogonalises alone",
}


def breaking_point(plans: list[Plan]) -> tuple[Plan, str] | None:
    """The first plan whose GPUs do less than BROKEN of the first plan's work each, and what took the time; or None.

    Plans that do not fit are no runs, and count as neither.
    """

    def a_sample(p: Plan, name: str) -> float:
        """GPU-seconds of a sample."""
        return getattr(p.seconds, name) * p.ranks / p.global_batch

    fitting = [p for p in plans if p.fits]
    for found in fitting[1:]:
        first = fitting[0]
        if a_sample(first, "total") / a_sample(found, "total") >= BROKEN:
            continue
        lost = {name: a_sample(found, name) - a_sample(first, name) for name in LOSSES}
        worst = max(lost, key=lost.get)
        all_lost = sum(seconds for seconds in lost.values() if seconds > 0)  # larger chunks may gain some back
        return found, f"{lost[worst] / all_lost:.0%} of the lost time is {LOSSES[worst]}"
    return None
