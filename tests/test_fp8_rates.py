"""What plan and profile make of train.fp8: the operations that it takes at a rate of their own, MFU as it was."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn
from cli_toy import mistake, run

from unite_fast.analysis import profiling
from unite_fast.analysis.devices import GPUS, Network, find_gpu
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.parts import Part, Rates, linear_op
from unite_fast.analysis.planning import compute_time, fp8_share, plan
from unite_fast.analysis.update import network_of
from unite_fast.config import Config
from unite_fast.engine import fp8
from unite_fast.modality import modality_of

CPU = torch.device("cpu")
H100 = find_gpu("h100-80")
NODES = Network(8, H100.link, 50e9)
FILES = {name: f"configs/{name}.json" for name in ("b_h100", "l_h100", "qm9_s", "quickstart")}


def with_fp8(name: str, on: bool = True) -> Config:
    return Config.load(FILES[name], [f"train.fp8={json.dumps(on)}", "objective.draws_per_chunk=2"])


def extent(config: Config) -> Extent:
    return modality_of(config).population(config).mean(8)


@pytest.mark.parametrize("name", FILES)
def test_the_counted_rows_are_the_linears_that_are_converted(name):
    """Row by row: each FP8 row has one converted Linear's number of weights, in the model's order."""
    config = with_fp8(name)
    linears = [(n, m) for n, m in network_of(config.model).named_modules() if isinstance(m, nn.Linear)]
    parts = modality_of(config).counted(config, extent(config), dtype="bf16", device="cuda")
    for part, side in (("tokenize", "encoder."), ("decode", "decoder."), ("denoise", "encoder.")):
        converted = [m.weight.numel() for n, m in linears if n.startswith(side) and fp8.eligible(n, m)]
        assert [op.weights for op in parts[part][0].ops if op.fp8] == converted, part


def test_shares():
    assert fp8_share(with_fp8("b_h100", on=False), Extent(8)) == 0
    few = ["train.fp8=true", "objective.flow_draws=3"]
    for name, documented in (("b_h100", 0.81), ("l_h100", 0.90)):  # docs/performance.md, see test_fp8.py
        assert fp8_share(Config.load(FILES[name], few), Extent(8)) == pytest.approx(documented, abs=0.005)


@pytest.mark.parametrize("name", FILES)
def test_floors_take_the_rate_for_what_runs_at_it(name):
    """Where operations alone limit, a rate twice as high saves half of the share that takes it."""
    on, off = (with_fp8(name, on=flag) for flag in (True, False))
    size, compute = extent(on), Rates(1e9, 1e30, 2e9)
    saved = 1 - compute_time(on, compute, size) / compute_time(off, compute, size)
    assert saved == pytest.approx(fp8_share(on, size) / 2, rel=1e-6)
    assert compute_time(off, compute, size) == compute_time(off, compute._replace(fp8=None), size)
    # Emulated, as on a CPU, it takes what it takes without.
    assert compute_time(on, compute._replace(fp8=None), size) == compute_time(off, compute, size)


def test_moved_bytes_are_those_of_the_operands():
    """One Linear of a block: the casts of its input and gradient, and what its products read of eight bits."""
    rows, inputs, outputs, weights = 64, 768, 2304, 768 * 2304
    part = Part("tokenize", (linear_op("qkv", rows, inputs, outputs, 2),), False, 2, fp8=True)
    x, y = 3 * rows * inputs, 3 * rows * outputs  # numbers of three images
    forward, backward = part.forward_bytes(3), part.backward_bytes(3)
    assert forward == (2 + 2 + 1 + 1) * x + x + weights + 2 * y
    # The gradient of the output is cast once, both products read it; those of the input and of the weight are written.
    assert backward == (2 + 2 + 1 + 1) * y + 2 * y + weights + 2 * x + x + 2 * 4 * weights
    assert part.floor(3, Rates(1e30, 1.0, 2e30)) == pytest.approx((forward, backward))
    # Products beside casts: where operations limit, both take their time.
    products, casts = part.ops[0].forward * 3 / 1e12, 6 * x / 1e12
    assert part.floor(3, Rates(0.5e12, 1e12, 1e12))[0] == pytest.approx(products + casts)
    plain = Part("tokenize", part.ops, False, 2)
    assert plain.forward_bytes(3) == 2 * (x + y + weights)
    assert part.floor(3, Rates(1e30, 1.0)) == plain.floor(3, Rates(1e30, 1.0)), "emulated"


def test_gpus_have_the_rate_or_none():
    without = {gpu.name for gpu in GPUS if gpu.fp8 is None}
    assert without == {"a100-40", "a100-40-pcie", "a100-80", "rtx3090"}  # of compute capability 8.0 and 8.6
    for gpu in GPUS:
        if gpu.fp8 is None:
            assert gpu.rates.fp8 is None
        else:
            assert gpu.fp8 == pytest.approx(2 * gpu.matmul, rel=0.02)
            assert gpu.rates.fp8 / gpu.fp8 == pytest.approx(gpu.rates.matmul / gpu.matmul)
    assert H100.fp8 == find_gpu("h200").fp8 == 1979e12


def test_a_plan_is_faster_by_it_and_mfu_with_it():
    plans = {}
    for flag in (True, False):
        config = with_fp8("b_h100", on=flag)
        plans[flag] = {stage: plan(config, H100, NODES, ranks=8, stage=stage) for stage in (1, 3)}
    with_it, without = plans[True][1], plans[False][1]
    assert with_it.micro_batch == without.micro_batch
    assert 0.9 < with_it.seconds.total / without.seconds.total < 1  # on an H100, see docs/performance.md
    assert with_it.mfu / without.mfu == pytest.approx(without.seconds.total / with_it.seconds.total)
    assert plans[True][3] == plans[False][3], "ZeRO 3 refuses FP8"


def test_the_command_says_it_and_refuses_gpus_without(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["plan", "--preset", "B", "--set", "train.fp8=true", "--set", "objective.flow_draws=3"]
    assert run(*options) == 0
    printed = capsys.readouterr().out
    assert "train.fp8: 81% of the passes' operations in FP8 at 1581 of 1979 TFLOP/s (assumed" in printed
    assert "MFU stays relative to the bf16 peak" in printed
    says = mistake(capsys, *options, "--gpu", "a100-80")
    assert "train.fp8 needs a GPU with FP8 products (b200, h200," in says and "a100-80 has none" in says


def test_a_profile_measures_the_rate_where_there_is_one(monkeypatch):
    monkeypatch.setattr(profiling, "MATMUL_SIDE", {"cpu": 32})
    monkeypatch.setattr(profiling, "COPY_BYTES", {"cpu": 2**16})
    assert profiling.measure_rates(CPU, torch.float32, fp8=True).fp8 is None  # emulated
    assert profiling.fp8_rate(CPU) > 0
