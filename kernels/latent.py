"""The latent LayerNorm where it meets noise: with the decoder's noise, and inside the flow loss.

Shapes: S draws, B batch, K latent tokens, D latent channels. t = 1 is clean data, t = 0 pure noise.
A tile is a block of [ROWS, WIDTH] numbers: latent tokens by channels, WIDTH the power of two from D on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import (
    cdiv,
    check_contiguous,
    check_device,
    check_eps,
    check_floats,
    check_tensors,
    device_of,
    first_derivatives,
    next_power_of_2,
    operator,
    use_triton,
)
from .specialisation import Specialisation
from .toolchain import tl, triton

TILE = 1024  # elements of a tile, 8 a thread: the loss then takes 96 registers (sm_90), with 2048 elements 162
WARPS = 4


@triton.jit
def _normalise(x, inside, D: tl.constexpr, eps):
    """LayerNorm of the rows of a tile without scale and shift: (x_hat, 1 / sigma), zero outside."""
    mean = tl.sum(tl.where(inside, x, 0.0), axis=1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _normalise_backward(grad, x_hat, inverse, D: tl.constexpr):
    """Gradient of x from that of x_hat; both zero outside."""
    mean = tl.sum(grad, axis=1) / D
    along = tl.sum(grad * x_hat, axis=1) / D
    return inverse[:, None] * (grad - mean[:, None] - x_hat * along[:, None])


@triton.jit(do_not_specialize=["rows"])
def _mix_forward_kernel(
    z, weight, bias, mask, t, noise, z0_out, mixed_out, rows, tokens, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    sample = row // tokens
    offset = row.to(tl.int64)[:, None] * D + channel[None, :]
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    w = tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)
    chosen = tl.load(mask + sample, mask=row < rows, other=0) != 0
    time = tl.load(t + sample, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    x_hat, _ = _normalise(tl.load(z + offset, mask=inside, other=0.0).to(tl.float32), inside, D, eps)
    z0 = x_hat * w[None, :] + b[None, :]
    # Noise is fetched for the chosen samples alone: half the bytes at the published probability.
    added = tl.load(noise + offset, mask=inside & chosen[:, None], other=0.0).to(tl.float32)
    tl.store(z0_out + offset, z0, mask=inside)
    tl.store(mixed_out + offset, tl.where(chosen[:, None], time * z0 + (1.0 - time) * added, z0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _mix_backward_kernel(
    grad_z0, grad_mixed, z, weight, mask, t, grad_z, grad_affine, rows, tokens, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    sample = row // tokens
    offset = row.to(tl.int64)[:, None] * D + channel[None, :]
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    w = tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    chosen = tl.load(mask + sample, mask=row < rows, other=0) != 0
    share = tl.where(chosen, tl.load(t + sample, mask=row < rows, other=0.0).to(tl.float32), 1.0)
    x_hat, inverse = _normalise(tl.load(z + offset, mask=inside, other=0.0).to(tl.float32), inside, D, eps)
    grad = tl.load(grad_z0 + offset, mask=inside, other=0.0).to(tl.float32)
    grad += share[:, None] * tl.load(grad_mixed + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_z + offset, _normalise_backward(grad * w[None, :], x_hat, inverse, D), mask=inside)
    partial = grad_affine + program * 2 * D + channel
    tl.store(partial, tl.sum(grad * x_hat, axis=0), mask=channel < D)
    tl.store(partial + D, tl.sum(grad, axis=0), mask=channel < D)


@triton.jit(do_not_specialize=["draws", "rows"])
def _loss_kernel(
    pred, z1, t, weight, bias, loss, grad_pred, grad_z1, grad_affine, draws, rows, tokens, floor, eps,
    WEIGHTING: tl.constexpr, GRADIENTS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    sample = row // tokens
    batch = rows // tokens
    offset = row.to(tl.int64)[:, None] * D + channel[None, :]
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    w = tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    target = tl.load(z1 + offset, mask=inside, other=0.0).to(tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    if GRADIENTS:
        grad_sum = tl.zeros([ROWS, WIDTH], tl.float32)  # over draws, of z_hat
        scale_sum = tl.zeros([ROWS, WIDTH], tl.float32)  # the same times x_hat
    drawn = offset
    for draw in range(draws):
        x = tl.load(pred + drawn, mask=inside, other=0.0).to(tl.float32)
        x_hat, inverse = _normalise(x, inside, D, eps)
        error = tl.where(inside, target - (x_hat * w + b), 0.0)
        if WEIGHTING:
            time = tl.load(t + draw * batch + sample, mask=row < rows, other=0.0).to(tl.float32)
            remaining = tl.maximum(1.0 - time, floor, propagate_nan=tl.PropagateNan.ALL)[:, None]
            error = error / remaining
        squares += tl.sum(error * error, axis=1)
        if GRADIENTS:
            grad = -2.0 * error
            if WEIGHTING:
                grad = grad / remaining
            tl.store(grad_pred + drawn, _normalise_backward(grad * w, x_hat, inverse, D), mask=inside)
            grad_sum += grad
            scale_sum += grad * x_hat
        drawn += rows.to(tl.int64) * D
    tl.store(loss + program, tl.sum(squares, axis=0))
    if GRADIENTS:
        tl.store(grad_z1 + offset, -grad_sum, mask=inside)
        partial = grad_affine + program * 2 * D + channel
        tl.store(partial, tl.sum(scale_sum, axis=0), mask=channel < D)
        tl.store(partial + D, tl.sum(grad_sum, axis=0), mask=channel < D)


def _grid(rows: int, channels: int) -> tuple[int, int, int]:
    """(programs, WIDTH, ROWS) of tiles that cover rows × channels."""
    width = max(1, next_power_of_2(channels))
    height = max(1, TILE // width)
    return cdiv(rows, height), width, height


@operator("latent_norm_mix")
def _mix(
    z: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, t: Tensor, noise: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    z0, mixed = torch.empty_like(z), torch.empty_like(z)
    batch, tokens, channels = z.shape
    programs, width, height = _grid(batch * tokens, channels)
    if z.numel():
        with device_of(z):
            _mix_forward_kernel[(programs,)](
                z, weight, bias, mask, t, noise, z0, mixed, batch * tokens, tokens, eps,
                D=channels, WIDTH=width, ROWS=height, num_warps=WARPS,
            )  # fmt: skip
    return z0, mixed


@_mix.register_fake
def _(z, weight, bias, mask, t, noise, eps):
    return torch.empty_like(z), torch.empty_like(z)


@operator("latent_norm_mix_backward")
def _mix_backward(
    grad_z0: Tensor, grad_mixed: Tensor, z: Tensor, weight: Tensor, mask: Tensor, t: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = z.shape
    programs, width, height = _grid(batch * tokens, channels)
    grad_z = torch.empty_like(z)
    partials = z.new_empty(programs, 2, channels, dtype=torch.float32)
    if z.numel():
        with device_of(z):
            _mix_backward_kernel[(programs,)](
                grad_z0.contiguous(), grad_mixed.contiguous(), z, weight, mask, t, grad_z, partials,
                batch * tokens, tokens, eps, D=channels, WIDTH=width, ROWS=height, num_warps=WARPS,
            )  # fmt: skip
    return grad_z, partials.sum(0)


@_mix_backward.register_fake
def _(grad_z0, grad_mixed, z, weight, mask, t, eps):
    return torch.empty_like(z), z.new_empty(2, z.shape[2], dtype=torch.float32)


def _save_mix(ctx, inputs, output):
    z, weight, bias, mask, t, _, ctx.eps = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(z, weight, mask, t)


def _backward_mix(ctx, grad_z0, grad_mixed):
    z, weight, mask, t = ctx.saved_tensors
    grad_z, affine = _mix_backward(grad_z0, grad_mixed, z, weight, mask, t, ctx.eps)
    return grad_z, affine[0].to(weight.dtype), affine[1].to(ctx.bias_dtype), None, None, None, None


_mix.register_autograd(_backward_mix, setup_context=_save_mix)


@operator("latent_norm_flow_loss")
def _flow_loss(
    pred: Tensor, z1: Tensor, t: Tensor, weight: Tensor, bias: Tensor,
    floor: float, weighting: bool, eps: float, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # Gradients of the plain sum, in float32: divided by the count they would underflow float16 before a loss scale
    # could lift them, and the caller's factor would be rounded to pred's dtype.
    draws, batch, tokens, channels = pred.shape
    programs, width, height = _grid(batch * tokens, channels)
    partial_loss = pred.new_empty(programs, dtype=torch.float32)
    shapes = (pred.shape, z1.shape, (programs, 2, channels)) if gradients else ((0,), (0,), (0, 2, channels))
    grad_pred, grad_z1, partials = (pred.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if z1.numel():
        with device_of(pred):
            _loss_kernel[(programs,)](
                pred, z1, t, weight, bias, partial_loss, grad_pred, grad_z1, partials,
                draws, batch * tokens, tokens, floor, eps,
                WEIGHTING=weighting, GRADIENTS=gradients, D=channels, WIDTH=width, ROWS=height, num_warps=WARPS,
            )  # fmt: skip
    return partial_loss.sum() / z1.numel(), grad_pred, grad_z1, partials.sum(0)


@_flow_loss.register_fake
def _(pred, z1, t, weight, bias, floor, weighting, eps, gradients):
    shapes = ((), pred.shape if gradients else (0,), z1.shape if gradients else (0,), (2, pred.shape[3]))
    return tuple(pred.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save_loss(ctx, inputs, output):
    pred, z1, _, weight, bias, *_ = inputs
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.dtypes = pred.dtype, z1.dtype, weight.dtype, bias.dtype
    ctx.save_for_backward(*output)


@first_derivatives("latent_norm_flow_loss")
def _backward_loss(ctx, saved, grad, *_):
    _, grad_pred, grad_z1, affine = saved
    scale = grad / grad_z1.numel()
    tensors = (grad_pred, grad_z1, affine[0], affine[1])
    needed = (ctx.needs_input_grad[index] for index in (0, 1, 3, 4))
    pred, z1, weight, bias = (
        (tensor * scale).to(dtype) if wanted else None
        for tensor, dtype, wanted in zip(tensors, ctx.dtypes, needed, strict=True)
    )
    return pred, z1, None, weight, bias, None, None, None, None


_flow_loss.register_autograd(_backward_loss, setup_context=_save_loss)


def aot_specialisations() -> list[Specialisation]:
    """The published latent width, D = 32, in float32 as the encoder's last Linear is read."""
    tile = {"D": 32, "WIDTH": 32, "ROWS": TILE // 32}
    numbers = {"rows": "i32", "tokens": "i32", "eps": "fp32"}
    loss_numbers = {"draws": "i32", "rows": "i32", "tokens": "i32", "floor": "fp32", "eps": "fp32"}
    loss_flags = {"WEIGHTING": True, "GRADIENTS": True}
    mix = "z weight bias mask t noise z0_out mixed_out"
    mix_back = "grad_z0 grad_mixed z weight mask t grad_z grad_affine"
    loss = "pred z1 t weight bias loss grad_pred grad_z1 grad_affine"
    found = []
    for name, kernel, pointers, numbers, flags, registers in (
        ("latent_norm_mix_forward", _mix_forward_kernel, mix, numbers, {}, 40),
        ("latent_norm_mix_backward", _mix_backward_kernel, mix_back, numbers, {}, 48),
        ("latent_norm_flow_loss", _loss_kernel, loss, loss_numbers, loss_flags, 96),
    ):
        types = {pointer: "*i1" if pointer == "mask" else "*fp32" for pointer in pointers.split()}
        found.append(
            Specialisation(
                f"{name}_fp32_32", kernel, types | numbers, flags | tile,
                num_warps=WARPS, aligned=(*types, "tokens"), max_registers=registers,
            )
        )  # fmt: skip
    return found


def latent_norm_mix_reference(z, weight, bias, mask, t, noise, eps):
    """`latent_norm_mix` in plain PyTorch."""
    z0 = F.layer_norm(z.float(), weight.shape, weight.float(), bias.float(), eps)
    t = t.float()[:, None, None]
    mixed = torch.where(mask[:, None, None], t * z0 + (1 - t) * noise.float(), z0)
    return z0.to(z.dtype), mixed.to(z.dtype)


def latent_norm_mix(
    z: Tensor, weight: Tensor, bias: Tensor, *, mask: Tensor, t: Tensor, noise: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The latent LayerNorm and the decoder's noise: z0 = LayerNorm(z) · weight + bias, and t z0 + (1 − t) ε where mask.

    UNITE, arXiv 2603.22283, tokenization pass. Gradients flow into z, weight and bias through both outputs; mask, t
    and noise are draws and take none.

    Args:
        z: [B, K, D] output of the encoder.
        weight, bias: [D].
        mask: [B] bool, the samples that are mixed.
        t: [B] in [0, 1].
        noise: [B, K, D] ε.

    Returns:
        z0 and the decoder's input, both [B, K, D] in z's dtype.

    Raises:
        ValueError: shapes that do not fit together, tensors on different devices, strides, or a negative eps.
        TypeError: a mask that is not bool, or another tensor that is not float32, float16 or bfloat16.
    """
    check_tensors("latent_norm_mix", z=z, weight=weight, bias=bias, mask=mask, t=t, noise=noise)
    if z.dim() != 3:
        raise ValueError(f"latent_norm_mix: z has shape {tuple(z.shape)}; it must be [B, K, D]")
    check_eps("latent_norm_mix", eps)
    batch, _, channels = z.shape
    for name, x, shape in (
        ("z", z, z.shape),
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("mask", mask, (batch,)),
        ("t", t, (batch,)),
        ("noise", noise, z.shape),
    ):
        _check("latent_norm_mix", name, x, shape, "z", z)
    if use_triton(z):
        return _mix(z, weight, bias, mask, t, noise, eps)
    return latent_norm_mix_reference(z, weight, bias, mask, t.detach(), noise.detach(), eps)


def latent_norm_flow_loss_reference(pred, z1, t, weight, bias, floor, weighting, eps):
    """`latent_norm_flow_loss` in plain PyTorch."""
    error = z1.float() - F.layer_norm(pred.float(), weight.shape, weight.float(), bias.float(), eps)
    if weighting:
        error = error / (1 - t.float()).clamp(min=floor)[..., None, None]
    return error.square().mean(dim=(-3, -2, -1)).sum()


def latent_norm_flow_loss(
    pred: Tensor,
    z1: Tensor,
    t: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    floor: float = 0.05,
    weighting: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """Flow loss of normalised predictions: Σ over draws of mean(((z1 − ẑ) / max(1 − t, floor))²).

    ẑ = LayerNorm(pred) · weight + bias (UNITE, arXiv 2603.22283, flow loss). The mean runs over batch, tokens and
    channels. Gradients flow into pred, weight, bias and z1.

    Args:
        pred: [S, B, K, D], or [B, K, D] for one draw.
        z1: [B, K, D], the clean latents of every draw.
        t: [S, B], or [B].
        weight, bias: [D].
        floor: smallest 1 − t that divides.
        weighting: False leaves the error undivided (the paper's unweighted form).

    Returns:
        0-dim float32.

    Raises:
        ValueError: shapes that do not fit together, tensors on different devices, strides, a floor that is not
            positive, or a negative eps.
        TypeError: a tensor that is not float32, float16 or bfloat16.
    """
    check_tensors("latent_norm_flow_loss", pred=pred, z1=z1, t=t, weight=weight, bias=bias)
    if pred.dim() not in (3, 4):
        raise ValueError(
            f"latent_norm_flow_loss: pred has shape {tuple(pred.shape)}; it must be [S, B, K, D] or [B, K, D]"
        )
    if not floor > 0:
        raise ValueError(f"latent_norm_flow_loss: floor is {floor}; it must be positive")
    check_eps("latent_norm_flow_loss", eps)
    for name, x, shape in (
        ("pred", pred, pred.shape),
        ("z1", z1, pred.shape[-3:]),
        ("t", t, pred.shape[:-2]),
        ("weight", weight, pred.shape[-1:]),
        ("bias", bias, pred.shape[-1:]),
    ):
        _check("latent_norm_flow_loss", name, x, shape, "pred", pred)
    t = t.detach()
    if use_triton(pred):
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (pred, z1, weight, bias))
        if pred.dim() == 3:
            pred, t = pred[None], t[None]
        return _flow_loss(pred, z1, t, weight, bias, floor, weighting, eps, gradients)[0]
    return latent_norm_flow_loss_reference(pred, z1, t, weight, bias, floor, weighting, eps)


def _check(operator: str, name: str, x: Tensor, shape: tuple[int, ...], first_name: str, first: Tensor) -> None:
    """Every floating dtype is welcome beside every other: all are read into float32. The mask is bool."""
    if x.shape != shape:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(x.shape)}; it must be {tuple(shape)} for this {first_name}"
        )
    if name != "mask":
        check_floats(operator, name, x)
    elif x.dtype != torch.bool:
        raise TypeError(f"{operator}: mask is {x.dtype}; it must be bool")
    check_device(operator, name, x, first_name, first)
    check_contiguous(operator, name, x)
