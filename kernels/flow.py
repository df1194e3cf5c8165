"""Flow matching's noise: many noised copies of the clean latents from one read of them.

Shapes: S draws, B batch, K latent tokens, D latent channels. t = 1 is clean data, t = 0 pure noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import (
    cdiv,
    check_contiguous,
    check_floats,
    check_integer,
    check_programs,
    device_of,
    operator,
    use_triton,
)
from .philox import (
    Step,
    check_address,
    normal_block,
    normal_pair,
    normals,
    philox_words,
    step_tensor,
    uniform_of,
    uniforms,
)
from .specialisation import Specialisation
from .toolchain import tl, triton

LAWS = ("logit_normal", "uniform")
COUNTERS = 512  # a program noises 2048 elements, 16 a thread: each thread also makes the time of every draw once
BLOCK = 1024  # elements of a backward program
WARPS = 4


def flow_noise_reference(z, draws, seed, step, stream, law, shift, first_draw):
    """`flow_noise` in plain PyTorch."""
    batch, tokens, channels = z.shape
    rows = torch.arange(first_draw, first_draw + draws, device=z.device)
    if law == "logit_normal":
        u = normals(batch, rows, seed, step, 2 * stream + 1).sigmoid_()
    else:
        u = uniforms(batch, rows, seed, step, 2 * stream + 1)
    t = shift * u / (1 + (shift - 1) * u)
    # Every sample starts a counter of its own, so that a kernel's program never shares one with its neighbour.
    width = tokens * channels
    padded = -(-width // 4) * 4
    noise = normals(batch * padded, rows, seed, step, 2 * stream).view(draws, batch, padded)[..., :width]
    weight = t[..., None]
    z_t = weight * z.float().flatten(1) + (1 - weight) * noise
    return z_t.view(draws, batch, tokens, channels).to(z.dtype), t


@triton.jit
def _time(sample, draw, seed, step, stream, shift, LOGIT_NORMAL: tl.constexpr):
    """Time of one sample: element `sample` of the draw's numbers."""
    counter = sample // 4
    lane = sample % 4
    w0, w1, w2, w3 = philox_words(counter, draw, seed, step, stream)
    if LOGIT_NORMAL:
        a, b = normal_pair(tl.where(lane < 2, w0, w2), tl.where(lane < 2, w1, w3))
        u = 1.0 / (1.0 + tl.exp(-tl.where(lane % 2 == 0, a, b)))
    else:
        u = uniform_of(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))
    return shift * u / (1.0 + (shift - 1.0) * u)


@triton.jit(do_not_specialize=["draws", "batch", "seed", "stream", "first_draw"])
def _forward_kernel(
    z, z_t, t_out, step_pointer, draws, batch, seed, stream, first_draw, shift,
    WIDTH: tl.constexpr, LOGIT_NORMAL: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    sample = tl.program_id(1)
    step = tl.load(step_pointer)
    element = chunk * 4 * COUNTERS + tl.arange(0, 4 * COUNTERS)
    inside = element < WIDTH
    clean = tl.load(z + sample.to(tl.int64) * WIDTH + element, mask=inside).to(tl.float32)
    counter = sample * tl.cdiv(WIDTH, 4) + chunk * COUNTERS + tl.arange(0, COUNTERS)
    for draw in range(draws):
        t = _time(sample, first_draw + draw, seed, step, 2 * stream + 1, shift, LOGIT_NORMAL)
        row = (draw * batch + sample).to(tl.int64)
        if chunk == 0:
            tl.store(t_out + row, t)
        noise = normal_block(counter, first_draw + draw, seed, step, 2 * stream)
        tl.store(z_t + row * WIDTH + element, t * clean + (1.0 - t) * noise, mask=inside)


@triton.jit(do_not_specialize=["draws", "batch"])
def _backward_kernel(grad_z_t, t, grad_z, draws, batch, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for draw in range(draws):
        row = (draw * batch + sample).to(tl.int64)
        total += tl.load(t + row) * tl.load(grad_z_t + row * WIDTH + element, mask=inside).to(tl.float32)
    tl.store(grad_z + sample.to(tl.int64) * WIDTH + element, total, mask=inside)


@operator("flow_noise")
def _flow_noise(
    z: Tensor, step: Tensor, draws: int, seed: int, stream: int, logit_normal: bool, shift: float, first_draw: int
) -> tuple[Tensor, Tensor]:
    batch, width = z.shape[0], z.shape[1] * z.shape[2]
    z_t = z.new_empty(draws, *z.shape)
    t = z.new_empty(draws, batch, dtype=torch.float32)
    if t.numel():
        # A sample without elements has a time all the same, hence at least one program a sample.
        with device_of(z):
            _forward_kernel[(max(1, cdiv(width, 4 * COUNTERS)), batch)](
                z, z_t, t, step, draws, batch, seed, stream, first_draw, shift,
                WIDTH=width, LOGIT_NORMAL=logit_normal, COUNTERS=COUNTERS, num_warps=WARPS,
            )  # fmt: skip
    return z_t, t


@_flow_noise.register_fake
def _(z, step, draws, seed, stream, logit_normal, shift, first_draw):
    return z.new_empty(draws, *z.shape), z.new_empty(draws, z.shape[0], dtype=torch.float32)


@operator("flow_noise_backward")
def _flow_noise_backward(grad_z_t: Tensor, t: Tensor) -> Tensor:
    draws, batch, tokens, channels = grad_z_t.shape
    width = tokens * channels
    grad_z = grad_z_t.new_empty(batch, tokens, channels)
    if grad_z.numel():
        with device_of(t):
            _backward_kernel[(cdiv(width, BLOCK), batch)](
                grad_z_t.contiguous(), t, grad_z, draws, batch, WIDTH=width, BLOCK=BLOCK, num_warps=WARPS
            )
    return grad_z


@_flow_noise_backward.register_fake
def _(grad_z_t, t):
    return grad_z_t.new_empty(grad_z_t.shape[1:])


def _save_times(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_z_t, grad_t):
    (t,) = ctx.saved_tensors
    return _flow_noise_backward(grad_z_t, t), None, None, None, None, None, None, None


_flow_noise.register_autograd(_backward, setup_context=_save_times)


def aot_specialisations() -> list[Specialisation]:
    """The published latents, K = 256 and D = 32, in float32 as the latent norm leaves them."""
    pointers = {"z": "*fp32", "z_t": "*fp32", "t_out": "*fp32", "step_pointer": "*i64"}
    numbers = {"draws": "i32", "batch": "i32", "seed": "i64", "stream": "i32", "first_draw": "i32", "shift": "fp32"}
    forward = Specialisation(
        "flow_noise_forward_fp32_256x32",
        _forward_kernel,
        pointers | numbers,
        {"WIDTH": 256 * 32, "LOGIT_NORMAL": True, "COUNTERS": COUNTERS},
        num_warps=WARPS,
        aligned=tuple(pointers),
        max_registers=72,
    )
    pointers = {"grad_z_t": "*fp32", "t": "*fp32", "grad_z": "*fp32"}
    backward = Specialisation(
        "flow_noise_backward_fp32_256x32",
        _backward_kernel,
        pointers | {"draws": "i32", "batch": "i32"},
        {"WIDTH": 256 * 32, "BLOCK": BLOCK},
        num_warps=WARPS,
        aligned=tuple(pointers),
        max_registers=40,
    )
    return [forward, backward]


def flow_noise(
    z: Tensor,
    draws: int,
    seed: int,
    step: Step,
    *,
    stream: int = 0,
    law: str = "logit_normal",
    shift: float = 0.5,
    first_draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noised latents of many draws, z_t = t z + (1 − t) ε with ε ~ N(0, 1), and their times.

    u = sigmoid(N(0, 1)) or U[0, 1), t = α u / (1 + (α − 1) u) (UNITE, arXiv 2603.22283, flow loss). The numbers come
    from Philox at (seed, step, stream, draw), see `unite_kernels.philox`; where 4 divides K·D, ε of draw s is
    `philox_normal((B, K, D), seed, step, stream, first_draw=s)`.

    Args:
        z: [B, K, D] clean latents; the gradient flows into them.
        draws: S.
        seed: in [0, 2⁶³).
        step: int, or 0-dim int64 tensor on z's device (read there, without waiting for it).
        stream: in [0, 2³¹), for example the rank.
        law: "logit_normal" or "uniform", the law of u.
        shift: α > 0; 1 leaves u as it is.
        first_draw: number of the first draw: chunks of draws are the same numbers as all at once.

    Returns:
        z_t [S, B, K, D] in z's dtype and t [S, B] float32.

    Raises:
        ValueError: z is not three-dimensional or not contiguous, an address out of range, an unknown law, or a shift
            that is not positive.
        TypeError: another dtype than float32, float16 and bfloat16, or a fractional address or number of draws.
    """
    check_floats("flow_noise", "z", z)
    check_address("flow_noise", seed, step, stream, first_draw, z.device)
    if z.dim() != 3:
        raise ValueError(f"flow_noise: z has shape {tuple(z.shape)}; it must be [B, K, D]")
    check_contiguous("flow_noise", "z", z)
    check_integer("flow_noise", "draws", draws)
    if draws < 0:
        raise ValueError(f"flow_noise: draws is {draws}; it must not be negative")
    if law not in LAWS:
        raise ValueError(f"flow_noise: law is {law!r}; it must be one of {', '.join(LAWS)}")
    if not shift > 0:
        raise ValueError(f"flow_noise: shift is {shift}; it must be positive")
    if use_triton(z):
        check_programs("flow_noise", "B", z.shape[0])
        step = step_tensor(step, z.device)
        return _flow_noise(z, step, draws, seed, stream, law == "logit_normal", shift, first_draw)
    return flow_noise_reference(z, draws, seed, step, stream, law, shift, first_draw)


