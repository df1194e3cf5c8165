"""Bias with ReLU and with the 2×2 maximum pool: kernels against PyTorch's own operators, forward and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import DEVICE, DTYPES, assert_twice_as_good, normal, on_backend, outputs_and_gradients
from torch.library import opcheck

import unite_kernels as uk
from unite_kernels.rectify import (
    _bias_relu,
    _bias_relu_backward,
    _bias_relu_max_pool,
    _bias_relu_max_pool_backward,
)

# Fewer pixels than a program takes, several programs with a remainder, odd heights and widths, more channels than a
# tile holds, one channel.
SHAPES = [(1, 64, 2, 2), (2, 7, 3, 5), (1, 64, 5, 38), (1, 512, 4, 7), (1, 1030, 2, 3), (2, 1, 9, 4)]


def maps(*shape, dtype=torch.float32, seed=0):
    """A normal feature map [B, C, H, W] in channels-last memory."""
    return normal(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def equation(x, bias):
    return F.relu(x + bias.view(1, -1, 1, 1))


def pool_equation(x, bias):
    found = equation(x, bias)
    return found, F.max_pool2d(found, 2)


OPERATORS = {"bias_relu": (uk.bias_relu, equation), "bias_relu_max_pool": (uk.bias_relu_max_pool, pool_equation)}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def run(backend, name, *inputs):
    with on_backend(backend):
        return outputs_and_gradients(OPERATORS[name][0], inputs)


@each_operator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_equation(name, dtype, shape):
    # A bias of x's dtype, and float32 where rows have odd numbers of pixels.
    x, bias = maps(*shape, dtype=dtype), normal(shape[1], dtype=torch.float32 if shape[3] % 2 else dtype, seed=1)

    def rounded(x, bias):  # so that the truth, too, has the ties and zeros of the dtype
        found = F.relu((x + bias.to(x.dtype).view(1, -1, 1, 1)).to(dtype).double())
        return (found, F.max_pool2d(found, 2)) if name == "bias_relu_max_pool" else found

    truth = outputs_and_gradients(rounded, [x, bias], lambda x: torch.float64)
    plain, fused = run("torch", name, x, bias), run("triton", name, x, bias)
    assert_twice_as_good(fused, plain, truth)
    for index, tensor in enumerate(fused[:-1]):
        assert tensor.is_contiguous(memory_format=torch.channels_last), index
    # Without a bias nothing is rounded but the sum of the map's gradient and the pool's.
    for ours, theirs in zip(run("triton", name, x, None), run("torch", name, x, None), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("height, width", [(2, 2), (5, 7)])
def test_a_gradient_goes_to_the_first_of_equal_maxima(backend, height, width):
    """All 81 orders of three numbers in a window, one a channel, among them every tie, in every window."""
    windows = torch.tensor(list(itertools.product((0.0, 1.0, 2.0), repeat=4)), device=DEVICE).view(81, 2, 2)
    x = windows.repeat(1, height // 2 + 1, width // 2 + 1)[None, :, :height, :width]
    x = x.contiguous(memory_format=torch.channels_last)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with on_backend(backend):
        found, pooled = uk.bias_relu_max_pool(leaves[0], None)
    expected = F.relu(leaves[1])
    expected_pooled = F.max_pool2d(expected.contiguous(), 2)
    assert torch.equal(found, expected) and torch.equal(pooled, expected_pooled)
    grad = normal(*pooled.shape, seed=2)
    outputs = zip((pooled, expected_pooled), leaves, strict=True)
    assert torch.equal(*(torch.autograd.grad(output, leaf, grad)[0] for output, leaf in outputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_output_of_two_may_have_a_gradient(dtype):
    x, bias = maps(2, 5, 5, 7, dtype=dtype), normal(5, seed=1)
    found = {}
    for backend in ("torch", "triton"):
        leaf = x.clone().requires_grad_()
        with on_backend(backend):
            outputs = uk.bias_relu_max_pool(leaf, bias)
            grads = [normal(*out.shape, dtype=dtype, seed=3) for out in outputs]
            alone = [torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for out, g in zip(outputs, grads)]
            # The pool's gradient as a convolution sends it, and one of other strides.
            strided = grads[1].contiguous(memory_format=torch.channels_last)
            alone.append(torch.autograd.grad(outputs[1], leaf, strided)[0])
        found[backend] = alone
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found["triton"][1], found["triton"][2])


def test_the_map_alone_is_kept():
    kept = []
    with on_backend("triton"), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        found, _ = uk.bias_relu_max_pool(maps(2, 5, 4, 4).requires_grad_(), normal(5))
        uk.bias_relu(found.detach().requires_grad_(), normal(5))
    assert len(kept) == 2 and all(tensor.shape == found.shape for tensor in kept)
    assert kept[0].data_ptr() == found.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_operator
def test_what_is_not_finite_comes_out_as_in_pytorch(name, bad):
    for places in ([(0, 0)], [(0, 1), (1, 0)], [(1, 1), (0, 0)]):  # one of a window, two
        x = maps(1, 3, 4, 4)
        for y, column in places:
            x[0, 1, y, column] = bad
        plain, fused = run("torch", name, x, None), run("triton", name, x, None)
        for ours, theirs in zip(fused, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    bias = torch.tensor([0.0, bad, 1.0], device=DEVICE)
    for ours, theirs in zip(run("triton", name, x, bias), run("torch", name, x, bias), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@each_operator
def test_empty(name):
    inputs = maps(0, 5, 4, 4), normal(5)
    for ours, theirs in zip(run("triton", name, *inputs), run("torch", name, *inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_opcheck():
    x, bias, out = maps(2, 5, 3, 4), normal(5), maps(2, 5, 3, 4, seed=1).relu()
    for operator, arguments in (
        (_bias_relu, (x.clone().requires_grad_(), bias)),
        (_bias_relu, (x.clone().requires_grad_(), bias.clone().requires_grad_())),
        (_bias_relu, (x, None)),
        (_bias_relu_backward, (x, out)),
        (_bias_relu_max_pool, (x.clone().requires_grad_(), bias)),
        (_bias_relu_max_pool, (x, None)),
        (_bias_relu_max_pool_backward, (x, maps(2, 5, 1, 2), out)),
        (_bias_relu_max_pool_backward, (None, maps(2, 5, 1, 2), out)),
    ):
        opcheck(operator.registered, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(backend, dtype):
    weight = normal(6, 6, 3, 3, dtype=dtype, seed=2)

    def function(x, bias):
        found, pooled = uk.bias_relu_max_pool(torch.sin(x), bias)
        return found * 2, uk.bias_relu(F.conv2d(pooled, weight, padding=1), bias)

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    with on_backend(backend):
        inputs = [maps(2, 6, 5, 8, dtype=dtype), normal(6, dtype=dtype, seed=1)]
        torch.testing.assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


@each_operator
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_nothing(name, backend):
    inputs = maps(2, 5, 4, 4, dtype=torch.bfloat16), normal(5)
    expected = run(backend, name, *inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for ours, theirs in zip(run(backend, name, *inputs), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@each_operator
def test_wrong_input_is_refused(name):
    function, x, bias = OPERATORS[name][0], maps(2, 5, 3, 4), normal(5)
    for arguments, error, message in (
        ((x[0], bias), ValueError, r"x has shape \(5, 3, 4\); it must be \[B, C, H, W\]"),
        ((x.contiguous(), bias), ValueError, "x has strides .* channels-last"),
        ((x.double(), bias), TypeError, "x is torch.float64"),
        ((x, bias[:4]), ValueError, "bias has shape"),
        ((x.half(), bias.bfloat16()), TypeError, "bias is torch.bfloat16; it must be float32 or x's dtype"),
        ((x, normal(10)[::2]), ValueError, "bias has strides"),
        ((x, bias.to("meta")), ValueError, "bias is on meta"),
    ):
        with pytest.raises(error, match=f"^{name}: {message}"):
            function(*arguments)


@pytest.mark.parametrize("shape", [(2, 5, 1, 4), (2, 5, 4, 1), (2, 0, 4, 4)])
def test_a_pool_without_a_window_is_refused(shape):
    with pytest.raises(ValueError, match="^bias_relu_max_pool: x has shape .* a window takes a channel and 2×2 pixels"):
        uk.bias_relu_max_pool(maps(*shape), None)
