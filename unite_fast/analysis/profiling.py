"""Where a training step's time and memory go, measured, beside the floor that counted operations and bytes set.

Each part runs alone, forward and backward, on inputs of the step's own size, so that a backward pass belongs to one
part; the whole step runs on the real engine, and what the parts do not explain is shown as such. The training step
itself carries no instrument.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unite_kernels as uk
from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.chunks import chunk_in_room, neutral_fits, resolve_chunk
from unite_fast.analysis.launches import step_launches
from unite_fast.analysis.parts import Rates
from unite_fast.analysis.planning import USABLE_MEMORY
from unite_fast.analysis.profiled_step import Feed, ProfiledStep, StepMemory, now
from unite_fast.analysis.update import flow_passes, update_part
from unite_fast.config import Config
from unite_fast.engine.agreement import check_precision
from unite_fast.engine.backend import autocast_dtype
from unite_fast.engine.batch import Batch, is_out_of_memory, micro_batch_candidates, resolve_batch
from unite_fast.engine.compiling import check_compile, compile_perceptual, compiled
from unite_fast.engine.fp8 import check_fp8, use_fp8
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.modality import Inputs, Modality, counted_operations, modality_of
from unite_fast.model.casts import one_micro_batch
from unite_fast.model.linear import linear_product
from unite_fast.objective.two_pass import TwoPassObjective
from unite_fast.writable import require_writable

# Wide enough that launching is a small share of it: 137 GFLOP on a GPU, 0.27 on a CPU core.
MATMUL_SIDE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # beyond any cache
REPEATS = 10
WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """One part of a step.

    Attributes:
        calls: times a step; the last of "denoise" may have fewer draws, and counts as their share of one.
        forward, backward: measured seconds of all calls; backward is 0 where there is none.
        floor: seconds that counted operations and bytes need at least, at the device's measured rates; None where
            nothing is counted.
        operations: counted, of all calls.
        memory: bytes that one call allocates at most.
    """

    name: str
    calls: int
    forward: float
    backward: float
    floor: float | None
    operations: int
    memory: int

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Measured:
    """A profile.

    Attributes:
        rates: of the device, measured before anything else.
        rows: the parts, and the update without its collectives: clipping, optimizers, EMA.
        step: median seconds of a whole optimizer step, waiting included.
        waiting: seconds of it spent waiting for data; None with made-up data.
        communication: seconds of it inside collectives while nothing is computed, the update's too; on one rank 0.
        memory: of the step.
        images: samples of a step on this rank, which are images or what `unit` says.
        mfu: counted operations of a step over its time and the measured matmul rate, under train.fp8 as well.
        unit: what a batch counts, in the plural.
        launch: seconds that a kernel's launch takes the host, at most; None (not measured) on a CPU, on several ranks
            and under train.compile.
    """

    rates: Rates
    rows: list[Row]
    step: float
    waiting: float | None
    communication: float
    memory: StepMemory
    images: int
    mfu: float
    unit: str = "images"
    launch: float | None = None

    @property
    def other(self) -> float:
        """What neither the parts nor communication nor waiting explain: draws, copies, launching."""
        return self.step - sum(row.seconds for row in self.rows) - self.communication - (self.waiting or 0.0)

    @property
    def efficiency(self) -> float:
        """Floor of everything counted over the step's time without waiting and communication: what `plan` asks for."""
        floor = sum(row.floor for row in self.rows if row.floor is not None)
        return floor / (self.step - self.communication - (self.waiting or 0.0))


def measure_rates(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Rates:
    """Operations a second of a large matrix product in this dtype and bytes a second of a large copy, best of ten.

    With `fp8` that of a product in FP8 as well, on CUDA: a CPU computes such in this dtype.
    """
    side = MATMUL_SIDE[device.type]
    # Random numbers: on equal ones a GPU switches fewer bits and clocks higher, an H200 13 % on zeros.
    a = torch.randn(side, side, device=device).to(dtype)
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    matmul = min(times(lambda: linear_product(a, a), device))
    copy = min(times(lambda: target.copy_(source), device))
    in_fp8 = fp8_rate(device) if fp8 and device.type == "cuda" else None
    return Rates(2 * side**3 / matmul, 2 * COPY_BYTES[device.type] / copy, in_fp8)


def fp8_rate(device: torch.device) -> float:
    """Operations a second of a large product in E4M3 as a forward pass calls it, without the casts."""
    side = MATMUL_SIDE[device.type]
    a = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones((), device=device)

    def in_fp8() -> torch.Tensor:
        return torch._scaled_mm(a, a.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * side**3 / min(times(in_fp8, device))


def times(run: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of each of ten runs, after two that do not count."""
    found = []
    for index in range(WARM_UP + REPEATS):
        began = now(device)
        run()
        found.append(now(device) - began)
    return found[WARM_UP:]


def measure(
    config: Config,
    world: World,
    *,
    steps: int,
    micro_batch: int | None = None,
    trace: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Measured:
    """Profile a configuration on this process's device.

    Args:
        config: the run; nothing is written into its folder.
        world: this process.
        steps: optimizer steps that the whole-step time is the median of.
        micro_batch: samples a backward; the configuration's if None, of `auto` the largest that is predicted to fit.
            On a GPU draws a chunk of `auto` are predicted, too.
        trace: file for the Chrome trace of two steps, which Perfetto and chrome://tracing read; None writes none.
        say: told what is going on.

    Raises:
        UserError: batch keys that do not fit, missing LPIPS weights, memory, a path that cannot be written.
    """
    device = world.device
    if trace is not None and world.is_main:
        require_writable(trace.parent, "the trace", "Give another file: --trace FILE")
    check_compile(config, device)
    if doubt := check_precision(config, world):
        say(doubt)
    check_fp8(config, device)
    uk.set_backend(config.train.kernels)
    dtype = autocast_dtype(config, device)
    say(f"measuring the {device.type}'s rates")
    rates = measure_rates(device, dtype or torch.float32, fp8=config.train.fp8)
    modality = modality_of(config)
    batch, config = _batch(config, world, micro_batch)
    objective = modality.objective(config, device, dtype)
    if config.train.compile:
        compile_perceptual(objective)
    torch.manual_seed(config.train.seed)
    model = modality.network(config.model).to(device)
    if config.train.fp8:
        use_fp8(model)
    feed = Feed(config, world, batch, modality)
    try:
        first = ", after compiling each" if config.train.compile else ""
        say(f"measuring the parts on {batch.micro_batch} {modality.unit}{first}")
        # Where samples differ, the data's say what a part costs; where they are alike, a loader would only disturb.
        inputs = feed.made_up() if modality.alike else feed.next()
        rows = _parts(config, modality, model, objective, batch, inputs, rates)
        say(f"measuring {WARM_UP + steps} steps of {batch.global_batch} {modality.unit}")
        step = ProfiledStep(config, world, objective, model, batch, feed)
        whole, waits, updates, operations = [], [], [], []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for index in range(WARM_UP + steps):
            taken = step.timed()
            if index >= WARM_UP:
                whole.append(taken[0]), waits.append(taken[1]), updates.append(taken[2])
                operations.append(counted_operations(config, step.extent))
        memory, memory_of_update = step.memory(), step.memory_of_update()
        communication, in_update = step.traced(trace)
        launch = None
        if device.type == "cuda" and world.size == 1 and not config.train.compile:
            say(f"measuring {REPEATS} steps of one of the {modality.unit}, which are launching and little else")
            launch = launch_seconds(step, modality)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"a micro-batch of {batch.micro_batch} does not fit into memory: give a smaller --micro-batch"
        ) from None
    finally:
        feed.close()
    return _measured(config, world, batch, rates, rows, whole, waits if feed.real else None,
                     statistics.median(updates) - in_update, memory_of_update, communication, memory,
                     statistics.mean(operations), modality.unit, launch)  # fmt: skip


def launch_seconds(step: ProfiledStep, modality: Modality) -> float:
    """What a kernel's launch takes the host, at most: a step on one sample leaves the device little to do."""
    taken = times(lambda: step.of_one_sample(modality), step.world.device)
    return statistics.median(taken) / step_launches(step.config, 1)


def _measured(
    config, world, batch, rates, rows, whole, waits, updating, memory_of_update, communication, memory, operations,
    unit, launch,
) -> Measured:
    dtype = "fp32" if autocast_dtype(config, world.device) is None else "bf16"
    update = update_part(
        config.model, config.optimizer, stage=config.train.zero_stage, ranks=world.size, dtype=dtype
    )
    floor = update.floor(1, rates)[0]
    rows = [*rows, Row("update", 1, max(updating, 0.0), 0.0, floor, update.forward, memory_of_update)]
    step = statistics.median(whole)
    images = batch.micro_batch * batch.accumulation
    return Measured(
        rates, rows, step, statistics.median(waits) if waits else None, communication, memory, images,
        operations / step / rates.matmul, unit, launch,
    )  # fmt: skip


def _batch(config: Config, world: World, micro_batch: int | None) -> tuple[Batch, Config]:
    """The batch numbers and the run with a number of draws a chunk, as predicted to fit where they are `auto`."""
    train = config.train
    largest = partial(modality_of(config).largest, config)
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # of what the rates were measured with, more than 2 GiB: the driver counts it as used
    # Of the fullest device: ranks that take other batches would wait for each other for ever.
    room = USABLE_MEMORY * min(world.collect(torch.cuda.mem_get_info(world.device)[0])) if on_gpu else 0
    if micro_batch is not None:
        accumulation = train.accumulation or 1
        batch = Batch(micro_batch, accumulation, micro_batch * accumulation * world.size)
    elif train.micro_batch != "auto":
        batch = resolve_batch(train, world.size)
    else:
        candidates = micro_batch_candidates(train, world.size)
        fits = (size for size in candidates if on_gpu and neutral_fits(config, largest(size), room, ranks=world.size))
        batch = resolve_batch(train, world.size, max(fits, default=candidates[0]))
    extent = largest(batch.micro_batch)
    if on_gpu:
        return batch, chunk_in_room(config, extent, room, ranks=world.size)
    return batch, resolve_chunk(config, extent, device="cpu")


def _parts(
    config: Config, modality: Modality, model: nn.Module, objective: TwoPassObjective, batch: Batch, inputs: Inputs,
    rates: Rates,
) -> list[Row]:  # fmt: skip
    """Each part alone, forward and backward, on a micro-batch as large as the step's."""
    device = inputs.labels.device
    dtype = autocast_dtype(config, device)
    chunk = config.objective.chunk
    counted = modality.counted(
        config, inputs.extent, dtype="fp32" if dtype is None else "bf16", device=device.type
    )
    rows = []
    for name, (forward, leaves) in modality.isolated(config, model, objective, inputs, chunk).items():
        if config.train.compile and name != "lpips":  # which is compiled already
            forward = compiled(forward, config)
        part, samples = counted[name]
        calls = often = batch.accumulation
        if name == "denoise":
            samples *= chunk
            often = calls * config.objective.flow_draws / chunk  # the last call may have fewer draws
            calls *= flow_passes(config)
        ahead, back = [], []

        def once(forward=forward, leaves=leaves, ahead=ahead, back=back) -> None:
            with one_micro_batch(device.type):
                began = now(device)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    out = forward(*leaves)
                middle = now(device)
                torch.autograd.backward(out, [torch.ones_like(value) for value in out])
            ahead.append(middle - began)
            back.append(now(device) - middle)
            for tensor in (*leaves, *model.parameters()):
                tensor.grad = None

        for _ in range(WARM_UP + REPEATS):
            once()
        memory = peak_allocated(once, device)
        floor = sum(part.floor(samples, rates))
        rows.append(
            Row(
                name, calls, often * statistics.median(ahead[WARM_UP:-1]), often * statistics.median(back[WARM_UP:-1]),
                often * floor, round(often * samples) * part.operations, memory,
            )
        )  # fmt: skip
    return rows
