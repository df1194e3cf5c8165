"""Weights with zeros between their rows: the same MLP and gradients, at widths that tensor cores can load."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from kernel_testing import on_backend

from unite_fast.model import blocks
from unite_fast.model import linear as linears
from unite_fast.model.aligned import Zeros, product_dtype, unread_with_zeros, with_zeros
from unite_fast.model.blocks import swiglu_hidden, swiglu_mlp
from unite_fast.model.casts import one_micro_batch
from unite_fast.model.linear import Linear
from unite_kernels.dispatch import aligned


@pytest.fixture
def pretended_cuda(monkeypatch):
    """Tensors say that they are on CUDA; plain PyTorch computes."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    with on_backend("torch"):
        yield


def mlp(width: int = 32) -> tuple[Linear, Linear]:
    torch.manual_seed(0)
    hidden = swiglu_hidden(width)
    return Linear(width, 2 * hidden), Linear(hidden, width)


def run(inward, outward, x):
    """Result, and gradients of x, weights and biases."""
    x = x.detach().requires_grad_()
    found = swiglu_mlp(inward, outward, x)
    wanted = (x, *inward.parameters(), *outward.parameters())
    return [found, *torch.autograd.grad(found.float().square().sum(), wanted)]


def test_the_published_widths():
    assert [aligned(swiglu_hidden(c)) for c in (768, 1024, 1152, 256)] == [2048, 2736, 3072, 688]


def test_the_same_result_and_gradients(pretended_cuda, monkeypatch):
    pair, x, seen = mlp(), torch.randn(3, 5, 32), []
    linear = F.linear

    def watched(x, weight, bias=None):
        seen.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    found = run(*pair, x)
    assert seen == [(2 * 96, 32), (32, 96)]  # hidden width 85
    monkeypatch.setattr(blocks, "aligned", lambda width: width)
    expected = run(*pair, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        # Sums of up to 96 terms in another order: 1e-6 of their size.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_widths_that_fit_and_gathered_parameters_are_left_alone(pretended_cuda, monkeypatch):
    def refused(*given, **named):
        raise AssertionError("copied")

    monkeypatch.setattr(blocks, "with_zeros", refused)
    monkeypatch.setattr(linears, "with_zeros", refused)
    run(*mlp(48), torch.randn(2, 48))  # hidden width 128
    inward, outward = mlp()
    outward.weight.ds_id = 1  # as under ZeRO 3
    run(inward, outward, torch.randn(2, 32))
    with pytest.raises(AssertionError, match="copied"):
        run(*mlp(), torch.randn(2, 32))


class Other(nn.Linear):
    """Has a way of its own to multiply, as a Linear in FP8 does."""

    def forward(self, x, zeros=None, *, biased=True):
        weight = self.weight if zeros is None else with_zeros(self.weight, zeros, dtype=x.dtype)
        self.seen = tuple(weight.shape), biased
        return (x @ weight.t() + (self.bias if biased else 0)) * 0.5


@pytest.mark.parametrize(("width", "hidden"), [(32, 96), (48, 128)])
def test_linears_of_another_kind_multiply_in_their_own_way(width, hidden):
    """On a CPU, too, as FP8 is emulated there; the bias in between is SwiGLU's in any case."""
    torch.manual_seed(0)
    inward, outward = Other(width, 2 * swiglu_hidden(width)), Other(swiglu_hidden(width), width)
    parameters, x = [*inward.parameters(), *outward.parameters()], torch.randn(3, width)
    gate, up = ((x @ inward.weight.t()) * 0.5 + inward.bias).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up @ outward.weight.t() + outward.bias) * 0.5
    torch.testing.assert_close(swiglu_mlp(inward, outward, x), expected)
    assert inward.seen == ((2 * hidden, width), False) and outward.seen == ((width, hidden), True)
    assert all(a is b for a, b in zip([*inward.parameters(), *outward.parameters()], parameters, strict=True))


def test_elsewhere_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(blocks, "with_zeros", None)
    monkeypatch.setattr(linears, "with_zeros", None)
    run(*mlp(), torch.randn(2, 32))


@pytest.mark.parametrize(("shape", "dim", "pieces"), [((10, 3), 0, 2), ((3, 5), 1, 1), ((34,), 0, 2), ((32, 2), 0, 2)])
def test_zeros_behind_each_piece(shape, dim, pieces):
    x = torch.randn(shape, requires_grad=True)
    found = with_zeros(x, Zeros(dim, pieces), dtype=torch.bfloat16)
    each = found.chunk(pieces, dim)
    for piece, original in zip(each, x.chunk(pieces, dim), strict=True):
        width = original.shape[dim]
        assert piece.shape[dim] == aligned(width)
        assert torch.equal(piece.narrow(dim, 0, width), original.bfloat16())
        assert not piece.narrow(dim, width, aligned(width) - width).any()
    factor = torch.randn(found.shape).bfloat16()
    (found * factor).sum().backward()
    expected = torch.cat([f.narrow(dim, 0, shape[dim] // pieces) for f in factor.chunk(pieces, dim)], dim).float()
    assert torch.equal(x.grad, expected) and x.grad.is_contiguous()


@pytest.mark.parametrize(("shape", "zeros"), [((10, 3), Zeros(0, pieces=2)), ((3, 5), Zeros(1))])
def test_a_stand_in_has_the_shape_and_the_gradient_and_no_memory(shape, zeros):
    x = torch.randn(shape, requires_grad=True)
    whole, stand_in = (fill(x, zeros, dtype=torch.bfloat16) for fill in (with_zeros, unread_with_zeros))
    assert (stand_in.shape, stand_in.dtype) == (whole.shape, whole.dtype)
    assert stand_in.untyped_storage().nbytes() == stand_in.itemsize
    factor = torch.randn(whole.shape).bfloat16()
    ours, theirs = (torch.autograd.grad(found, x, factor)[0] for found in (stand_in, whole))
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32 and ours.is_contiguous()


def test_the_dtype_of_products_and_a_compiled_copy():
    weight = torch.randn(10, 4)
    assert product_dtype(weight) == torch.float32
    compiled = torch.compile(
        lambda w: with_zeros(w, Zeros(0, 2), dtype=product_dtype(w)), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(weight), with_zeros(weight, Zeros(0, 2), dtype=torch.bfloat16))


def test_a_training_step_adds_its_gradients_to_the_weights_without_zeros(pretended_cuda):
    pair, x = mlp(), torch.randn(3, 5, 32)
    parameters = [*pair[0].parameters(), *pair[1].parameters()]
    exact = torch.autograd.grad(swiglu_mlp(*pair, x).square().sum(), parameters)
    with one_micro_batch("cpu"):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                found = swiglu_mlp(*pair, x)
            found.float().square().sum().backward()
    for parameter, gradient in zip(parameters, exact, strict=True):
        assert parameter.grad.shape == parameter.shape and parameter.grad.is_contiguous()
        assert (parameter.grad - 2 * gradient).norm() < 0.02 * (2 * gradient).norm()
