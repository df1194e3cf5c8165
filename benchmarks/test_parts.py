"""The parts of the training step, forward and backward, beside their counted floors and the plain rival's same part.

denoise is all S draws: ours in chunks of `draws_per_chunk`, of which the table takes one, times their number. update is
clipping, both optimizers and EMA, which ours sweeps together.
"""

from __future__ import annotations

import contextlib

import contest
import measure
import pytest
import torch
from plain_unite import PlainDraws
from subjects import SUBJECTS, Trainers, load

import unite_kernels as uk
from unite_fast.analysis.counts import repeats, step_parts
from unite_fast.analysis.parts import Part, Rates
from unite_fast.analysis.update import update_part
from unite_fast.model.casts import one_micro_batch

ON_GPU = measure.DEVICE == "cuda"
DTYPE = "bf16" if ON_GPU else "fp32"
ROUNDS = {"cuda": 50, "cpu": 15}
GPU_IMAGES = 32
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
# Where the image reaches us: LPIPS's backward pass ends in the reconstruction, the update has none.
PARTS = {
    "tokenize": (FORWARD, BACKWARD),
    "decode": (FORWARD, BACKWARD),
    "lpips": (BOTH,),
    "denoise": (FORWARD, BACKWARD),
    "update": (FORWARD,),
}
CHOSEN = [
    pytest.param(subject, part, direction, id=f"{subject}-{part}-{direction}".replace(" ", "_"))
    for subject in SUBJECTS
    if subject.endswith(("S=3", "S=4"))  # S changes how often denoise runs, and nothing else
    for part, directions in PARTS.items()
    # On a CPU the quickstart, which trains there, and of the other what the quickstart lacks.
    if ON_GPU or (part == "lpips") == subject.startswith("small")
    for direction in directions
]


class Bench:
    """Both contenders' parts of one subject on one batch."""

    def __init__(self, config, images: int):
        self.trainers = trainers = Trainers(config)
        self.config, self.objective, self.model = config, trainers.objective, trainers.engine.model
        self.images, self.labels = trainers.batch(images)
        self.shape = trainers.shape(images)
        self.plain = trainers.plain
        self.drawn = PlainDraws.make(config.objective, tuple(self.shape), trainers.device)
        with torch.no_grad():
            self.z0 = self.tokenize()
            self.image = torch.rand_like(self.images)
        self.gradients = {
            id(p): torch.randn_like(p) * 1e-3
            for parameters in (trainers.engine.parameters.values(), self.plain.parameters)
            for p in parameters
        }

    def cast(self):
        return self.plain.cast()

    def chunk(self) -> int:
        return self.config.objective.chunk

    # Each part: ours, then the rival's. A part that trains returns the tensor to differentiate.

    def tokenize(self):
        noise, t, _, _ = self.trainers.draws().tokenize(self.shape)
        return self.model.tokenize(self.images, noise=noise, t=t)

    def plain_tokenize(self):
        return self.plain.model.tokenize(self.images, self.drawn)

    def decode(self):
        z0 = self.z0.detach().requires_grad_()
        return uk.patch_l1(self.model.decoder(z0), self.images, self.config.model.patch_size)[0]

    def plain_decode(self):
        z0 = self.z0.detach().requires_grad_()
        return (self.plain.model.decoder(z0).float() - self.images).abs().mean()

    def lpips(self):
        return self.objective.lpips(self.images, self.image.detach().requires_grad_())

    def plain_lpips(self):
        return self.plain.model.lpips(self.images, self.image.detach().requires_grad_())

    def denoise(self):
        draws = self.trainers.draws()
        return self.objective.flow(self.model, self.z0, self.labels, draws, 0, self.chunk())

    def plain_denoise(self):
        chunk = self.chunk()
        few = self.drawn._replace(
            t=self.drawn.t[:chunk], flow_noise=self.drawn.flow_noise[:chunk], drop=self.drawn.drop[:chunk]
        )
        return self.plain.model.flow(self.z0, self.labels, few)

    def give_gradients(self, parameters) -> None:
        for parameter in parameters:
            # A copy, as clipping scales in place; parameters that no pass reads have none.
            parameter.grad = self.gradients[id(parameter)].clone()

    def update(self):
        self.trainers.engine.step()

    def plain_update(self):
        self.plain.update()
        self.plain.average()


@pytest.fixture(scope="module")
def benches(perceptual_weights):
    """Subject -> Bench; the last one alone stays, as two do not fit beside each other on a GPU."""
    held: dict[str, Bench] = {}

    def get(name: str) -> Bench:
        if name not in held:
            held.clear()
            subject = SUBJECTS[name]
            held[name] = Bench(load(subject, perceptual_weights), subject.batch or GPU_IMAGES)
        return held[name]

    return get


def prepared(bench: Bench, part: str, who: str, direction: str):
    """A function that makes ready what is not timed and returns the call that is."""
    run = getattr(bench, part if who == contest.OURS else f"plain_{part}")
    model = bench.model if who == contest.OURS else bench.plain.model

    def forward():
        with bench.cast():
            return run()

    def backward(output):
        output.backward(torch.ones_like(output))

    def ready():
        model.zero_grad(set_to_none=True)
        if part == "update":
            bench.give_gradients(p for p in model.parameters() if p.requires_grad)
            return run
        held = contextlib.ExitStack()
        if who == contest.OURS:  # as around a step's passes, until the call is over
            held.enter_context(one_micro_batch(measure.DEVICE))
        output = forward() if direction == BACKWARD else None

        def call():
            with held:
                found = forward() if output is None else output
                if direction != FORWARD:
                    backward(found)

        return call

    return ready


def turn(who: str, ready):
    """One timed call, on a GPU behind one of the same kind that is not."""

    def timed() -> float:
        if ON_GPU:
            ready()()
        seconds = measure.own_seconds(ready())
        return measure.CLOCK.count(seconds) if who == contest.OURS else seconds

    return timed


def counted(part: str, config) -> tuple[Part, float]:
    """The counts of a part and how often a step runs it."""
    if part == "update":
        return update_part(config.model, config.optimizer, dtype=DTYPE), 1
    chunks = repeats(part, config.objective) / (config.objective.chunk if part == "denoise" else 1)
    return step_parts(config.model, config.objective, dtype=DTYPE, device=measure.DEVICE)[part], chunks


def costs(part: str, direction: str, config, images: int, rates: Rates) -> dict:
    """Operations, bytes and floor of one call."""
    count, per_step = counted(part, config)
    if part == "update":
        images = 1
    elif part == "denoise":
        images *= config.objective.chunk
    forward, backward = count.floor(images, rates)
    halves = {
        FORWARD: (images * count.forward, count.forward_bytes(images), forward),
        BACKWARD: (images * (count.backward + count.recomputed), count.backward_bytes(images), backward),
    }
    halves[BOTH] = tuple(a + b for a, b in zip(halves[FORWARD], halves[BACKWARD], strict=True))
    operations, moved, seconds = halves[direction]
    return {"operations": operations, "bytes": moved, "floor_seconds": seconds, "per_step": per_step}


@pytest.mark.parametrize("name, part, direction", CHOSEN)
@pytest.mark.benchmark(timer=measure.CLOCK)
def test_part(name, part, direction, benchmark, bandwidth, matmul_rate, results, benches):
    bench = benches(name)
    ready = {who: prepared(bench, part, who, direction) for who in (contest.OURS, "plain")}
    for _ in range(2):
        for make in ready.values():
            make()()
    turns, found = {who: turn(who, make) for who, make in ready.items()}, {who: [] for who in ready}
    benchmark.pedantic(contest.play, args=(turns, found), rounds=ROUNDS[measure.DEVICE])
    contest.settle(turns, found, lambda: contest.ratios(found), seconds=15)
    seconds = {who: measure.spread(times) for who, times in found.items()}
    ratio = contest.ratios(found)["plain"]
    images = bench.images.shape[0]
    cost = costs(part, direction, bench.config, images, Rates(matmul_rate, bandwidth))
    median = seconds[contest.OURS]["median"]
    result = {
        "operator": f"{part} of {name}",
        "direction": direction,
        "shape": f"{images} images",
        "dtype": "bfloat16" if ON_GPU else "float32",
        "rounds": len(found[contest.OURS]),
        "seconds": seconds,
        "times_faster_than": {"plain": ratio.value},
        "ratio_error": {"plain": ratio.error},
        "part": part,
        "subject": name,
        **cost,
        "gb_per_second": cost["bytes"] / median / 1e9,
        "share_of_floor": cost["floor_seconds"] / median,
    }
    benchmark.extra_info.update(result)
    results.append(result)
