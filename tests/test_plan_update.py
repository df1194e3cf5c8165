"""What an update is counted to move and compute, and the matrices that travel for it, by hand."""

from __future__ import annotations

import pytest
from test_plan_numbers import ADAMW, MUON, config

from unite_fast.analysis.overlap import departures
from unite_fast.analysis.update import (
    collectives,
    exchange_elements,
    gathered_weights,
    newton_schulz_op,
    newton_schulz_operations,
    trained_weights,
    travelling,
    update_part,
    window_elements,
)
from unite_fast.config import ModelConfig, OptimizerConfig

B = ModelConfig(preset="B")
MATRICES = trained_weights(B, "muon").matrices


def moved(**options) -> dict[str, float]:
    """Bytes of each operator of an update with one average beside the long one, all of Newton-Schulz together."""
    found: dict[str, float] = {}
    for op in update_part(B, OptimizerConfig(ema_decays=[0.9], newton_schulz_steps=3), **options).ops:
        found[op.name] = found.get(op.name, 0) + op.forward_bytes
    return found


def products(rows: int, columns: int, steps: int) -> int:
    """Operations of X Xᵀ, of its polynomial and of that times X, as many times."""
    short, long = min(rows, columns), max(rows, columns)
    return steps * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp32", 4)])
def test_an_update_of_one_rank(dtype, width):
    tall = sum(rows * columns for rows, columns in MATRICES if rows > columns)
    short = sum(min(shape) ** 2 for shape in MATRICES)
    assert moved(dtype=dtype) == {
        "gradient norm": 4 * (MUON + ADAMW),
        "clip, momentum, Nesterov": (3 * 4 + width) * MUON,
        "normalisation": 3 * width * MUON,
        "Newton-Schulz": 3 * width * (3 * MUON + 4 * short),
        "tall matrices turned back": 2 * width * tall,
        "Muon's step and EMA": (width + 2 * 4 + 2 * 2 * 4) * MUON,  # the weight and two averages, read and written
        "AdamW": (2 + 7) * 4 * ADAMW,
        "EMA of AdamW's": 2 * 3 * 4 * ADAMW,
    }
    assert moved(stage=0, ranks=8) == moved()


def test_an_update_of_the_busiest_of_eight_ranks():
    """A slice of the weights, which pads to a few elements more; its matrices are up to a tenth more than an eighth."""
    whole, found = moved(), moved(stage=1, ranks=8)
    assert found.pop("matrices of slices") == pytest.approx(5 * 2 * MUON / 8, rel=1e-5)
    ratio = {name: found[name] / whole[name] for name in whole}
    uneven = {name: ratio.pop(name) for name in ("normalisation", "Newton-Schulz", "tall matrices turned back")}
    assert ratio == pytest.approx(dict.fromkeys(ratio, 1 / 8), rel=1e-5)
    assert 1 / 8 <= uneven["Newton-Schulz"] < 1.1 / 8 and 1 / 8 <= uneven["normalisation"] < 1.1 / 8
    part = update_part(B, OptimizerConfig(newton_schulz_steps=3), stage=1, ranks=8)
    assert 1 / 8 <= part.forward / sum(products(*shape, 3) for shape in MATRICES) < 1.1 / 8


def test_long_matrices_take_the_gram_matrix_in_float32_alone():
    assert newton_schulz_operations(8, 24, 5) == newton_schulz_operations(24, 8, 5) == products(8, 24, 5)
    alone = 2 * 2 * 8 * 8 * 24 + (4 * 2 * 5 - 6) * 8**3  # into the Gram matrix and out of it
    assert newton_schulz_operations(8, 24, 5, "fp32") == newton_schulz_op(8, 24, 5, "fp32").forward == alone
    assert newton_schulz_operations(8, 24, 9, "fp32") == products(8, 24, 9)


def test_pieces_of_matrices_go_to_one_of_their_holders():
    # One matrix on four ranks: three send their fourth of it to the first.
    assert list(travelling(((4, 8),), 4)) == [(1, 0, 8), (2, 0, 8), (3, 0, 8)]
    assert exchange_elements(((4, 8),), 4) == (24, 24, 3)
    assert exchange_elements(((4, 8), (4, 8)), 4) == (32, 16, 1)  # of two ranks each
    assert exchange_elements(((4, 8), (4, 8)), 2) == (0, 0, 0)
    total, busiest, messages = exchange_elements(MATRICES, 64)
    there, back = (item for item in collectives(config(), ranks=64, stage=1) if item.kind == "all_to_all")
    assert there[2:] == back[2:] == (total, busiest, messages, 2)  # bfloat16, as Newton-Schulz computes
    assert busiest < total / 10 and 1 < messages < 64


@pytest.mark.parametrize("ranks", [8, 256])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_windows_are_those_that_the_engine_sends(ranks, stage):
    windows = [window.elements for window in departures(B, "muon", ranks=ranks, stage=stage)]
    assert sorted(window_elements(trained_weights(B, "muon"), ranks, stage)) == sorted(windows)
    (gradients,) = (item for item in collectives(config(), ranks=ranks, stage=stage) if item.what == "gradients")
    assert (gradients.messages, gradients.elements) == (len(windows), sum(windows))


def test_one_rank_sends_nothing_and_rounds_nothing():
    assert all(collectives(config(), ranks=1, stage=stage) == [] for stage in range(4))
    assert {gathered.collective.itemsize for gathered in gathered_weights(config(), ranks=1)} == {4}
