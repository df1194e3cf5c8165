"""Every operator of unite_kernels against eager PyTorch and torch.compile, forward and backward.

Shapes: B images, N tokens, C width, H heads, d head width, F hidden width, K latents of D channels, S draws. On a GPU
those of training at 256×256: 544 tokens (32 context, 256 latents, 256 patches) and 64 images, or 288 tokens (without
patches) and 192 images, which are 64 images in three draws.

The bytes beside an operator are its floor: every input that the mathematics needs read once, every output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import contest
import measure
import pytest
import torch
import torch.nn.functional as F
from case import BACKWARD, BOTH, FORWARD, ON_GPU, Case, normal, size
from objective_cases import (
    centre_crop,
    flow_noise,
    latent_norm_flow_loss,
    latent_norm_mix,
    lpips_distance,
    patch_l1,
    philox_normal,
    rectified,
)
from optimizer_cases import ema_update_, muon_momentum_, muon_update_, newton_schulz
from torch import Tensor

import unite_kernels as uk
from unite_fast.model.attention import attend
from unite_fast.model.blocks import swiglu_hidden
from unite_kernels.adaln import adaln_reference
from unite_kernels.dispatch import aligned
from unite_kernels.fp8 import MIN_CAPABILITY
from unite_kernels.qk_rope import qk_norm_rope_reference
from unite_kernels.rectify import bias_relu_max_pool_reference, bias_relu_reference
from unite_kernels.swiglu import swiglu_reference


class Stream(NamedTuple):
    """Sizes of a transformer's stream."""

    batch: int
    tokens: int
    width: int
    heads: int


if ON_GPU:
    STREAMS = [Stream(b, n, c, h) for c, h in ((768, 12), (1024, 16)) for b, n in ((64, 544), (192, 288))]
    BATCHES, IMAGES = [64, 192], [64]
    BLOCKS, MATRICES = [12], [(12, 768)]
    MAPS = [(16, 64, 256), (64, 512, 16)]  # VGG16's first map and its last: images, channels, side
else:
    STREAMS = [Stream(2, 136, 768, 12), Stream(6, 72, 768, 12)]
    BATCHES, IMAGES = [4], [2]
    BLOCKS, MATRICES = [1], [(4, 128)]
    MAPS = [(2, 64, 32), (2, 512, 4)]
SHORT = [Stream(32, 28, 128, 4), Stream(128, 12, 128, 4)]  # the quickstart's passes
CONTEXT = 32


def adaln(function: Callable, *, gated=False, closing=False, weighted=False, layer=False) -> Callable:
    """The case of an adaptive norm; the function takes the arguments that its form has."""

    def case(stream: Stream) -> Case:
        batch, tokens, width, _ = stream
        x = normal(batch, tokens, width)
        branch, gate = (normal(*x.shape), normal(batch, width)) if gated else (None, None)
        closing_weight = normal(width, dtype=torch.float32) if closing else None
        weight = normal(width, dtype=torch.float32) if weighted else None
        shift, scale = normal(batch, width), normal(batch, width)
        inputs = (x, branch, gate, closing_weight, weight, None, shift, scale)

        def ours(x, branch, gate, closing_weight, weight, bias, shift, scale):
            front = (x, branch, gate) if gated else (x,)
            norms = (closing_weight, weight) if closing else (weight, bias) if layer else (weight,)
            return function(*front, *norms, shift, scale)

        vectors = size(gate, closing_weight, weight, shift, scale)
        # Forward: x (and branch) read, normed (and residual) written. Backward: the gradients of the outputs, the
        # stream (and branch) read; the gradients of x (and branch) written; vectors read and their gradients
        # written.
        return Case(
            f"{batch}x{tokens}x{width}",
            ours,
            lambda *inputs: adaln_reference(*inputs, None, None, 1e-6, layer),
            inputs,
            {
                FORWARD: (4 if gated else 2) * size(x) + vectors,
                BACKWARD: (6 if gated else 3) * size(x) + 2 * vectors,
            },
        )

    return case


def qk_norm_rope(stream: Stream) -> Case:
    batch, tokens, width, heads = stream
    d = width // heads
    qkv = normal(batch, tokens, 3, heads, d)
    weights = normal(d, dtype=torch.float32), normal(d, dtype=torch.float32)
    angles = torch.rand(tokens - CONTEXT, d // 2, device=measure.DEVICE)
    tables = angles.cos(), angles.sin()
    vectors = size(*weights, *tables)
    # Forward: qkv read and written, v with it, as the output is a new tensor. Backward: the gradient, q and k read,
    # the gradient of qkv written.
    return Case(
        f"{batch}x{tokens}x3x{heads}x{d}",
        lambda *inputs: uk.qk_norm_rope(*inputs, CONTEXT),
        lambda *inputs: qk_norm_rope_reference(*inputs, CONTEXT, 1e-6),
        (qkv, *weights, *tables),
        {FORWARD: 2 * size(qkv) + vectors, BACKWARD: 8 * size(qkv) // 3 + vectors + size(*weights)},
    )


def qk_norm_rope_apart(stream: Stream) -> Case:
    """As `qk_norm_rope`, with outputs and gradients apart; the reference's gradients are packed on the way."""
    case = qk_norm_rope(stream)
    return replace(
        case, ours=lambda *inputs: uk.qk_norm_rope_apart(*inputs, CONTEXT),
        eager=lambda *inputs: case.eager(*inputs).unbind(2),
    )  # fmt: skip


def attention(stream: Stream) -> Case:
    """Of few tokens, where cpu.c serves."""
    batch, tokens, width, heads = stream
    qkv = normal(batch, tokens, 3, heads, width // heads)

    def eager(qkv):
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    # Forward: qkv read, a third as much written. Backward: that third and qkv read, the gradient of qkv written.
    floor = {FORWARD: 4 * size(qkv) // 3, BACKWARD: 7 * size(qkv) // 3}
    return Case(f"{batch}x{tokens}x3x{heads}x{width // heads}", attend, eager, (qkv,), floor)


def layer_norm(*, added: bool) -> Callable:
    """The case of a LayerNorm, alone or of x + branch."""

    def case(stream: Stream) -> Case:
        batch, tokens, width, _ = stream
        streams = [normal(batch, tokens, width) for _ in range(1 + added)]
        vectors = [normal(width, dtype=torch.float32) for _ in range(2)]

        def eager(*inputs):
            x, branch = inputs[0], inputs[1] if added else None
            return adaln_reference(x, branch, None, None, *inputs[-2:], None, None, None, None, 1e-6, True)

        # Forward: x (and branch) read, normed (and x + branch) written. Backward: their gradients and what was normed
        # read, one gradient written, which is that of x and of branch.
        return Case(
            f"{batch}x{tokens}x{width}",
            uk.residual_layer_norm if added else uk.layer_norm,
            eager,
            (*streams, *vectors),
            {
                FORWARD: (4 if added else 2) * size(streams[0]) + size(*vectors),
                BACKWARD: (4 if added else 3) * size(streams[0]) + 2 * size(*vectors),
            },
        )

    return case


def swiglu(stream: Stream) -> Case:
    batch, tokens, width, _ = stream
    hidden = swiglu_hidden(width)
    hidden = aligned(hidden) if ON_GPU else hidden
    x = normal(batch, tokens, 2 * hidden)
    # Forward: 2F read, F written. Backward: F and 2F read, 2F written.
    floor = {FORWARD: 3 * size(x) // 2, BACKWARD: 5 * size(x) // 2}
    return Case(f"{batch}x{tokens}x{2 * hidden}", uk.swiglu, swiglu_reference, (x,), floor)


def bias_swiglu(stream: Stream) -> Case:
    case = swiglu(stream)
    return replace(case, inputs=(*case.inputs, normal(case.inputs[0].shape[-1], dtype=torch.float32)))


def fp8_linear(stream: Stream) -> Case:
    """The Linear of q, k and v in FP8, casts and all, against the same in bfloat16."""
    batch, tokens, width, _ = stream
    x, weight = normal(batch, tokens, width), normal(3 * width, width, dtype=torch.float32)
    return Case(
        f"{batch}x{tokens}x{width} to {3 * width}",
        uk.fp8_linear,
        lambda x, weight: F.linear(x, weight.to(x.dtype)),
        (x, weight),
        {FORWARD: None, BACKWARD: None},
    )


OPERATORS = {
    "rms_norm_modulate": (adaln(uk.rms_norm_modulate, weighted=True), STREAMS),
    "gated_residual_rms_norm_modulate": (
        adaln(uk.gated_residual_rms_norm_modulate, gated=True, weighted=True),
        STREAMS,
    ),
    "block_boundary": (adaln(uk.block_boundary, gated=True, closing=True, weighted=True), STREAMS),
    "layer_norm_modulate": (adaln(uk.layer_norm_modulate, layer=True), STREAMS),
    "gated_residual_layer_norm_modulate": (
        adaln(uk.gated_residual_layer_norm_modulate, gated=True, layer=True),
        STREAMS,
    ),
    "qk_norm_rope": (qk_norm_rope, STREAMS),
    "qk_norm_rope_apart": (qk_norm_rope_apart, STREAMS),
    "attention": (attention, SHORT),
    "layer_norm": (layer_norm(added=False), STREAMS),
    "residual_layer_norm": (layer_norm(added=True), STREAMS),
    "swiglu": (swiglu, STREAMS),
    "bias_swiglu": (bias_swiglu, STREAMS),
    "fp8_linear": (fp8_linear, STREAMS),
    "flow_noise": (flow_noise, BATCHES),
    "philox_normal": (philox_normal, BATCHES),
    "latent_norm_mix": (latent_norm_mix, BATCHES),
    "latent_norm_flow_loss": (latent_norm_flow_loss, BATCHES),
    "patch_l1": (patch_l1, IMAGES),
    "lpips_distance": (lpips_distance, MAPS),
    "bias_relu": (rectified(uk.bias_relu, bias_relu_reference, pool=False), MAPS),
    "bias_relu_max_pool": (rectified(uk.bias_relu_max_pool, bias_relu_max_pool_reference, pool=True), MAPS),
    "centre_crop": (centre_crop, IMAGES),
    "ema_update_": (ema_update_, BLOCKS),
    "muon_momentum_": (muon_momentum_, BLOCKS),
    "muon_update_": (muon_update_, BLOCKS),
    "newton_schulz": (newton_schulz, MATRICES),
}
# The others are their own references on a CPU: beside themselves they would show their checks of arguments.
ON_CPU = {
    "rms_norm_modulate", "gated_residual_rms_norm_modulate", "block_boundary", "qk_norm_rope", "swiglu", "attention",
    "ema_update_", "muon_momentum_", "muon_update_", "newton_schulz",
}  # fmt: skip
FORWARD_ONLY = {
    "philox_normal", "centre_crop", "ema_update_", "muon_momentum_", "muon_update_", "newton_schulz",
}  # fmt: skip


def directions(operator: str) -> tuple[str, ...]:
    if operator == "latent_norm_flow_loss":
        return (BOTH,)
    return (FORWARD,) if operator in FORWARD_ONLY else (FORWARD, BACKWARD)


def measured_here(operator: str) -> bool:
    if not ON_GPU:
        return operator in ON_CPU
    if operator == "attention":  # libraries'
        return False
    return operator != "fp8_linear" or torch.cuda.get_device_capability() >= MIN_CAPABILITY


CASES = [
    pytest.param(operator, size, direction, id=f"{operator}-{index}-{direction}")
    for operator, (_, sizes) in OPERATORS.items()
    for index, size in enumerate(sizes)
    for direction in directions(operator)
]


def prepared(function: Callable, case: Case, direction: str) -> Callable[[], Callable[[], object]]:
    """A function that makes ready what is not timed and returns the call that is."""
    leaves = [x for x in case.inputs if x is not None and x.requires_grad]
    grads: list[Tensor] = []

    def forward() -> list[Tensor]:
        out = function(*case.inputs)
        out = [out] if isinstance(out, Tensor) else out or []
        return [x for x in out if x is not None and x.requires_grad]

    def backward(outputs: list[Tensor]):
        if not grads:
            grads.extend(torch.randn_like(x) for x in outputs)  # in their layout, as training's are
        return torch.autograd.grad(outputs, leaves, grads)

    def prepare() -> Callable[[], object]:
        if direction == FORWARD:
            return forward
        if direction == BOTH:
            return lambda: backward(forward())
        outputs = forward()
        return lambda: backward(outputs)

    return prepare


@pytest.mark.parametrize("operator, sizes, direction", [case for case in CASES if measured_here(case.values[0])])
@pytest.mark.benchmark(timer=measure.CLOCK)
def test_operator(operator, sizes, direction, benchmark, bandwidth, results):
    torch.manual_seed(0)
    case = OPERATORS[operator][0](sizes)
    contenders = {"ours": case.ours, "eager": case.eager}
    if ON_GPU and case.compiled:
        # Of this shape alone: the shapes before must not turn it into a kernel for any shape.
        torch.compiler.reset()
        contenders["compile"] = torch.compile(case.eager, dynamic=False)
    prepare = {name: prepared(function, case, direction) for name, function in contenders.items()}
    for _ in range(3):
        for ready in prepare.values():
            ready()()
    times = {name: [] for name in contenders}

    # Each timed call follows one of its own kind that is not: what it finds in the allocator and the caches is then its
    # own doing.
    def turn(name: str) -> Callable[[], float]:
        def timed() -> float:
            prepare[name]()()
            return (measure.CLOCK.advance if name == contest.OURS else measure.CLOCK.seconds)(prepare[name]())

        return timed

    turns = {name: turn(name) for name in contenders}
    benchmark.pedantic(contest.play, args=(turns, times), rounds=measure.ROUNDS[measure.DEVICE])
    contest.settle(turns, times, lambda: contest.ratios(times), seconds=5)
    ratios = contest.ratios(times)
    seconds = {name: measure.spread(samples) for name, samples in times.items()}
    median = seconds["ours"]["median"]
    floor = case.floor[direction]
    result = {
        "operator": operator,
        "direction": direction,
        "shape": case.shape,
        "dtype": str(case.inputs[0].dtype if case.inputs else torch.float32).removeprefix("torch."),
        "rounds": len(times["ours"]),
        "seconds": seconds,
        "bytes": floor,
        "gb_per_second": None if floor is None else floor / median / 1e9,
        "share_of_floor": None if floor is None else floor / median / bandwidth,
        "times_faster_than": {name: ratio.value for name, ratio in ratios.items()},
        "ratio_error": {name: ratio.error for name, ratio in ratios.items()},
    }
    benchmark.extra_info.update(result)
    results.append(result)
