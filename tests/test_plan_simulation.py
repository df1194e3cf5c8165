"""The simulation behind `unite-fast plan`: its messages by hand, and whole steps, which are the formulas'."""

from __future__ import annotations

import numpy as np
import pytest

from unite_fast.analysis.devices import Network, find_gpu
from unite_fast.analysis.parts import Rates
from unite_fast.analysis.planning import plan
from unite_fast.analysis.simulation import _all_reduce, _deliver, _muon, _ring, simulate
from unite_fast.analysis.update import newton_schulz_operations
from unite_fast.config import Config

H100 = find_gpu("h100-80")
# Two GPUs a node; a half of the stated bytes a second is reached. 4 bytes take 8 s inside a node, 32 s through an
# adapter, and 16 s in a ring between nodes, which has two of them.
PAIRS = Network(per_node=2, node_link=1.0, link=0.25, node_latency=1.0, latency=3.0, share=0.5)


def config(kind: str, **sections) -> Config:
    return Config.parse(
        {
            "model": {"preset": "B"},
            "objective": {"flow_draws": 2, "lpips": {"weight": 0.0}},
            "optimizer": {"kind": kind},
            "train": {"steps": 1, "global_batch": 64, "micro_batch": 4},
            "data": {"path": "unused"},
        }
        | sections
    )


def test_a_ring_waits_for_its_neighbours():
    """Rank i sends to i + 1; from 1 to 2 and from 3 to 0 the message leaves its node."""
    assert _ring(np.zeros(4), 4.0, 1, PAIRS).tolist() == [19, 16, 19, 16]
    assert _ring(np.zeros(4), 4.0, 2, PAIRS).tolist() == [35, 32, 35, 32]
    assert _ring(np.array([0.0, 0.0, 0.0, 100.0]), 4.0, 1, PAIRS).tolist() == [119, 16, 19, 116]
    assert _ring(np.zeros(3), 4.0, 1, PAIRS).tolist() == [19, 16, 19]  # the third is alone in its node
    assert _ring(np.zeros(2), 4.0, 1, PAIRS).tolist() == [9, 9]  # neither leaves it
    assert _ring(np.zeros(2), 4.0, 3, PAIRS._replace(per_node=8)).tolist() == [27, 27]
    assert _ring(np.ones(1), 4.0, 1, PAIRS).tolist() == [1]


def test_an_all_reduce_takes_the_faster_algorithm():
    """Eight hops of a tree in place of 30 of a ring, whose pieces are smaller."""
    flat = Network(per_node=16, node_link=1.0, link=1.0, node_latency=1.0, latency=1.0, share=1.0)
    clock = np.arange(16.0)
    assert _all_reduce(clock, 0.25, flat).tolist() == [15 + 2 * (4 + 0.25)] * 16
    ring = _all_reduce(np.zeros(16), 1024.0, flat)
    assert ring.tolist() == [30 * (1 + 64)] * 16 and ring[0] < 2 * (4 + 1024)


def test_messages_queue_at_sender_and_receiver():
    assert _deliver(np.zeros(4), [(0, 1, 4)], PAIRS).tolist() == [8, 9, 0, 0]
    assert _deliver(np.zeros(4), [(0, 2, 4)], PAIRS).tolist() == [32, 0, 35, 0]  # one adapter, not the node's two
    assert _deliver(np.zeros(4), [(0, 1, 4), (0, 3, 1)], PAIRS).tolist() == [16, 9, 0, 19]
    assert _deliver(np.zeros(4), [(0, 1, 4), (2, 1, 1)], PAIRS).tolist() == [8, 20, 17, 0]
    assert _deliver(np.array([0.0, 50.0, 0.0, 0.0]), [(0, 1, 4)], PAIRS).tolist() == [58, 59, 0, 0]


def test_a_matrix_goes_to_its_owner_and_back():
    """Of 4 × 8 elements two ranks hold 16 each; the second sends its 32 bytes, and gets as many."""
    message, bytes_moved = 32 / 0.5, 5 * 2 * (3 * 32 + 4 * 16)
    # Once the products limit it, once what they read and write.
    for rates in (Rates(newton_schulz_operations(4, 8, 5), 1e9), Rates(1e9, bytes_moved)):
        found = _muon(np.zeros(2), ((4, 8),), 5, rates, PAIRS, 0.25)
        assert found.tolist() == [message + 1 + 4 + message, message + 1 + 4 + message + 1]


@pytest.mark.parametrize(("kind", "stage"), [("muon", 0), ("adamw", 0), ("adamw", 1), ("adamw", 2), ("muon", 1)])
@pytest.mark.parametrize("link", [1e9, 1e11])
def test_steps_of_one_node_are_the_formulas(kind, stage, link):
    """Nothing queues there but matrices, and all hops are alike: a difference would be a mistake in one of the two."""
    network = Network(per_node=8, node_link=link, link=1.0)
    made = config(kind)
    planned = plan(made, H100, network, ranks=8, stage=stage, efficiency=0.4, launch=1e-9)
    seconds = planned.seconds
    assert planned.accumulation == 2 and seconds.gradients > 0 and (seconds.weights > 0) == (stage > 0)
    queues = simulate(made, planned, H100.rates, network, efficiency=0.4) - seconds.total
    assert -1e-9 * seconds.total <= queues <= 1e-9 * seconds.total + 0.3 * seconds.exchange
