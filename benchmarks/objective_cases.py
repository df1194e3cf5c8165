"""The operators of the objective at training's sizes, for test_operators.py: noise, latents, losses, LPIPS, crops.

Shapes as there; the bytes beside an operator are its floor.
"""

from __future__ import annotations

from collections.abc import Callable

import measure
import torch
from case import BACKWARD, BOTH, FORWARD, ON_GPU, Case, normal, size

import unite_kernels as uk
from unite_kernels.flow import flow_noise_reference
from unite_kernels.latent import latent_norm_flow_loss_reference, latent_norm_mix_reference
from unite_kernels.philox import normals
from unite_kernels.pixels import lpips_distance_reference, patch_l1_reference
from unite_kernels.resample import centre_crop_reference, crop_plan

LATENTS, CHANNELS, DRAWS = 256, 32, 3
SIDE = 256 if ON_GPU else 64


def flow_noise(batch: int) -> Case:
    z = normal(batch, LATENTS, CHANNELS, dtype=torch.float32)
    drawn, times = DRAWS * size(z), DRAWS * batch * 4
    # Forward: z read, z_t and t written. Backward: the gradient of z_t and t read, that of z written.
    return Case(
        f"{DRAWS}x{batch}x{LATENTS}x{CHANNELS}",
        lambda z: uk.flow_noise(z, DRAWS, 0, 0),
        lambda z: flow_noise_reference(z, DRAWS, 0, 0, 0, "logit_normal", 0.5, 0),
        (z,),
        {FORWARD: size(z) + drawn + times, BACKWARD: drawn + times + size(z)},
    )


def philox_normal(batch: int) -> Case:
    shape = (batch, LATENTS, CHANNELS)
    count = batch * LATENTS * CHANNELS
    draw = torch.zeros(1, dtype=torch.int64, device=measure.DEVICE)
    # Written alone.
    return Case(
        "x".join(map(str, shape)),
        lambda: uk.philox_normal(shape, 0, 0, 0, device=measure.DEVICE),
        lambda: normals(count, draw, 0, 0, 0).view(shape),
        (),
        {FORWARD: count * 4},
    )


def latent_norm_mix(batch: int) -> Case:
    z = normal(batch, LATENTS, CHANNELS, dtype=torch.float32)
    noise = normal(*z.shape, dtype=torch.float32, grad=False)
    weight, bias = (normal(CHANNELS, dtype=torch.float32) for _ in range(2))
    mask = torch.arange(batch, device=measure.DEVICE) % 2 == 0
    t = torch.rand(batch, device=measure.DEVICE)
    # Forward: z and the noise of the mixed half read, both outputs written. Backward: two gradients and z read, one
    # gradient written.
    return Case(
        f"{batch}x{LATENTS}x{CHANNELS}",
        lambda z, weight, bias, mask, t, noise: uk.latent_norm_mix(z, weight, bias, mask=mask, t=t, noise=noise),
        lambda *inputs: latent_norm_mix_reference(*inputs, 1e-5),
        (z, weight, bias, mask, t, noise),
        {FORWARD: 3 * size(z) + size(noise) // 2, BACKWARD: 4 * size(z)},
    )


def latent_norm_flow_loss(batch: int) -> Case:
    pred = normal(DRAWS, batch, LATENTS, CHANNELS, dtype=torch.float32)
    z1 = normal(batch, LATENTS, CHANNELS, dtype=torch.float32)
    t = torch.rand(DRAWS, batch, device=measure.DEVICE)
    weight, bias = (normal(CHANNELS, dtype=torch.float32) for _ in range(2))
    # Both directions as one, since the forward pass makes the gradients: pred, z1 and t read, two gradients
    # written.
    return Case(
        f"{DRAWS}x{batch}x{LATENTS}x{CHANNELS}",
        uk.latent_norm_flow_loss,
        lambda *inputs: latent_norm_flow_loss_reference(*inputs, 0.05, True, 1e-5),
        (pred, z1, t, weight, bias),
        {BOTH: 2 * size(pred, z1) + size(t)},
    )


def patch_l1(batch: int) -> Case:
    patch = 16
    images = torch.rand(batch, 3, SIDE, SIDE, device=measure.DEVICE)
    tokens = normal(batch, (SIDE // patch) ** 2, patch * patch * 3)
    # Forward: tokens and images read, the image written. Backward: image, images and the image's gradient read, that of
    # the tokens written.
    return Case(
        f"{batch}x3x{SIDE}x{SIDE}",
        lambda tokens, images: uk.patch_l1(tokens, images, patch),
        lambda tokens, images: patch_l1_reference(tokens, images, patch),
        (tokens, images),
        {FORWARD: 2 * size(tokens) + size(images), BACKWARD: 3 * size(tokens) + size(images)},
    )


def lpips_distance(features: tuple[int, int, int]) -> Case:
    batch, channels, side = features
    a, b = (
        normal(batch, side, side, channels, grad=False).permute(0, 3, 1, 2).requires_grad_(wanted)
        for wanted in (False, True)
    )
    weight = torch.rand(channels, device=measure.DEVICE)
    # Forward: both maps read. Backward: both read, the gradient of the reconstruction's written.
    return Case(
        f"{batch}x{channels}x{side}x{side}",
        uk.lpips_distance,
        lpips_distance_reference,
        (a, b, weight),
        {FORWARD: 2 * size(a), BACKWARD: 3 * size(a)},
    )


def rectified(function: Callable, eager: Callable, *, pool: bool) -> Callable:
    """The case of a convolution's bias and ReLU, alone or with the pool behind them."""

    def case(features: tuple[int, int, int]) -> Case:
        batch, channels, side = features
        x = normal(batch, side, side, channels, grad=False).permute(0, 3, 1, 2).requires_grad_()
        bias = torch.randn(channels, device=measure.DEVICE)
        pooled = size(x) // 4 if pool else 0
        # Forward: x read, the map (and its pool) written. Backward: the gradients of both and the map read, that of x
        # written.
        return Case(
            f"{batch}x{channels}x{side}x{side}",
            function,
            eager,
            (x, bias),
            {FORWARD: 2 * size(x) + pooled + size(bias), BACKWARD: 3 * size(x) + pooled},
        )

    return case


def centre_crop(batch: int) -> Case:
    height, width, side = (375, 500, 256) if ON_GPU else (90, 120, 64)
    pixels = torch.randint(256, (batch * 3 * height * width,), dtype=torch.uint8, device=measure.DEVICE)
    sizes = [(height, width)] * batch
    plan = crop_plan(height, width, side)
    window = (plan.rows[1] - plan.rows[0]) * (plan.columns[1] - plan.columns[0])
    # The window that counts read, the crop written.
    return Case(
        f"{batch}x{height}x{width} to {side}",
        lambda pixels: uk.centre_crop(pixels, sizes, side),
        lambda pixels: centre_crop_reference(pixels, sizes, side, False),
        (pixels,),
        {FORWARD: 3 * batch * (window + side * side)},
        compiled=False,
    )
