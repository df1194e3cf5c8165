"""Counted operations against PyTorch's own counter on the real model, and counted activations against what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_testing import on_backend
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unite_fast.analysis.counts import image_operations, repeats, step_parts
from unite_fast.analysis.parts import Op, Part, Rates
from unite_fast.config import DecoderConfig, ModelConfig, ObjectiveConfig
from unite_fast.engine.fp8 import use_fp8
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.perceptual import Lpips
from unite_fast.objective.two_pass import Objective, two_pass_step

BATCH = 2
SMALL = dict(
    image_size=32, patch_size=8, registers=16, latent_dim=6, depth=3, width=48, heads=2, num_classes=3,
    context_len=4, context_start=1, decoder=dict(depth=3, width=32, heads=2, inner=24),
)  # fmt: skip
CPU = torch.device("cpu")


class Plain:
    """The engine's part in a step."""

    def __init__(self, model, dtype=None):
        self.model, self.dtype = model, dtype

    def __call__(self, phase, **inputs):
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            return self.model(phase, **inputs)

    def backward(self, loss, *, last):
        loss.backward()


def objective(model: Unite, *, lpips: bool = False, dtype: torch.dtype | None = None, **options) -> Objective:
    """LPIPS without files: the network with random weights."""
    options = {"draws_per_chunk": 1} | options
    made = Objective(ObjectiveConfig(lpips=dict(weight=0.0), **options), model.null_label, CPU, dtype)
    if lpips:
        torch.manual_seed(1)
        made.lpips = Lpips().to(memory_format=torch.channels_last)
        made.config = ObjectiveConfig(lpips=dict(weight=1.0), **options)
    return made


def step(model: Unite, goal: Objective, *, batch: int = BATCH, dtype: torch.dtype | None = None) -> None:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, config.image_size, config.image_size, generator=generator)
    labels = torch.zeros(batch, dtype=torch.int64)
    draws = SeededDraws(goal.config, seed=0, step=0, stream=0, device=CPU)
    shape = torch.Size((batch, config.registers, config.latent_dim))
    two_pass_step(Plain(model, dtype), goal, images, labels, draws, shape=shape)


@pytest.mark.parametrize(
    ("preset", "forward", "per_image"),
    [("B", (101, 47, 120, 50), {3: 1.02, 14: 2.67}), ("L", (355, 47, 120, 179), {3: 2.93, 14: 8.84})],
)
def test_published_sizes_have_the_known_floors(preset, forward, per_image):
    """Operations in units of 1e9 forward (LPIPS: two forwards and one backward), and 1e12 an image.

    In them the encoder's last block carries all its tokens to the end, as the block before it does.
    """
    model = ModelConfig(preset=preset, decoder=DecoderConfig(preset="B"))
    parts = step_parts(model, ObjectiveConfig())
    for name in ("tokenize", "denoise"):
        last = [op for op in parts[name].ops if op.block == model.depth - 2]
        rest = [op for op in parts[name].ops if op.block != model.depth - 1]
        parts[name] = replace(parts[name], ops=(*rest, *last))
    counted = [p.operations if name == "lpips" else p.forward for name, p in parts.items()]
    assert [round(count / 1e9 + (0.01 if preset == "B" else 0)) for count in counted] == pytest.approx(forward, abs=1)
    for draws, expected in per_image.items():
        total = sum(part.operations * repeats(name, ObjectiveConfig(flow_draws=draws)) for name, part in parts.items())
        assert total / 1e12 == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (dict(), dict(flow_draws=3, lpips=True)),
        (dict(), dict(flow_draws=2, draws_per_chunk=2, stop_gradient=False)),
        (dict(context_start=0, registers=5), dict(flow_draws=1)),
        (dict(context_len=0, shared=False), dict(flow_draws=1)),
        (dict(context_start=2, checkpoint_activations=True), dict(flow_draws=2)),
    ],
    ids=["lpips", "through z0", "queries", "separate", "recomputed"],
)
def test_operations_equal_pytorchs_counter(sizes, options):
    model = Unite(ModelConfig(**(SMALL | sizes)))
    goal = objective(model, **options)
    # Fused attention on a CPU, PyTorch's or ours, is not in the counter's list; the plain form is the same products.
    with on_backend("torch"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model, goal)
    counted = image_operations(model.config, goal.config)
    for name, part in step_parts(model.config, goal.config).items():
        counted += part.recomputed * repeats(name, goal.config)
    assert counter.get_total_flops() == BATCH * counted


def peak_saved(run: Callable[[], None], *modules: nn.Module | None) -> int:
    """Bytes of the storages that autograd held at most at one moment of `run`, what the modules hold aside."""
    held = [tensor for module in modules if module for tensor in (*module.parameters(), *module.buffers())]
    own = {tensor.untyped_storage()._cdata for tensor in held}
    alive: dict[int, int] = {}
    total = peak = 0

    class Held:
        def __init__(self, tensor):
            nonlocal total, peak
            self.tensor, self.key = tensor, tensor.untyped_storage()._cdata
            if self.key in own:
                return
            alive[self.key] = alive.get(self.key, 0) + 1
            if alive[self.key] == 1:
                total += tensor.untyped_storage().nbytes()
                peak = max(peak, total)

        def __del__(self):
            nonlocal total
            if self.key in own:
                return
            alive[self.key] -= 1
            if not alive[self.key]:
                total -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return peak


def unnumbered() -> FakeTensorMode:
    """Tensors without numbers: autograd keeps the same of them, and the kernels' interpreter has nothing to do."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def growth(model: Unite, goal: Objective, **run) -> int:
    """Saved bytes of one more image: what a pass holds whatever its batch drops out."""
    two, one = (
        peak_saved(lambda: step(model, goal, batch=batch, **run), model, goal.lpips)
        for batch in (2, 1)
    )
    return two - one


@pytest.mark.parametrize(
    ("dtype", "lpips", "fp8"),
    [(None, False, False), (None, True, False), (torch.bfloat16, False, False), (torch.bfloat16, True, False),
     (torch.bfloat16, False, True)],
    ids=["fp32", "fp32 lpips", "bf16", "bf16 lpips", "fp8"],
)  # fmt: skip
def test_saved_activations_are_what_autograd_keeps(gpu_memory, dtype, lpips, fp8):
    """Within 1 %: labels, times and masks are not counted."""
    with unnumbered():
        sizes = dict(image_size=16) if lpips else dict(context_len=0) if fp8 else {}  # whose rows need no filling to 16
        model = Unite(ModelConfig(**SMALL | sizes))
        if fp8:
            use_fp8(model)
        with unset_fake_temporarily():  # LPIPS goes into another memory format, which these tensors cannot
            goal = objective(model, lpips=lpips, flow_draws=1, dtype=dtype)
        grown = growth(model, goal, dtype=dtype)
    width = "fp32" if dtype is None else "bf16"
    parts = step_parts(model.config, goal.config, dtype=width, device="cuda", fp8=fp8)
    passes = (sum(parts[n].saved for n in parts if n != "denoise"), parts["denoise"].saved)
    assert grown == pytest.approx(max(passes), rel=0.01)


def test_the_larger_pass_may_be_the_second(gpu_memory):
    with unnumbered():
        model = Unite(ModelConfig(**SMALL))
        goal = objective(model, flow_draws=4, draws_per_chunk=4)
        grown = growth(model, goal)
    parts = step_parts(model.config, goal.config, dtype="fp32", device="cuda")
    assert 4 * parts["denoise"].saved > parts["tokenize"].saved + parts["decode"].saved
    assert grown == pytest.approx(4 * parts["denoise"].saved, rel=0.01)


def test_a_floor_is_the_slower_of_two_limits():
    model = ModelConfig(**SMALL)
    part = step_parts(model, ObjectiveConfig())["denoise"]
    fast, slow = Rates(1e30, 1e9), Rates(1e9, 1e30)
    forward, backward = part.floor(4, fast)
    assert forward == pytest.approx(part.forward_bytes(4) / 1e9)
    assert backward == pytest.approx(part.backward_bytes(4) / 1e9)
    assert part.floor(4, slow) == pytest.approx((4 * part.forward / 1e9, 4 * part.backward / 1e9))
    both, moving, computing = sum(part.floor(4, Rates(1e9, 1e9))), sum(part.floor(4, fast)), 4 * part.operations / 1e9
    assert max(moving, computing) < both < moving + computing
    assert repeats("denoise", ObjectiveConfig(flow_draws=5)) == 5 and repeats("decode", ObjectiveConfig()) == 1


def test_a_floor_reads_weights_adds_float32_gradients_and_repeats_what_is_recomputed():
    op = Op("product", forward=6, backward=12, forward_bytes=4, backward_bytes=8, weights=10, block=0)
    moving, computing = Rates(1e30, 1.0), Rates(1.0, 1e30)

    def floor(rates, recomputes=False, **changes):
        return Part("denoise", (op._replace(**changes),), recomputes, 2).floor(3, rates)

    assert floor(moving) == (3 * 4 + 10 * 2, 3 * 8 + 10 * 2 + 10 * (4 + 4))
    assert floor(moving, trained=False) == (3 * 4 + 10 * 2, 3 * 8 + 10 * 2)
    assert floor(computing) == (18, 36)
    assert floor(computing, recomputes=True) == (18, 36 + 18)
    assert floor(computing, recomputes=True, block=None) == (18, 36)
