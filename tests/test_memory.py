"""Memory of a step: where the passes are the peak, against what traced steps hold; what else counts, by hand."""

from __future__ import annotations

import pytest
import torch
from test_chunks import small
from test_counts import CPU, SMALL
from traced_step import traced_peak

from unite_fast.analysis import memory as memory_module
from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.counts import step_parts
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.memory import WORKING_SHARE, Memory, pass_activations, perceptual_working, predict
from unite_fast.analysis.parts import Op, Part
from unite_fast.analysis.update import network_of
from unite_fast.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from unite_fast.engine.fp8 import eligible
from unite_fast.modality import modality_of
from unite_fast.objective import perceptual
from unite_fast.objective.perceptual import Lpips
from unite_kernels import fp8

SINGLE = {"flow_draws": 1, "draws_per_chunk": 1}
FOUR_TOGETHER = {"flow_draws": 4, "draws_per_chunk": 4}
RECOMPUTED = {"checkpoint_activations": True}
MUON, ADAMW = 215_318_016, 2_325_600  # elements of B
ALIKE = 42_467_328  # those of its most matrices of one shape: 12 of 4608 × 768
BUCKET = 25_000_000  # elements through which gradients are reduced, two at a time under ZeRO 0 to 2


def with_fp8(config: Config, on: bool) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"fp8": on})})


@pytest.mark.parametrize(
    ("modality", "size", "micro_batches", "model", "objective", "eight"),
    [
        ("images", 4, 1, {}, SINGLE, False),
        ("images", 4, 2, {}, SINGLE, False),
        ("images", 8, 1, {}, FOUR_TOGETHER, False),
        ("images", 8, 1, {"shared": False}, SINGLE, False),
        ("images", 8, 1, {}, SINGLE | {"stop_gradient": False}, False),
        ("images", 8, 1, RECOMPUTED, SINGLE, False),
        ("images", 8, 1, {}, SINGLE, True),
        ("images", 8, 1, {}, FOUR_TOGETHER, True),
        ("images", 8, 1, RECOMPUTED, SINGLE, True),
        ("molecules", 2, 1, {}, SINGLE, False),
        ("molecules", 4, 1, RECOMPUTED, SINGLE, False),
    ],
    ids=[
        "first pass", "two micro-batches", "second pass", "separate", "through z0", "recomputed", "fp8",
        "second pass in fp8", "recomputed in fp8", "molecules", "molecules recomputed",
    ],
)  # fmt: skip
def test_predicted_memory_is_what_a_traced_step_holds(
    gpu_memory, monkeypatch, modality, size, micro_batches, model, objective, eight
):
    """Within 5 %: gradients count from when they are made, activations until they are read."""
    # As on a GPU, whose products in FP8 use nothing aside.
    monkeypatch.setattr(fp8, "_product", lambda a, b, *rest, fast: a.new_empty(len(a), len(b), dtype=rest[2]))
    config = with_fp8(small(modality, model=model, **objective), eight)
    config = config.model_copy(update={"optimizer": OptimizerConfig(kind="adamw")})  # whose update needs nothing
    extent = modality_of(config).largest(config, size)
    memory = predict(config, extent=extent, dtype="fp32", device="cpu", single=micro_batches == 1)
    resting = memory.state - memory.gradients
    assert resting + traced_peak(config, size, micro_batches) == pytest.approx(memory.peak, rel=0.05)


@pytest.mark.parametrize(
    ("model", "least", "most"), [({}, 0.8, 0.9), (RECOMPUTED, 1.0, 1.001)], ids=["kept", "recomputed"]
)
def test_fp8_saves_what_linears_keep(model, least, most):
    """And keeps their weights in eight bits, along either side."""
    on, off = (with_fp8(small("images", model=model, **SINGLE), flag) for flag in (True, False))
    with_it, without = (predict(run, extent=modality_of(run).largest(run, 8), dtype="fp32") for run in (on, off))
    assert with_it.state == without.state and least <= with_it.activations / without.activations <= most
    linears = [(n, m) for n, m in network_of(on.model).named_modules() if isinstance(m, torch.nn.Linear)]
    assert without.casts == 0 < with_it.casts == 2 * sum(m.weight.numel() for n, m in linears if eligible(n, m))


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lpips_uses_what_is_counted(gpu_memory, monkeypatch, device, side):
    """Within 6 % of what the allocator saw (torch 2.11: 5.2 %), of which less than half is kept for the backward."""
    monkeypatch.setattr(perceptual, "use_triton", lambda x: device == "cuda")
    network, batch = Lpips().to(memory_format=torch.channels_last), 4
    target, image = torch.rand(2, batch, 3, side, side)
    image.requires_grad_()
    model = ModelConfig(**SMALL | {"image_size": side})
    part = step_parts(model, ObjectiveConfig(), dtype="fp32", device=device)["lpips"]
    found = peak_allocated(lambda: network(target, image).backward(), CPU)
    assert found == pytest.approx(batch * part.saved + perceptual_working(part, batch), rel=0.06)
    assert batch * part.saved < 0.5 * found


@pytest.mark.parametrize(("dtype", "held"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_lpips_weights_are_held_in_the_dtype_of_products(dtype, held):
    network = Lpips()
    network.features.cast(held)
    config = small("images", lpips={"weight": 1.0, "vgg": "-", "linear": "-"}, **SINGLE)
    predicted = predict(config, extent=modality_of(config).largest(config, 4), dtype=dtype)
    bytes_held = sum(parameter.numel() * parameter.itemsize for parameter in network.parameters())
    assert predicted.frozen == pytest.approx(bytes_held, rel=1e-3)  # biases are not counted


def test_gradients_that_come_later_are_never_more_than_there_are():
    for chunk in (1, 4):
        for size in (1, 64):
            config = small("images", flow_draws=4, draws_per_chunk=chunk)
            extent = modality_of(config).largest(config, size)
            single, several = (predict(config, extent=extent, single=flag) for flag in (True, False))
            assert several.later == 0 <= single.later <= single.gradients
            assert single.state + single.last <= single.peak <= several.peak
            assert predict(config, extent=extent, stage=3, single=True).later == 0


def of_b(stage: int, ranks: int, *, kind: str = "muon", precision: str = "bf16") -> Memory:
    values = {
        "model": {"preset": "B"}, "objective": {"flow_draws": 1, "draws_per_chunk": 1}, "optimizer": {"kind": kind},
        "train": {"steps": 1, "global_batch": 64, "micro_batch": 4, "precision": precision},
        "data": {"path": "unused"},
    }  # fmt: skip
    return predict(Config.parse(values), extent=Extent(4), ranks=ranks, stage=stage)


def test_gradients_are_reduced_through_buckets_into_a_rank_s_slice():
    total = MUON + ADAMW
    assert of_b(0, 1).buffers == 0
    assert of_b(0, 4).buffers == 4 * 2 * BUCKET
    for stage in (1, 2):
        assert of_b(stage, 1).buffers == 4 * (2 * BUCKET + total)
        assert of_b(stage, 4).buffers == 4 * (2 * BUCKET + total / 4)
    assert of_b(3, 4, kind="adamw").buffers == 4 * (BUCKET + total / 4)
    tiny = small("images", **SINGLE)
    tiny = tiny.model_copy(update={"optimizer": OptimizerConfig(kind="adamw")})  # whose gradients are one window
    extent = modality_of(tiny).largest(tiny, 1)
    found = [predict(tiny, extent=extent, ranks=2, stage=stage) for stage in (0, 3)]
    assert found[0].buffers == found[0].gradients
    assert found[1].buffers == pytest.approx(1.5 * found[1].gradients, rel=1e-3)


def test_zero_3_keeps_so_many_gathered_elements_at_most(monkeypatch):
    total = MUON + ADAMW
    assert of_b(3, 4, kind="adamw").weights == 4 * (total + 2 * total / 4)
    monkeypatch.setattr(memory_module, "LIVE_ELEMENTS", 1000)
    assert of_b(3, 4, kind="adamw").weights == 4 * (1000 + 2 * total / 4)
    assert of_b(2, 4).weights == 4 * (total + total / 4)


def test_an_update_holds_matrices_of_a_batch_besides(monkeypatch):
    """In bfloat16, three times inside Newton-Schulz; of a slice those before and after besides."""
    assert of_b(0, 4, kind="adamw").update == 0
    assert of_b(0, 4).update == 2 * (MUON + 3 * ALIKE)
    assert of_b(1, 1).update == of_b(2, 1).update == 2 * (3 * MUON + 3 * ALIKE)
    assert of_b(1, 4).update == 2 * (3 * MUON / 4 + 3 * ALIKE)
    assert of_b(1, 32, precision="fp32").update == 2 * (3 * MUON / 32 + 3 * MUON / 32)  # less than a batch
    for most, together in ((20_000_000, 20_000_000), (1000, 4608 * 768)):
        monkeypatch.setattr(memory_module, "BATCH_ELEMENTS", most)
        assert of_b(0, 4).update == 2 * (MUON + 3 * together)


def test_updated_weights_that_are_not_received_in_place_arrive_in_buffers():
    """Muon's in bfloat16, and what else of their groups is read in float32; nothing in float32, nor under ZeRO 0."""
    rounded = of_b(1, 32).update
    assert rounded == of_b(2, 32).update and 2 * MUON < rounded < 1.02 * 2 * MUON
    assert of_b(1, 32, precision="fp32").update < 0.2 * rounded
    assert of_b(1, 32, kind="adamw").update == of_b(3, 32, kind="adamw").update == 0


def test_a_recomputed_pass_keeps_two_inputs_a_block_and_one_block():
    ops = (
        Op("patches", saved=100), Op("qkv", saved=10, block=0), Op("mlp in", saved=50, block=0),
        Op("qkv", saved=10, block=1), Op("mlp in", saved=80, block=1), Op("qkv", saved=1000),
    )  # fmt: skip
    assert pass_activations(Part("tokenize", ops, True, 2)) == 1100 + 2 * (10 + 10) + 90
    assert pass_activations(Part("tokenize", ops, False, 2)) == 1250


def test_lpips_counts_where_it_uses_more_than_operators_do(monkeypatch):
    config = small("images", lpips={"weight": 1.0, "vgg": "-", "linear": "-"}, **SINGLE)

    def activations(used: float) -> int:
        monkeypatch.setattr(memory_module, "perceptual_working", lambda part, images: used)
        return predict(config, extent=modality_of(config).largest(config, 8)).activations

    kept = activations(0) / (1 + WORKING_SHARE)
    assert activations(WORKING_SHARE * kept) == pytest.approx(activations(0), abs=2)
    assert activations(0.5 * kept) == pytest.approx((1.5 - WORKING_SHARE) * activations(0), rel=1e-6)
