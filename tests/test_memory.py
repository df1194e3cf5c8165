"""Memory where the passes are the peak: what is predicted against what traced steps hold."""

from __future__ import annotations

import pytest
import torch
from test_chunks import small
from test_counts import CPU, SMALL
from traced_step import traced_peak

from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.counts import step_parts
from unite_fast.analysis.memory import perceptual_working, predict
from unite_fast.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from unite_fast.modality import modality_of
from unite_fast.objective import perceptual
from unite_fast.objective.perceptual import Lpips

SINGLE = {"flow_draws": 1, "draws_per_chunk": 1}
RECOMPUTED = {"checkpoint_activations": True}


@pytest.mark.parametrize(
    ("modality", "size", "micro_batches", "model", "objective"),
    [
        ("images", 4, 1, {}, SINGLE),
        ("images", 4, 2, {}, SINGLE),
        ("images", 8, 1, {}, {"flow_draws": 4, "draws_per_chunk": 4}),
        ("images", 8, 1, {"shared": False}, SINGLE),
        ("images", 8, 1, {}, SINGLE | {"stop_gradient": False}),
        ("images", 8, 1, RECOMPUTED, SINGLE),
        ("molecules", 2, 1, {}, SINGLE),
        ("molecules", 4, 1, RECOMPUTED, SINGLE),
    ],
    ids=[
        "first pass", "two micro-batches", "second pass", "separate", "through z0", "recomputed", "molecules",
        "molecules recomputed",
    ],
)  # fmt: skip
def test_predicted_memory_is_what_a_traced_step_holds(gpu_memory, modality, size, micro_batches, model, objective):
    """Within 5 %: gradients count from when they are made, activations until they are read."""
    config = small(modality, model=model, **objective)
    config = config.model_copy(update={"optimizer": OptimizerConfig(kind="adamw")})  # whose update needs nothing
    extent = modality_of(config).largest(config, size)
    memory = predict(config, extent=extent, dtype="fp32", device="cpu", single=micro_batches == 1)
    resting = memory.state - memory.gradients
    assert resting + traced_peak(config, size, micro_batches) == pytest.approx(memory.peak, rel=0.05)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lpips_uses_what_is_counted(gpu_memory, monkeypatch, device, side):
    """Within 5 % of what the allocator saw, of which less than half is kept for the backward."""
    monkeypatch.setattr(perceptual, "use_triton", lambda x: device == "cuda")
    network, batch = Lpips().to(memory_format=torch.channels_last), 4
    target, image = torch.rand(2, batch, 3, side, side)
    image.requires_grad_()
    model = ModelConfig(**SMALL | {"image_size": side})
    part = step_parts(model, ObjectiveConfig(), dtype="fp32", device=device)["lpips"]
    found = peak_allocated(lambda: network(target, image).backward(), CPU)
    assert found == pytest.approx(batch * part.saved + perceptual_working(part, batch), rel=0.05)
    assert batch * part.saved < 0.5 * found


def test_gradients_that_come_later_are_never_more_than_there_are():
    for chunk in (1, 4):
        for size in (1, 64):
            config = small("images", flow_draws=4, draws_per_chunk=chunk)
            extent = modality_of(config).largest(config, size)
            single, several = (predict(config, extent=extent, single=flag) for flag in (True, False))
            assert several.later == 0 <= single.later <= single.gradients
            assert single.state + single.last <= single.peak <= several.peak
            assert predict(config, extent=extent, stage=3, single=True).later == 0
