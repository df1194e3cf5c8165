"""Padded weights: the same MLP and gradients, at widths that tensor cores can load."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from kernel_testing import on_backend

from unite_fast.model import blocks
from unite_fast.model import linear as linears
from unite_fast.model.aligned import Padding, compute_dtype, pad, padded_placeholder
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


def run(mlp_in, mlp_out, x):
    """Result, and gradients of x, weights and biases."""
    x = x.detach().requires_grad_()
    found = swiglu_mlp(mlp_in, mlp_out, x)
    wanted = (x, *mlp_in.parameters(), *mlp_out.parameters())
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

    monkeypatch.setattr(blocks, "pad", refused)
    monkeypatch.setattr(linears, "pad", refused)
    run(*mlp(48), torch.randn(2, 48))  # hidden width 128
    mlp_in, mlp_out = mlp()
    mlp_out.weight.ds_id = 1  # as under ZeRO 3
    run(mlp_in, mlp_out, torch.randn(2, 32))
    with pytest.raises(AssertionError, match="copied"):
        run(*mlp(), torch.randn(2, 32))


class Other(nn.Linear):
    """Has a way of its own to multiply, as a Linear in FP8 does."""

    def forward(self, x, padding=None, *, add_bias=True):
        weight = self.weight if padding is None else pad(self.weight, padding, dtype=x.dtype)
        self.seen = tuple(weight.shape), add_bias
        return (x @ weight.t() + (self.bias if add_bias else 0)) * 0.5


@pytest.mark.parametrize(("width", "hidden"), [(32, 96), (48, 128)])
def test_linears_of_another_kind_multiply_in_their_own_way(width, hidden):
    """On a CPU, too, as FP8 is emulated there; the bias in between is SwiGLU's in any case."""
    torch.manual_seed(0)
    mlp_in, mlp_out = Other(width, 2 * swiglu_hidden(width)), Other(swiglu_hidden(width), width)
    parameters, x = [*mlp_in.parameters(), *mlp_out.parameters()], torch.randn(3, width)
    gate, up = ((x @ mlp_in.weight.t()) * 0.5 + mlp_in.bias).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up @ mlp_out.weight.t() + mlp_out.bias) * 0.5
    torch.testing.assert_close(swiglu_mlp(mlp_in, mlp_out, x), expected)
    assert mlp_in.seen == ((2 * hidden, width), False) and mlp_out.seen == ((width, hidden), True)
    assert all(a is b for a, b in zip([*mlp_in.parameters(), *mlp_out.parameters()], parameters, strict=True))


def test_elsewhere_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(blocks, "pad", None)
    monkeypatch.setattr(linears, "pad", None)
    run(*mlp(), torch.randn(2, 32))


@pytest.mark.parametrize(("shape", "dim", "chunks"), [((10, 3), 0, 2), ((3, 5), 1, 1), ((34,), 0, 2), ((32, 2), 0, 2)])
def test_each_chunk_is_padded_with_zeros(shape, dim, chunks):
    x = torch.randn(shape, requires_grad=True)
    found = pad(x, Padding(dim, chunks), dtype=torch.bfloat16)
    padded = found.chunk(chunks, dim)
    for chunk, original in zip(padded, x.chunk(chunks, dim), strict=True):
        width = original.shape[dim]
        assert chunk.shape[dim] == aligned(width)
        assert torch.equal(chunk.narrow(dim, 0, width), original.bfloat16())
        assert not chunk.narrow(dim, width, aligned(width) - width).any()
    factor = torch.randn(found.shape).bfloat16()
    (found * factor).sum().backward()
    expected = torch.cat([f.narrow(dim, 0, shape[dim] // chunks) for f in factor.chunk(chunks, dim)], dim).float()
    assert torch.equal(x.grad, expected) and x.grad.is_contiguous()


@pytest.mark.parametrize(("shape", "padding"), [((10, 3), Padding(0, chunks=2)), ((3, 5), Padding(1))])
def test_a_placeholder_has_the_shape_and_the_gradient_and_no_memory(shape, padding):
    x = torch.randn(shape, requires_grad=True)
    whole, placeholder = (make(x, padding, dtype=torch.bfloat16) for make in (pad, padded_placeholder))
    assert (placeholder.shape, placeholder.dtype) == (whole.shape, whole.dtype)
    assert placeholder.untyped_storage().nbytes() == placeholder.itemsize
    factor = torch.randn(whole.shape).bfloat16()
    ours, theirs = (torch.autograd.grad(found, x, factor)[0] for found in (placeholder, whole))
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32 and ours.is_contiguous()


def test_the_dtype_of_products_and_a_compiled_copy():
    weight = torch.randn(10, 4)
    assert compute_dtype(weight) == torch.float32
    compiled = torch.compile(
        lambda w: pad(w, Padding(0, 2), dtype=compute_dtype(w)), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(weight), pad(weight, Padding(0, 2), dtype=torch.bfloat16))


def test_a_training_step_leaves_the_padding_out_of_gradients(pretended_cuda):
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
