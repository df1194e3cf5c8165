"""SwiGLU's gate against its equation in float64, on both backends."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import DEVICE, DTYPES, assert_twice_as_good, normal, on_backend, outputs_and_gradients
from torch.library import opcheck

import unite_kernels as uk
from unite_kernels.swiglu import _swiglu, _swiglu_backward

# Narrower than a program, exactly one, several with a remainder, rows at odd addresses, any number of dimensions.
SHAPES = [(2,), (3, 10), (2, 3, 2048), (2, 2, 1, 5460), (3, 2054)]


def equation(x):
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def run(backend, *inputs):
    with on_backend(backend):
        return outputs_and_gradients(uk.swiglu, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_equation(dtype, shape):
    x = normal(*shape, dtype=dtype) * 3
    truth = outputs_and_gradients(equation, [x], lambda x: torch.float64)
    naive = outputs_and_gradients(equation, [x])
    assert_twice_as_good(run("torch", x), naive, truth)
    assert_twice_as_good(run("triton", x), naive, truth)


# Beside the shapes above: programs of several tiles, the last of them cut, and more than one of them.
@pytest.mark.parametrize("dtype, bias_dtype", [*((dtype, torch.float32) for dtype in DTYPES), (DTYPES[2], DTYPES[2])])
@pytest.mark.parametrize("shape", [*SHAPES[1:], (19, 2048), (3, 100, 14)])
def test_with_a_bias_against_the_equation(dtype, bias_dtype, shape):
    inputs = normal(*shape, dtype=dtype) * 3, normal(shape[-1], dtype=bias_dtype, seed=1)
    truth = outputs_and_gradients(lambda x, bias: equation(x + bias), inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(lambda x, bias: equation(x + bias.to(dtype)), inputs)
    assert_twice_as_good(run("torch", *inputs), naive, truth)
    assert_twice_as_good(run("triton", *inputs), naive, truth)


def test_with_a_bias_the_same_bits_every_time():
    inputs = normal(300, 2048, dtype=torch.bfloat16), normal(2048)
    first, second = (run("triton", *inputs) for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def test_extremes_come_out_as_in_pytorch():
    gate = [math.nan, math.inf, -math.inf, 100.0, -100.0, 0.0, -0.0, 1e38]
    x = torch.tensor(gate + [2.0] * len(gate), device=DEVICE)[None]
    plain, fused = run("torch", x), run("triton", x)
    torch.testing.assert_close(fused[0], plain[0], equal_nan=True)
    # At ±inf the gradient is NaN in one form and its limit in the other.
    finite = x[0, : len(gate)].isfinite()
    torch.testing.assert_close(fused[1].view(2, -1)[:, finite], plain[1].view(2, -1)[:, finite])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 6)])
def test_empty(shape, bias):
    inputs = [normal(*shape), *([normal(shape[-1])] if bias else [])]
    for ours, theirs in zip(run("triton", *inputs), run("torch", *inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_opcheck():
    for bias in (None, normal(10)):
        opcheck(_swiglu_backward.registered, (normal(2, 3, 5), normal(2, 3, 10), bias))
        if bias is not None:
            bias.requires_grad_()
        opcheck(_swiglu.registered, (normal(2, 3, 10).requires_grad_(), bias))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled(backend):
    def function(x):
        return torch.sin(uk.swiglu(torch.cos(x)))

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    with on_backend(backend):
        x = normal(3, 12)
        torch.testing.assert_close(outputs_and_gradients(compiled, [x]), outputs_and_gradients(function, [x]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_nothing(backend):
    x = normal(3, 12, dtype=torch.bfloat16)
    expected = run(backend, x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for ours, theirs in zip(run(backend, x), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize(
    "error, sentence, x, bias",
    [
        (ValueError, "last dimension holds two halves", normal(2, 5), None),
        (ValueError, "last dimension holds two halves", torch.ones(()), None),
        (ValueError, "x has strides .* call .contiguous", normal(4, 2).T, None),
        (TypeError, "x is torch.int64", torch.ones(2, 2, dtype=torch.int64), None),
        (ValueError, r"bias has shape \(2,\); it must be \(4,\)", normal(3, 4), normal(2)),
        (TypeError, "bias is torch.float16", normal(3, 4), normal(4).half()),
    ],
)
def test_refuses(error, sentence, x, bias):
    with pytest.raises(error, match=f"swiglu: .*{sentence}"):
        uk.swiglu(x, bias)
