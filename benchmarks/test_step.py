"""The complete training step: tokenize, reconstruct, denoise, backward, optimizer, EMA.

Rivals of the same run, in turn: the same model in plain PyTorch as one graph (plain_unite.py, on molecules
plain_molecules.py), and that under torch.compile; then ours under torch.compile, too. Images on a GPU: ours and the
rival each take the largest batch that fits (a compiled one that of the eager one, or the next below that fits, as every
size tried is compiled anew), and the ratio is of images a second.
"""

from __future__ import annotations

import gc
import statistics
from typing import Literal, NamedTuple

import contest
import measure
import pytest
import torch
from molecule_subjects import ATOM_HISTOGRAM, MOLECULE_SUBJECTS, MoleculeTrainers
from profile_table import step_bytes
from subjects import CONFIGS, SUBJECTS, Trainers, load, resolved

from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.counts import image_operations, repeats, step_parts
from unite_fast.analysis.parts import Rates
from unite_fast.analysis.update import flow_passes, update_part
from unite_fast.config import Config
from unite_fast.engine.batch import find_largest, find_micro_batch

ROUNDS = {"cuda": 15, "cpu": 11}  # at least; four contenders, and a step of L with all draws takes seconds
# Bytes that no batch may fill: all contenders' batches stay on the device, and code is compiled and loaded later.
RESERVE = 2 * 2**30
BATCHES = [4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


COMPILED = {contest.OURS_COMPILED, "compile"}


def compile_anew() -> None:
    """Forget what was compiled for the contenders before.

    A function is compiled at most `recompile_limit` times, 8 by default, for all models together, and then runs eager
    with no more than a warning. Ours is compiled up to three times for a batch: pass one, a chunk of draws, a last one
    of fewer.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 3 * len(BATCHES)


def contenders(trainers: Trainers, with_compile: bool) -> dict:
    """Name -> one optimizer step on a batch of the trainers."""
    steps = {contest.OURS: trainers.our_step, "plain": trainers.plain.step}
    if with_compile:
        steps[contest.OURS_COMPILED] = lambda *batch: trainers.our_step(*batch, compiled=True)
        steps["compile"] = lambda *batch: trainers.plain.step(*batch, compiled=True)
    return steps


def batch_sizes(trainers: Trainers, steps: dict, given: int | None) -> dict[str, int]:
    """Samples of a step of each contender: given, or the most that fit beside everything that is there."""
    if given is not None:
        return dict.fromkeys(steps, given)
    sizes = {}
    both = (contest.OURS, "plain")
    for who in both:
        steps[who](*trainers.batch(BATCHES[0]))  # the state that its optimizer keeps from now on
    spared = torch.empty(RESERVE, dtype=torch.uint8, device=trainers.device)
    for who in both:

        def try_step(size: int) -> None:
            trainers.drop_gradients()
            steps[who](*trainers.batch(size))

        sizes[who] = find_micro_batch(try_step, BATCHES)
    del spared
    same = {contest.OURS_COMPILED: sizes[contest.OURS], "compile": sizes["plain"]}
    return {who: (sizes | same)[who] for who in steps}


def warmed(trainers: Trainers, steps: dict, sizes: dict[str, int]) -> dict[str, tuple]:
    """Batches of these sizes, after two steps of each contender on its own.

    A compiled contender may need more memory than the eager one whose size it was given: it takes the next smaller
    ones, in `sizes`, until it fits.
    """
    batches = {}
    for who, step in steps.items():

        def two_steps(size: int) -> None:
            trainers.drop_gradients()
            batches[who] = trainers.batch(size)
            for _ in range(2):
                step(*batches[who])

        smaller = [size for size in BATCHES if size < sizes[who]] if who in COMPILED else []
        while find_largest(two_steps, [sizes[who]]) is None:
            if not smaller:
                raise RuntimeError(f"{who} runs out of memory on a batch of {sizes[who]}")
            sizes[who] = smaller.pop()
    return batches


class Seconds(NamedTuple):
    """What a sample of a step took, by two clocks."""

    wall: float
    process: float


def turn(who: str, step, batch, size: int):
    """A function that makes one step ready and times it."""

    def timed() -> Seconds:
        if measure.DEVICE == "cuda":
            torch.cuda.empty_cache()  # of the contender before
        step(*batch)  # in training a step follows itself: weights and state are in the caches as it leaves them
        wall, process = measure.wall_and_process_seconds(lambda: step(*batch))
        if who == contest.OURS:
            measure.CLOCK.count(wall)
        return Seconds(wall / size, process / size)

    return timed


def race(trainers: Trainers, given: int | None, benchmark, with_compile: bool, unit: str) -> tuple[dict, float]:
    """What every step's record holds, and the seconds that a sample of ours takes, as ratios take them."""
    on_gpu = measure.DEVICE == "cuda"
    if with_compile := on_gpu or with_compile:
        compile_anew()
    steps = contenders(trainers, with_compile)
    sizes = batch_sizes(trainers, steps, given)
    batches = warmed(trainers, steps, sizes)
    peak = {who: peak_allocated(lambda: step(*batches[who]), trainers.device) for who, step in steps.items()}

    turns = {who: turn(who, step, batches[who], sizes[who]) for who, step in steps.items()}
    found = {who: [] for who in steps}
    benchmark.pedantic(contest.play, args=(turns, found), rounds=ROUNDS[measure.DEVICE])
    # On a CPU ratios, MFU and floors take processor time: waiting for a core that others hold is not the step's doing.
    judged = "wall" if on_gpu else "process"
    contest.settle(turns, found, lambda: contest.ratios(by_clock(found, judged)), seconds=60)
    wall, own = by_clock(found, "wall"), by_clock(found, judged)
    ratios = contest.ratios(own)

    result = {
        "direction": "step",
        "shape": f"{given or 'largest'} {unit}",
        "dtype": "bfloat16" if on_gpu else "float32",
        "rounds": len(found[contest.OURS]),
        "batch": sizes,
        **steps_seconds(found, sizes, judged),
        "times_faster_than": {rival: ratio.value for rival, ratio in ratios.items()},
        "ratio_error": {rival: ratio.error for rival, ratio in ratios.items()},
        "ratio_of": "wall clock" if on_gpu else "processor time",
        "wall_times_faster_than": {rival: ratio.value for rival, ratio in contest.ratios(wall).items()},
        f"{unit}_per_second": {who: 1 / statistics.median(times) for who, times in wall.items()},
        "p95_over_median": {who: measure.tail(times) for who, times in wall.items()},
        "peak_bytes": peak,
    }
    return result, statistics.median(own[contest.OURS])


def steps_seconds(
    found: dict[str, list[Seconds]], sizes: dict[str, int], judged: Literal["wall", "process"]
) -> dict[str, dict[str, dict[str, float]]]:
    """Quartiles of each contender's steps: by the wall clock, and by that which ratios, MFU and floors take."""
    return {
        name: {who: measure.spread([s * sizes[who] for s in times]) for who, times in by_clock(found, clock).items()}
        for name, clock in (("seconds", "wall"), ("processor_seconds", "process"))
        if clock in ("wall", judged)
    }


def by_clock(found: dict[str, list[Seconds]], clock: Literal["wall", "process"]) -> dict[str, list[float]]:
    """Of each contender's times one clock's."""
    return {who: [getattr(seconds, clock) for seconds in times] for who, times in found.items()}


@pytest.mark.timeout(3600)  # compiling takes minutes
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.benchmark(timer=measure.CLOCK)
def test_step(name, benchmark, bandwidth, matmul_rate, results, perceptual_weights, request):
    gc.collect()  # the models of the test before, which cycles may still hold
    subject = SUBJECTS[name]
    config = load(subject, perceptual_weights)
    measured, own = race(Trainers(config), subject.batch, benchmark, request.config.getoption("compile"), "images")
    batch, dtype = measured["batch"][contest.OURS], "bf16" if measure.DEVICE == "cuda" else "fp32"
    operations = image_operations(config.model, config.objective)
    result = {
        "operator": f"step {name}",
        **measured,
        "operations_per_image": operations,
        "mfu": operations / own / matmul_rate,
        "mfu_peak": f"{matmul_rate:.4g} operations/s, {measure.MATMUL_PEAK}",
        **floor(config, batch, dtype, Rates(matmul_rate, bandwidth), own * batch),
    }
    benchmark.extra_info.update(result)
    results.append(result)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MOLECULE_SUBJECTS)
@pytest.mark.benchmark(timer=measure.CLOCK)
def test_molecule_step(name, benchmark, results, request):
    gc.collect()  # the models of the test before, which cycles may still hold
    subject = MOLECULE_SUBJECTS[name]
    config = resolved(Config.load(CONFIGS / subject.file, subject.overrides), subject.batch)
    trainers = MoleculeTrainers(config, subject.counts)
    measured, _ = race(trainers, subject.batch, benchmark, request.config.getoption("compile"), "molecules")
    (batch,) = trainers.batch(subject.batch)
    result = {
        "operator": f"step {name}",
        **measured,
        "padding_share": 1 - float(batch.counts.sum()) / batch.elements.numel(),
        "atoms": {"mean": float(batch.counts.double().mean()), "largest": int(batch.counts.max())},
        "molecules": f"random elements and positions, {subject.counts.__name__.replace('_', ' ')} of the histogram",
        "atom_histogram": ATOM_HISTOGRAM,
    }
    benchmark.extra_info.update(result)
    results.append(result)


def floor(config, batch: int, dtype: str, rates: Rates, seconds: float) -> dict:
    """Bytes a step must move, the rate of them, and the share of the least time that it reaches."""
    parts = step_parts(config.model, config.objective, dtype=dtype, device=measure.DEVICE)
    least = sum(update_part(config.model, config.optimizer, dtype=dtype).floor(1, rates))
    for name, part in parts.items():
        passes = flow_passes(config) if name == "denoise" else 1
        images = batch * repeats(name, config.objective) / passes  # in the mean: the last chunk may be smaller
        least += passes * sum(part.floor(images, rates))
    moved = step_bytes(config, batch, dtype=dtype, device=measure.DEVICE)
    return {
        "bytes": moved,
        "gb_per_second": moved / seconds / 1e9,
        "floor_seconds": least,
        "share_of_floor": least / seconds,
    }
