"""An optimizer step played message by message: what the closed formulas of the plan are checked against.

Every rank has a clock. Computing moves it; a ring moves the clocks of sender and receiver hop by hop, over NVLink
inside a node and the network between nodes; pieces of matrices for Muon are single messages that queue at the sender's
and the receiver's adapter. So slow links and busy owners cost what they would cost. All ranks compute at one speed. A
step is over when its host has launched it as well.
"""

from __future__ import annotations

import numpy as np

from unite_fast.analysis.chunks import with_chunk
from unite_fast.analysis.devices import Network
from unite_fast.analysis.parts import Op, Rates
from unite_fast.analysis.planning import Plan, compute_time, gradient_windows, last_backward, needed_weights, tree_time
from unite_fast.analysis.update import (
    EXCHANGED,
    FP32,
    exchanges,
    newton_schulz_op,
    trained_weights,
    travelling,
    update_part,
)
from unite_fast.config import Config


def simulate(config: Config, planned: Plan, rates: Rates, network: Network, *, efficiency: float) -> float:
    """Seconds of one optimizer step as planned, under ZeRO 0, 1 or 2."""
    ranks, stage = planned.ranks, planned.stage
    config = with_chunk(config, planned.draws_per_chunk)
    waited = np.zeros(ranks)
    if ranks > 1 and stage in (1, 2):
        waited = _waited(config, planned, rates, network, efficiency)
    clock = waited + planned.accumulation * compute_time(config, rates, planned.extent) / efficiency
    weights = trained_weights(config.model, config.optimizer.kind)
    if ranks > 1:
        backward = last_backward(config, rates, planned.extent) / efficiency
        clock = _reduced(config, planned, clock, backward, network)
    update = update_part(config.model, config.optimizer, stage=stage, ranks=ranks)
    orthogonal = sum(_seconds(op, rates) for op in update.ops if op.name == "Newton-Schulz")
    rest = update.floor(1, rates)[0] - orthogonal
    if stage == 0:
        return max(planned.seconds.host, float(clock.max()) + (rest + orthogonal) / efficiency)
    clock = _all_reduce(clock, FP32, network)
    if weights.matrices:
        clock = _muon(clock, weights.matrices, config.optimizer.newton_schulz_steps, rates, network, efficiency)
    return max(planned.seconds.host, float(clock.max()) + rest / efficiency)


def _reduced(config: Config, planned: Plan, clock: np.ndarray, backward: float, network: Network) -> np.ndarray:
    """When each rank has its gradients: `clock` is the end of its last backward, which takes it `backward` seconds."""
    ranks = len(clock)
    sent = np.zeros(ranks)
    for after, window in gradient_windows(config, ranks, planned.stage):
        sent = np.maximum(sent, clock - (1 - after) * backward)
        size = FP32 * window.elements
        if window.kind == "all_reduce":
            sent = _all_reduce(sent, size, network)
        else:
            sent = _ring(sent, size / ranks, ranks - 1, network)
    return np.maximum(clock, sent)


def _waited(config: Config, planned: Plan, rates: Rates, network: Network, efficiency: float) -> np.ndarray:
    """Seconds for which each rank's first forward waits for the weights that the step before has updated."""
    ranks = planned.ranks
    come, waited = np.zeros(ranks), np.zeros(ranks)
    for needed, collective in needed_weights(config, rates, planned.extent, ranks, efficiency):
        size = collective.itemsize * collective.elements
        if collective.kind == "all_reduce":
            come = _all_reduce(come, size, network)
        else:
            come = _ring(come, size / ranks, ranks - 1, network)
        waited = np.maximum(waited, come - needed)
    return waited


def _all_reduce(clock: np.ndarray, size: float, network: Network) -> np.ndarray:
    """The faster of ring and tree, as NCCL picks it."""
    ranks = len(clock)
    if ranks == 1:
        return clock
    ring = _ring(clock, size / ranks, 2 * (ranks - 1), network)
    tree = clock.max() + tree_time(size, ranks, network.hop(ranks), network.bandwidth(ranks))
    return ring if ring.max() <= tree else np.full(ranks, tree)


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
    messages = [(holder, owner, EXCHANGED * elements) for holder, owner, elements in travelling(matrices, ranks)]
    busy = np.zeros(ranks)
    for exchange in exchanges(matrices, ranks):
        for owner, shape in zip(exchange.owners, exchange.shapes, strict=True):
            busy[owner] += _seconds(newton_schulz_op(*shape, steps), rates) / efficiency
    clock = _deliver(clock, messages, network)
    back = [(owner, holder, size) for holder, owner, size in messages]
    return _deliver(clock + busy, back, network)


def _seconds(op: Op, rates: Rates) -> float:
    """Of an operator without weights of its own, whose matrices are its bytes: the slower of its two limits."""
    return max(op.forward / rates.matmul, op.forward_bytes / rates.copy)


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
