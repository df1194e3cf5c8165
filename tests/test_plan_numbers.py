"""The numbers of a plan by hand: what fits, what a rank holds, what ZeRO 3 sends, what a message and an update cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from unite_fast.analysis.chunks import chunk_sizes, with_chunk
from unite_fast.analysis.devices import GIB, Network, find_gpu
from unite_fast.analysis.extent import Extent, Population
from unite_fast.analysis.memory import predict
from unite_fast.analysis.parts import Rates
from unite_fast.analysis.planning import (
    StepTime,
    breaking_point,
    collective_time,
    compute_time,
    last_backward,
    plan,
    step_time,
)
from unite_fast.analysis.update import Collective, network_of
from unite_fast.config import Config
from unite_fast.modality import modality_of

H100 = find_gpu("h100-80")
NODES = Network(per_node=8, node_link=H100.link, link=50e9)
MUON, ADAMW = 215_318_016, 2_325_600  # elements of B
FLAT = Network(per_node=4, node_link=1e9, link=1e8, node_latency=1e-3, latency=5e-3, share=0.5)


def config(**sections: dict) -> Config:
    return Config.parse(
        {
            "model": sections.get("model", {"preset": "B"}),
            "objective": {"flow_draws": 14} | sections.get("objective", {}),
            "optimizer": sections.get("optimizer", {}),
            "train": {"epochs": 1, "global_batch": 1024, "micro_batch": "auto"} | sections.get("train", {}),
            "data": {"path": "unused"},
        }
    )


@pytest.mark.parametrize(("stage", "ranks", "gib", "of_config"), [(1, 64, 7, 0), (0, 8, 9, 1)])
def test_what_fits_is_that_of_the_stage_and_the_ranks(stage, ranks, gib, of_config):
    """Whatever ZeRO stage the configuration names. The next larger micro-batch or chunk would not fit."""
    made = config(train={"zero_stage": of_config})
    card = H100._replace(memory=gib * GIB)
    found = plan(made, card, NODES, ranks=ranks, stage=stage)
    room = 0.92 * card.memory

    def peak(size: int, chunk: int) -> int:
        return predict(with_chunk(made, chunk), extent=Extent(size), ranks=ranks, stage=stage).peak

    larger = [size for size in chunk_sizes(14) if size > found.draws_per_chunk]
    assert 1 < found.micro_batch < 1024 / ranks and larger and found.fits
    assert peak(found.micro_batch, found.draws_per_chunk) <= room < peak(found.micro_batch, larger[0])
    assert peak(2 * found.micro_batch, 1) > room


def test_what_fits_leaves_a_share_of_the_memory():
    made = with_chunk(config(train={"micro_batch": 16}), 2)
    peak = plan(made, H100, NODES, ranks=8, stage=0).memory.peak
    for share, fits in ((0.95, False), (0.9, True)):
        card = H100._replace(memory=peak / share)
        assert plan(made, card, NODES, ranks=8, stage=0).fits is fits


def test_a_rank_holds_its_slice_of_the_state():
    made = config(train={"zero_stage": 0, "micro_batch": 2}, optimizer={"ema_decays": [0.999]})
    alone, shared = (plan(made, H100, NODES, ranks=8, stage=stage).memory for stage in (0, 1))
    assert alone.optimizer == 4 * (MUON + 2 * ADAMW) and alone.ema == 2 * 4 * (MUON + ADAMW)
    assert shared.optimizer == pytest.approx(alone.optimizer / 8, rel=1e-5)
    assert shared.ema == pytest.approx(alone.ema / 8, rel=1e-5)


def test_gradients_come_later_than_the_activations_of_a_single_micro_batch():
    for micro_batch, single in ((128, True), (64, False)):
        made = with_chunk(config(train={"micro_batch": micro_batch}), 1)
        found = plan(made, H100, NODES, ranks=8, stage=0)
        assert (found.accumulation == 1) is single and (found.memory.later > 0) is single


def test_memory_is_that_of_the_busiest_micro_batch():
    made = Config.load("configs/qm9_s.json", ["train.micro_batch=64", "objective.draws_per_chunk=2"])
    sizes = Population((0, 9, 0, 0, 1), 1000, "one in ten has four atoms")
    found = plan(made, H100, NODES, ranks=8, stage=0, population=sizes)
    # 64 of 1.3 atoms and of 2.5 pairs on average, and five standard deviations of such sums more.
    busiest = Extent(64, round(83.2 + 5 * 8 * 0.9), round(160 + 5 * 8 * 4.5))
    assert found.extent == Extent(64, 83, 160)
    assert found.memory == predict(made, extent=busiest, ranks=8, stage=0, single=True)


def test_zero_3_gathers_what_each_pass_reads_and_reduces_once():
    """Every parameter of a pass before its forward and before its backward, padded to whole pieces, a call a module."""
    made = with_chunk(config(train={"micro_batch": 4, "accumulation": 3, "global_batch": None}), 5)  # three chunks
    sizes = {name: weight.numel() for name, weight in network_of(made.model).named_parameters()}
    flow = [name for name in sizes if name.startswith(("encoder.", "latent_norm."))]
    moved, calls = 0, 0
    for names, passes in ((list(sizes), 1), (flow, 3)):
        moved += 2 * 3 * passes * sum(-(-sizes[name] // 4) * 4 for name in names)
        calls += 2 * 3 * passes * len({name.rpartition(".")[0] for name in names})
    found = step_time(made, H100.rates, FLAT, 4, 3, Extent(4), 3, 0.75, 0.0)
    # A ring of four: a fourth of it in each of three hops, at half of the stated bytes a second.
    assert found.weights == pytest.approx(3 * (calls * 1e-3 + 4 * moved / 4 / 0.5e9))
    # 768 of AdamW's have no gradient; the norm, a number, takes a tree of two hops up and two down.
    gradients = 4 * (MUON + ADAMW - 768)
    buckets = math.ceil(gradients / 4 / 25_000_000)
    assert found.gradients == pytest.approx(3 * (buckets * 1e-3 + gradients / 4 / 0.5e9) + 4e-3, rel=1e-6)
    assert found.exchange == 0


def test_messages_of_a_collective_pay_their_hops_each():
    whole = Collective("all_gather", "weights", 1_000_000, 1_000_000, messages=2, itemsize=2)
    ring = 2 * 3 * (1e-3 + 1e6 / 4 / 0.5e9)
    assert collective_time(whole, 4, FLAT) == pytest.approx(ring)
    # Bytes of a ring pass 2 · 3/4 times, of a tree twice: where bytes count it is the ring, where hops do the tree.
    large = whole._replace(kind="all_reduce", elements=10**9)
    assert collective_time(large, 4, FLAT) == pytest.approx(2 * 2 * 3 * (1e-3 + 1e9 / 4 / 0.5e9))
    wide = FLAT._replace(per_node=8)
    assert collective_time(whole._replace(kind="all_reduce"), 5, wide) == pytest.approx(2 * 2 * (3e-3 + 1e6 / 0.5e9))


def test_matrices_travel_from_one_gpu_to_one_other():
    """Three sends; between nodes one adapter, not the four side by side that a ring has."""
    pieces = Collective("all_to_all", "pieces", 9_000_000, 1_000_000, messages=3, itemsize=2)
    assert collective_time(pieces, 4, FLAT) == pytest.approx(3 * 1e-3 + 2e6 / 0.5e9)
    hop = (3 * 1e-3 + 5e-3) / 4
    assert collective_time(pieces, 8, FLAT) == pytest.approx(3 * hop + 2e6 / 0.5e8)
    slow = FLAT._replace(node_link=1e7)  # PCIe, slower than the adapter behind it
    assert collective_time(pieces, 8, slow) == pytest.approx(3 * hop + 2e6 / 0.5e7)


def test_chunks_repeat_what_is_read_and_not_what_is_computed():
    compute, copy = Rates(1e12, 1e30), Rates(1e30, 1e9)
    chunks = {chunk: with_chunk(config(), chunk) for chunk in (14, 7, 5)}  # one pass, two, and two of five and one of 4
    operations = {compute_time(made, compute, Extent(2)) for made in chunks.values()}
    assert max(operations) == pytest.approx(min(operations), rel=1e-9)
    moved = {chunk: compute_time(made, copy, Extent(2)) for chunk, made in chunks.items()}
    assert moved[7] - moved[14] == pytest.approx(moved[5] - moved[7]) and moved[7] > moved[14]


def test_the_last_backward_is_a_chunk_or_pass_one():
    """Where operations alone limit."""
    rates, extent = Rates(1e12, 1e30), Extent(2)
    made = with_chunk(config(), 7)
    counted = modality_of(made).counted(made, extent, dtype="bf16", device="cuda")
    parts = {name: part for name, (part, _) in counted.items()}
    assert last_backward(made, rates, extent) == pytest.approx(2 * 7 * parts["denoise"].backward / 1e12)
    through = with_chunk(config(objective={"stop_gradient": False}), 7)
    first = sum(part.backward for name, part in parts.items() if name != "denoise")
    assert last_backward(through, rates, extent) == pytest.approx(2 * first / 1e12)


LOST = {
    "compute": "small micro-batches", "launching": "launching kernels", "gradients": "reducing the gradients",
    "exchange": "exchanging matrices", "weights": "gathering the weights", "update": "the update",
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_why_scaling_breaks(name):
    """Two GPUs take 10 s for 20 samples, four 9 s for 24: 1.5 GPU-seconds a sample in place of one."""
    some = plan(with_chunk(config(train={"micro_batch": 4}), 1), H100, NODES, ranks=8, stage=0)
    first = {"compute": 6.0, "gradients": 1.0, "exchange": 1.0, "weights": 1.0, "update": 1.0}
    more = {name: 2.25, "update" if name == "compute" else "compute": 0.75}  # of 6 s, which would be as good as before
    then = {part: 0.6 * seconds + more.get(part, 0.0) for part, seconds in first.items()}
    two = replace(some, ranks=2, global_batch=20, seconds=StepTime(**first, host=0.0))
    four = replace(some, ranks=4, global_batch=24, seconds=StepTime(**then, host=9.0))
    assert four.seconds.total == pytest.approx(9)
    found, why = breaking_point([two, four, replace(four, ranks=8)])
    assert found is four and why.startswith(f"75% of the lost time is {LOST[name]}")


def test_what_is_gained_meanwhile_is_no_loss():
    """Of 1 GPU-second a sample the larger run computes 0.2 less and reduces 0.9 more: all of the loss is that."""
    some = plan(with_chunk(config(train={"micro_batch": 4}), 1), H100, NODES, ranks=8, stage=0)
    rest = {"exchange": 0.0, "weights": 0.0, "update": 0.0, "host": 0.0}
    one, two = (
        replace(some, ranks=ranks, global_batch=ranks, seconds=StepTime(compute=compute, gradients=gradients, **rest))
        for ranks, compute, gradients in ((8, 0.9, 0.1), (16, 0.7, 1.0))
    )
    assert breaking_point([one, two])[1].startswith("100% of the lost time is reducing the gradients")
