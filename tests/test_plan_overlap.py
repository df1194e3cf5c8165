"""What of a plan's communication is hidden, by hand: what leaves when, what is needed when, what is sent at all."""

from __future__ import annotations

import pytest
from test_plan_numbers import ADAMW, H100, MUON, config

from unite_fast.analysis.chunks import with_chunk
from unite_fast.analysis.devices import Network
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.overlap import arrivals, departures
from unite_fast.analysis.parts import Rates
from unite_fast.analysis.planning import gradient_windows, needed_weights, step_time
from unite_fast.analysis.update import network_of
from unite_fast.config import ModelConfig
from unite_fast.modality import modality_of

# B: twelve blocks of the encoder and of the decoder each, of the encoder with a modulation for each, see the tests.
BLOCK, MODULATION, DECODER = 7_077_888, 3_538_944, 86_138_880
MLP_IN = (3 + 1) * 768**2 / BLOCK  # share of a block before its MLP: the attention's two products


@pytest.mark.parametrize(("stage", "fp8"), [(0, False), (1, False), (2, True)])
def test_on_slow_links_all_that_is_sent_takes_its_time(stage, fp8):
    """Where compute hides next to nothing. Muon's weights come in bfloat16, but not for FP8, which rounds float32."""
    made = with_chunk(config(train={"micro_batch": 1, "fp8": fp8}), 14)
    slow = Network(per_node=8, node_link=1e6, link=1.0, node_latency=0.0, latency=0.0, share=1.0)
    found = step_time(made, H100.rates, slow, 8, stage, Extent(1), 1, 1.0, 0.0)
    once = 7 / 8 / 1e6  # seconds of a byte that goes around a ring of eight
    assert found.gradients == pytest.approx(4 * (MUON + ADAMW) * once * (1 if stage else 2), rel=1e-3)
    network = network_of(made.model)
    # Some of Muon's matrices are read in float32 as well: these go whole beside their rounded ones, an all-reduce.
    exact = sum(network.get_parameter(name).numel() for name in network.float32_matrices())
    weights = 4 * (MUON + ADAMW) if fp8 else 2 * MUON + 4 * ADAMW + 2 * 4 * exact
    assert found.weights == pytest.approx(weights * once if stage else 0, rel=1e-3)
    assert (found.exchange > 0) is (stage > 0)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize(("stage", "kind"), [(0, "all_reduce"), (1, "reduce_scatter"), (2, "reduce_scatter")])
def test_windows_of_gradients_are_those_of_the_last_backward(stage, kind, stop_gradient):
    """The decoder's leave at once where the last backward is the flow's, which does not read it."""
    made = with_chunk(config(objective={"stop_gradient": stop_gradient}), 1)
    windows = gradient_windows(made, 8, stage)
    assert {window.kind for _, window in windows} == {kind}
    assert sum(window.elements for _, window in windows) == pytest.approx(MUON + ADAMW, rel=1e-4)
    at_once = sum(window.elements for after, window in windows if after == 0)
    assert 0.6 * DECODER < at_once <= DECODER if stop_gradient else at_once == 0


def test_a_window_leaves_when_the_backward_has_passed_its_last_parameter():
    """The blocks last to first, each by its matrices: a modulation, made ahead of the block before, takes no time."""
    sent = 0
    for after, elements in departures(ModelConfig(preset="B"), "muon", ranks=8, stage=0)[:-1]:  # but for AdamW's
        sent += elements
        blocks = min(1.0, max(0, sent - DECODER) / BLOCK)
        whole, rest = divmod(max(0, sent - DECODER - BLOCK), BLOCK + MODULATION)
        blocks = min(12.0, blocks + whole + min(1.0, rest / BLOCK))
        assert blocks / 12 - 0.005 <= after <= blocks / 12 + 0.04  # a parameter, of which a window has only a piece


def test_weights_are_needed_when_the_forward_comes_to_their_first():
    """Flat groups of a quarter each: they begin with the MLPs of blocks 4 and 9, and of the decoder's block 4."""
    found = arrivals(with_chunk(config(), 1), ranks=8)
    assert [part for _, part, _ in found] == ["tokenize"] * 5 + ["decode"]
    begin = [(block + MLP_IN) / 12 for block in (4, 9, 4)]
    assert [before for *_, before in found] == pytest.approx([0.01, 0, 0.01, *begin], abs=0.008)


def test_weights_that_pass_one_does_not_read_are_needed_when_it_ends():
    made = with_chunk(config(model={"preset": "B", "shared": False}), 1)
    counted = modality_of(made).counted(made, Extent(2), dtype="bf16", device="cuda")
    # Where operations alone limit, at half of the rate.
    tokenize, decode = (2 * counted[name][0].forward / 0.5e12 for name in ("tokenize", "decode"))
    found = arrivals(made, ranks=8)
    needed = [at for at, _ in needed_weights(made, Rates(1e12, 1e30), Extent(2), 8, 0.5)]
    (late,) = (index for index, (gathered, *_) in enumerate(found) if set(map(owner, gathered.names)) == {"denoiser"})
    assert needed[late] == pytest.approx(tokenize + decode)
    assert needed[-1] == pytest.approx(tokenize, rel=1e-4)  # the decoder's first, which is sent last
    assert all(at < tokenize for at in needed[:late])


def owner(name: str) -> str:
    return name.partition(".")[0]
