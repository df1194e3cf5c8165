"""Unpatchify with L1 and LPIPS's distance: kernels against equations, forward and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import DEVICE, DTYPES, assert_twice_as_good, normal, on_backend

import unite_kernels as uk
from unite_kernels.pixels import _distance, _distance_backward, _patch_l1, _patch_l1_backward


def maps(*shape, dtype=torch.float32, seed=0):
    """A normal feature map [B, C, H, W] in channels-last memory."""
    return normal(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def image_truth(tokens, height, width, p):
    """Pixel (y, x) of colour c is number ((y % p) p + x % p) 3 + c of patch (y // p, x // p)."""
    image = torch.empty(tokens.shape[0], 3, height, width, dtype=tokens.dtype, device=tokens.device)
    for y in range(height):
        for x in range(width):
            first = ((y % p) * p + x % p) * 3
            image[:, :, y, x] = tokens[:, (y // p) * (width // p) + x // p, first : first + 3]
    return image


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("height, width, p", [(6, 9, 3), (4, 4, 4), (32, 16, 16)])
def test_unpatchify_puts_every_pixel_in_its_place(backend, height, width, p):
    tokens = normal(2, height * width // p**2, p * p * 3)
    with on_backend(backend):
        _, image = uk.patch_l1(tokens, torch.zeros(2, 3, height, width, device=DEVICE), p)
    assert torch.equal(image, image_truth(tokens, height, width, p))
    assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, height, width, p", [(1, 2, 2, 2), (3, 6, 9, 3), (2, 32, 48, 16), (1, 14, 7, 7)])
def test_patch_l1_kernel(dtype, batch, height, width, p):
    tokens = normal(batch, height * width // p**2, p * p * 3, dtype=dtype)
    images = torch.rand(batch, 3, height, width, device=DEVICE)
    images[0, 0, 0, 0] = tokens[0, 0, 0]  # equal pixels have gradient 0
    grad_image = normal(batch, 3, height, width, dtype=dtype, seed=1)

    def run(backend):
        leaf = tokens.clone().requires_grad_()
        with on_backend(backend):
            loss, image = uk.patch_l1(leaf, images, p)
            alone = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        # Both outputs at once, as the perceptual term sends its gradient through the image.
        return loss, image, alone, torch.autograd.grad((loss, image), leaf, (loss.new_tensor(50.0), grad_image))[0]

    leaf = tokens.double().requires_grad_()
    image = image_truth(leaf, height, width, p)
    loss = (image - images.double()).abs().mean()
    alone = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    both = torch.autograd.grad((loss, image), leaf, (torch.tensor(50.0, device=DEVICE), grad_image.double()))[0]
    assert_twice_as_good(run("triton"), run("torch"), (loss, image, alone, both))


def distance_truth(a, b, weight):
    """LPIPS's distance from its equation, in float64."""
    a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a.double(), b.double()))
    return torch.einsum("bchw,c->b", (a - b).square(), weight.double()) / (a.shape[2] * a.shape[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (3, 64, 8, 9), (2, 130, 4, 4)])
def test_lpips_distance_kernel(dtype, shape):
    a, b = maps(*shape, dtype=dtype), maps(*shape, dtype=dtype, seed=1)
    weight = torch.rand(shape[1], device=DEVICE)
    grad = normal(shape[0], seed=2)

    def run(function, cast=lambda x: x):
        leaves = [cast(x).detach().requires_grad_() for x in (a, b)]
        distance = function(*leaves, weight)
        return distance, *torch.autograd.grad(distance, leaves, grad.to(distance.dtype))

    with on_backend("torch"):
        eager = run(uk.lpips_distance)
    with on_backend("triton"):
        fused = run(uk.lpips_distance)
    assert_twice_as_good(fused, eager, run(distance_truth, torch.Tensor.double))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lpips_gradient_goes_where_it_is_asked_for(backend):
    a, b, weight = maps(2, 7, 3, 5), maps(2, 7, 3, 5, seed=1), torch.rand(7, device=DEVICE)
    both = [x.clone().requires_grad_() for x in (a, b)]
    with on_backend(backend):
        uk.lpips_distance(*both, weight).sum().backward()
        for index in (0, 1):
            pair = [a, b]
            pair[index] = leaf = pair[index].clone().requires_grad_()
            uk.lpips_distance(*pair, weight).sum().backward()
            torch.testing.assert_close(leaf.grad, both[index].grad)
        assert uk.lpips_distance(a, a, weight).eq(0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_targets_and_weights_take_no_gradient(backend):
    tokens, images = normal(2, 4, 12).requires_grad_(), normal(2, 3, 4, 4).requires_grad_()
    a, b, weight = maps(2, 7, 3, 5).requires_grad_(), maps(2, 7, 3, 5, seed=1), torch.rand(7, device=DEVICE)
    with on_backend(backend):
        (uk.patch_l1(tokens, images, 2)[0] + uk.lpips_distance(a, b, weight.requires_grad_()).sum()).backward()
    assert tokens.grad.any() and a.grad.any() and images.grad is None and weight.grad is None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lpips_gradient_at_a_dark_pixel_is_finite(backend):
    a, b, weight = maps(1, 5, 2, 2), maps(1, 5, 2, 2, seed=1), torch.rand(5, device=DEVICE)
    a[0, :, 1, 0] = 0
    a.requires_grad_()
    with on_backend(backend):
        uk.lpips_distance(a, b, weight).sum().backward()
    # The norm's gradient is taken as 0, so what is left is 2 w (â − b̂) / 1e-10 / pixels.
    unit = b[0, :, 1, 0] / b[0, :, 1, 0].norm()
    torch.testing.assert_close(a.grad[0, :, 1, 0], -2 * weight * unit / 1e-10 / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_as_in_pytorch(bad):
    tokens, images, weight = normal(2, 4, 12), torch.rand(2, 3, 4, 4, device=DEVICE), torch.rand(5, device=DEVICE)
    tokens[0, 1, 2] = bad
    images[1, 0, 0, 0] = bad
    a, b = maps(2, 5, 2, 2), maps(2, 5, 2, 2, seed=1)
    a[0, 1, 1, 1] = bad
    results = []
    for backend in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in (tokens, a, b)]
        with on_backend(backend):
            loss, image = uk.patch_l1(leaves[0], images, 2)
            distance = uk.lpips_distance(leaves[1], leaves[2], weight)
            results.append([loss, image, distance, *torch.autograd.grad(loss + distance.sum(), leaves)])
    torch.testing.assert_close(results[1], results[0], equal_nan=True)


def test_empty_input():
    results = []
    for backend in ("torch", "triton"):
        tokens, features = normal(0, 4, 12).requires_grad_(), maps(0, 5, 2, 2).requires_grad_()
        with on_backend(backend):
            loss, image = uk.patch_l1(tokens, torch.rand(0, 3, 4, 4, device=DEVICE), 2)
            distance = uk.lpips_distance(features, features, torch.rand(5, device=DEVICE))
            gradients = torch.autograd.grad(image.sum() + distance.sum(), (tokens, features))
            results.append([loss, image, distance, *gradients])
    torch.testing.assert_close(results[1], results[0], equal_nan=True)


def test_operators_pass_opcheck():
    tokens, images = normal(2, 4, 12), torch.rand(2, 3, 4, 4, device=DEVICE)
    image = maps(2, 3, 4, 4)
    a, b, weight = maps(2, 5, 2, 3), maps(2, 5, 2, 3, seed=1), torch.rand(5, device=DEVICE)
    for operator, arguments in (
        (_patch_l1, (tokens.requires_grad_(), images, 2)),
        (_patch_l1_backward, (torch.ones((), device=DEVICE), image, image, images, 2)),
        (_distance_backward, (normal(2), a, b, weight, False, True)),
        (_distance, (a.clone().requires_grad_(), b.clone().requires_grad_(), weight)),
        (_distance, (a, b.clone().requires_grad_(), weight)),
    ):
        torch.library.opcheck(operator.registered, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_values(backend):
    images, weight = torch.rand(2, 3, 4, 4, device=DEVICE), torch.rand(3, device=DEVICE)
    tokens = normal(2, 4, 12)
    target = maps(2, 3, 4, 4, seed=1)

    def loss(tokens):
        l1, image = uk.patch_l1(tokens, images, 2)
        return l1 + uk.lpips_distance(target, image, weight).mean()

    def run(function):
        leaf = tokens.clone().requires_grad_()
        value = function(leaf)
        return value, torch.autograd.grad(value, leaf)[0]

    with on_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        torch.testing.assert_close(run(compiled), run(loss))


def test_wrong_input_is_refused():
    tokens, images = normal(2, 4, 12), torch.rand(2, 3, 4, 4, device=DEVICE)
    a, weight = maps(2, 5, 2, 3), torch.rand(5, device=DEVICE)
    for call, error, message in (
        (lambda: uk.patch_l1(tokens[0], images, 2), ValueError, r"they must be \[B, P, p\*p\*3\]"),
        (lambda: uk.patch_l1(tokens, images[:, :2], 2), ValueError, r"\[B, 3, H, W\]"),
        (lambda: uk.patch_l1(tokens, images, 3), ValueError, "not divisible by patch_size 3"),
        (lambda: uk.patch_l1(tokens, images, 4), ValueError, r"ask for \(2, 1, 48\)"),
        (lambda: uk.patch_l1(tokens.double(), images, 2), TypeError, "float64"),
        (lambda: uk.patch_l1(tokens, images.byte(), 2), TypeError, "images is torch.uint8"),
        (lambda: uk.patch_l1(tokens, images.transpose(2, 3), 2), ValueError, "images has strides"),
        (lambda: uk.patch_l1(tokens, images.to("meta"), 2), ValueError, "images is on meta"),
        (lambda: uk.lpips_distance(a[0], a[0], weight), ValueError, r"\[B, C, H, W\]"),
        (lambda: uk.lpips_distance(a, a[:1], weight), ValueError, "they must agree"),
        (lambda: uk.lpips_distance(a, a.half(), weight), ValueError, "they must agree"),
        (lambda: uk.lpips_distance(a, a.contiguous(), weight), ValueError, "features_b has strides"),
        (lambda: uk.lpips_distance(a.int(), a.int(), weight), TypeError, "torch.int32"),
        (lambda: uk.lpips_distance(a, a, weight[:4]), ValueError, "weight has shape"),
        (lambda: uk.lpips_distance(a, a.to("meta"), weight), ValueError, "features_b is on meta"),
    ):
        with pytest.raises(error, match=message):
            call()
