"""The examples run, and what they claim holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_testing import DEVICE, on_backend
from scripts import load_script

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "dit_block.py"


@pytest.fixture(scope="module")
def example():
    return load_script(EXAMPLE)


@pytest.fixture
def blocks(example):
    """Both blocks with a small input and condition."""
    before, after = example.make_blocks(width=48, heads=3, dtype=torch.float32, device=DEVICE)
    x, condition = torch.randn(2, 7, 48, device=DEVICE), torch.randn(2, 48, device=DEVICE)
    return before, after, x, condition


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dit_block_agrees(example, blocks, backend):
    with on_backend(backend):
        assert example.largest_error(*blocks) <= 1


@pytest.mark.parametrize("fault", [0.01, float("nan")])
def test_dit_block_tells_a_fault(example, blocks, fault, monkeypatch):
    fused = example.layer_norm_modulate
    monkeypatch.setattr(example, "layer_norm_modulate", lambda *inputs: fused(*inputs) + fault)
    assert example.largest_error(*blocks) > 1


def test_dit_block_times_both(example, blocks):
    times = example.compare_speed(*blocks, rounds=3)
    assert list(times) == ["before", "after"]
    assert all(0 < low <= median <= high for low, median, high in times.values())


def test_dit_block_as_a_program(example, capsys):
    example.main()
    printed = capsys.readouterr().out
    assert "outputs and gradients agree" in printed
    assert "times as fast as before" in printed
    assert ("No kernel runs on a CPU" in printed) == (DEVICE == "cpu")
