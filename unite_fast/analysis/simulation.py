"""An optimizer step played message by message: what the closed formulas of the plan are checked against.

Every rank has a clock. Computing moves it; a ring moves the clocks of sender and receiver hop by hop, over NVLink
inside a node and the network between nodes; pieces of matrices for Muon are single messages that queue at the sender's
and the receiver's adapter. So late ranks, slow links and busy owners cost what they would cost.
"""

from __future__ import annotations

import math

import numpy as np

from unite_fast.analysis.counts import Rates
from unite_fast.analysis.devices import Network
from unite_fast.analysis.planning import Plan, compute_time, tree_time
from unite_fast.analysis.update import (
    EXCHANGED,
    FP32,
    newton_schulz_operations,
    slice_elements,
    trained_weights,
    update_part,
)
from unite_fast.config import Config
from unite_fast.engine.deepspeed_backend import BUCKET_ELEMENTS
from unite_fast.engine.sharding import MatrixExchange, windows


def simulate(
    config: Config,
    planned: Plan,
    rates: Rates,
    network: Network,
    *,
    efficiency: float,
    jitter: float = 0.0,
    seed: int = 0,
) -> float:
    """Seconds of one optimizer step as planned, under ZeRO 0, 1 or 2.

    Args:
        jitter: standard deviation of a rank's compute, as a share of it; all ranks wait for the slowest.
    """
    generator = np.random.default_rng(seed)
    ranks, stage = planned.ranks, planned.stage
    slower = 1 + jitter * generator.standard_normal(ranks)
    clock = planned.accumulation * compute_time(config, rates, planned.extent) / efficiency * slower
    weights = trained_weights(config.model, config.optimizer.kind)
    slices = [slice_elements(group, ranks) for group in (weights.muon, weights.adamw) if group]
    if stage == 0:
        for bucket in _buckets(weights.total):
            clock = _all_reduce(clock, FP32 * bucket, network)
    else:
        for piece in slices:
            for _, length in windows(piece, ranks, BUCKET_ELEMENTS):
                clock = _ring(clock, FP32 * length, ranks - 1, network)
    update = update_part(config.model, config.optimizer, stage=stage, ranks=ranks)
    orthogonal = sum(
        max(op.forward / rates.matmul, op.forward_bytes / rates.copy)
        for op in update.ops
        if op.name == "Newton-Schulz"
    )
    rest = update.floor(1, rates)[0] - orthogonal
    if stage == 0:
        return float(clock.max()) + (rest + orthogonal) / efficiency
    clock = _all_reduce(clock, FP32, network)
    if weights.matrices:
        clock = _muon(clock, weights.matrices, config.optimizer.newton_schulz_steps, rates, network, efficiency)
    clock = clock + rest / efficiency
    for piece in slices:
        clock = _ring(clock, FP32 * piece, ranks - 1, network)
    return float(clock.max())


def _buckets(elements: int) -> list[int]:
    full, rest = divmod(elements, BUCKET_ELEMENTS)
    return [BUCKET_ELEMENTS] * full + [rest] * (rest > 0)


def _all_reduce(clock: np.ndarray, size: float, network: Network) -> np.ndarray:
    """The faster of ring and tree, as NCCL picks it."""
    ranks = len(clock)
    if ranks == 1:
        return clock
    ring = _ring(clock, size / ranks, 2 * (ranks - 1), network)
    tree = clock.max() + tree_time(size, ranks, network.hop(ranks), network.bandwidth(ranks))
    return np.minimum(ring, tree) if ring.max() <= tree else np.full(ranks, tree)


def _ring(clock: np.ndarray, piece: float, hops: int, network: Network) -> np.ndarray:
    """`hops` rounds in which every rank sends a piece of bytes to the next and takes one from the previous."""
    ranks = len(clock)
    if ranks == 1:
        return clock
    inside = np.arange(1, ranks + 1) % network.per_node != 0  # the link from rank i to i + 1
    inside[-1] = ranks <= network.per_node
    sending = piece / np.where(inside, network.node_link * network.share, network.between_nodes)
    latency = np.where(inside, network.node_latency, network.latency)
    for _ in range(hops):
        # A rank's next round begins when its own send is through and its neighbour's piece has come.
        clock = np.maximum(clock + sending, np.roll(clock + sending + latency, 1))
    return clock


def _muon(
    clock: np.ndarray,
    matrices: tuple[tuple[int, int], ...],
    steps: int,
    rates: Rates,
    network: Network,
    efficiency: float,
) -> np.ndarray:
    """Pieces to their owners, orthogonalisation there, pieces back."""
    ranks = len(clock)
    partition = slice_elements(sum(rows * columns for rows, columns in matrices), ranks)
    owners = MatrixExchange(list(matrices), partition, 0, ranks).owners
    messages, begin = [], 0
    for owner, (rows, columns) in zip(owners, matrices, strict=True):
        end = begin + rows * columns
        for holder in range(begin // partition, (end - 1) // partition + 1):
            if holder != owner:
                piece = min(end, (holder + 1) * partition) - max(begin, holder * partition)
                messages.append((holder, owner, EXCHANGED * piece))
        begin = end
    clock = _deliver(clock, messages, network)
    busy = np.zeros(ranks)
    for owner, (rows, columns) in zip(owners, matrices, strict=True):
        busy[owner] += newton_schulz_operations(rows, columns, steps) / rates.matmul / efficiency
    back = [(owner, holder, size) for holder, owner, size in messages]
    return _deliver(clock + busy, back, network)


def _deliver(clock: np.ndarray, messages: list[tuple[int, int, int]], network: Network) -> np.ndarray:
    """All messages (from, to, bytes); one at a time leaves a rank, one at a time comes in."""
    leaving, coming = clock.copy(), clock.copy()
    for source, target, size in messages:
        same_node = source // network.per_node == target // network.per_node
        link = network.node_link if same_node else min(network.node_link, network.link)
        hop = network.node_latency if same_node else network.latency
        gone = max(leaving[source], coming[target]) + size / (link * network.share)
        leaving[source], coming[target] = gone, gone + hop
    return np.maximum(leaving, coming)


def jitter_of(spread: float) -> float:
    """Standard deviation, as a share of the median, of normal times whose 95th percentile is spread · median."""
    if not math.isfinite(spread) or spread < 1:
        raise ValueError(f"a spread is a 95th percentile over a median and at least 1, got {spread}")
    return (spread - 1) / 1.645
