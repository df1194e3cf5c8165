"""Query and key norms with rotary embedding against their equation in float64, on both backends."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import DEVICE, DTYPES, assert_twice_as_good, normal, on_backend, outputs_and_gradients
from torch.library import opcheck

import unite_kernels as uk
from unite_kernels.qk_rope import _qk_norm_rope, _qk_norm_rope_apart, _qk_norm_rope_backward

EPS = 1e-6
# [B, N, H, d] and the unrotated tokens: one number a pair and head; a padded width; a program and a half of rows, so
# that the weights' gradients have several partial sums; the model's width; the widest.
SHAPES = [((1, 1, 1, 2), 0), ((2, 5, 3, 10), 2), ((3, 11, 5, 18), 11), ((2, 13, 12, 64), 4), ((1, 3, 2, 256), 1)]


def tables(rows, width, dtype=torch.float32):
    angle = torch.arange(rows)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def equation(cos, sin, unrotated):
    """Each pair as a complex number times its table's."""

    def turn(x, weight):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        rows = torch.arange(x.shape[1], device=x.device) - unrotated
        c, s = (t.to(x.dtype)[rows.clamp_min(0)][:, None] for t in (cos, sin))
        turned = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
        return torch.where((rows >= 0)[:, None, None], turned, x)

    return lambda qkv, q_weight, k_weight: torch.stack(
        (turn(qkv[:, :, 0], q_weight), turn(qkv[:, :, 1], k_weight), qkv[:, :, 2]), dim=2
    )


def run(backend, inputs, *rest):
    with on_backend(backend):
        return outputs_and_gradients(lambda *given: uk.qk_norm_rope(*given, *rest), inputs)


def apart(*given, **options):
    """`qk_norm_rope_apart`, packed again."""
    return torch.stack(uk.qk_norm_rope_apart(*given, **options), dim=2)


def inputs_of(shape, dtype, weight_dtype=torch.float32):
    batch, tokens, heads, width = shape
    weights = (normal(width, dtype=weight_dtype, seed=seed) for seed in (1, 2))
    return [normal(batch, tokens, 3, heads, width, dtype=dtype), *weights]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, unrotated", SHAPES)
def test_against_the_equation(dtype, shape, unrotated):
    inputs = inputs_of(shape, dtype)
    rotary = (*tables(shape[1] + 3, shape[3]), unrotated)
    truth = outputs_and_gradients(equation(*rotary), inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(equation(*rotary), inputs)
    assert_twice_as_good(run("torch", inputs, *rotary), naive, truth)
    assert_twice_as_good(run("triton", inputs, *rotary), naive, truth)


@pytest.mark.parametrize("eps", [1e-6, 0.7])
def test_eps_is_added_to_the_mean_square(eps, monkeypatch):
    monkeypatch.setitem(globals(), "EPS", eps)
    qkv, *weights = inputs_of((2, 5, 3, 16), torch.float32)
    inputs, rotary = [1e-3 * qkv, *weights], (*tables(5, 16), 1)
    truth = outputs_and_gradients(equation(*rotary), inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(equation(*rotary), inputs)
    options = {} if eps == 1e-6 else {"eps": eps}
    for backend in ("torch", "triton"):
        for form in (uk.qk_norm_rope, apart):
            with on_backend(backend):
                found = outputs_and_gradients(lambda *given: form(*given, *rotary, **options), inputs)
            assert_twice_as_good(found, naive, truth)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape, unrotated", [*SHAPES[1:], ((2, 0, 3, 16), 0)])
def test_apart_is_the_same_to_the_bit(backend, shape, unrotated):
    inputs = inputs_of(shape, torch.bfloat16)
    rotary = (*tables(shape[1], shape[3]), unrotated)
    with on_backend(backend):
        found = outputs_and_gradients(lambda *given: apart(*given, *rotary), inputs)
    for ours, theirs in zip(found, run(backend, inputs, *rotary), strict=True):
        assert torch.equal(ours, theirs)


def test_apart_takes_gradients_of_any_strides():
    leaves = [x.requires_grad_() for x in inputs_of((2, 5, 3, 16), torch.float32)]
    grad = normal(2, 3, 3, 5, 16).permute(0, 3, 1, 2, 4)  # heads before tokens
    with on_backend("triton"):
        parts = uk.qk_norm_rope_apart(*leaves, *tables(5, 16), 2)
        whole = uk.qk_norm_rope(*leaves, *tables(5, 16), 2)
    assert all(part.is_contiguous() for part in parts)
    expected = torch.autograd.grad(whole, leaves, grad)
    for ours, theirs in zip(torch.autograd.grad(parts, leaves, grad.unbind(2)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_weights_and_tables_of_the_low_dtype():
    inputs = inputs_of((2, 5, 3, 16), torch.bfloat16, torch.bfloat16)
    rotary = (*tables(5, 16, torch.bfloat16), 0)
    truth = outputs_and_gradients(equation(*rotary), inputs, lambda x: torch.float64)
    assert_twice_as_good(run("triton", inputs, *rotary), run("torch", inputs, *rotary), truth)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_pass_unchanged(backend):
    inputs = inputs_of((2, 5, 3, 16), torch.float32)
    out, grad, _, _ = run(backend, inputs, *tables(5, 16), 2)
    assert torch.equal(out[:, :, 2], inputs[0][:, :, 2])
    assert torch.equal(grad[:, :, 2], normal(*out.shape, seed=99)[:, :, 2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_out_as_in_pytorch(bad):
    inputs = inputs_of((2, 5, 3, 16), torch.float32)
    inputs[0][1, 2, 0, 1, 3] = inputs[0][0, 3, 2, 0, 0] = bad
    plain, fused = (run(backend, inputs, *tables(5, 16), 2) for backend in ("torch", "triton"))
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours.nan_to_num(0, 0, 0), theirs.nan_to_num(0, 0, 0))


@pytest.mark.parametrize("shape", [(0, 5, 3, 16), (2, 0, 3, 16), (2, 5, 0, 16)])
def test_empty(shape):
    inputs = inputs_of(shape, torch.float32)
    plain, fused = (run(backend, inputs, *tables(5, 16), 0) for backend in ("torch", "triton"))
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_same_bits_every_time():
    inputs = inputs_of((3, 40, 12, 16), torch.bfloat16)
    results = [run("triton", inputs, *tables(40, 16), 4) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_opcheck():
    inputs = inputs_of((2, 3, 2, 8), torch.float32)
    rest = (*tables(3, 8), 1, EPS)
    grad = normal(2, 3, 3, 2, 8, seed=9)
    opcheck(_qk_norm_rope_backward.registered, ([grad], *inputs, *rest))
    opcheck(_qk_norm_rope_backward.registered, (list(grad.unbind(2)), *inputs, *rest))
    for operator in (_qk_norm_rope, _qk_norm_rope_apart):
        opcheck(operator.registered, (*(x.requires_grad_() for x in inputs), *rest))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", [uk.qk_norm_rope, apart])
def test_compiled(backend, form):
    cos, sin = tables(5, 8)

    def function(qkv, q_weight, k_weight):
        return torch.tanh(form(qkv * 2, q_weight, k_weight, cos, sin, 2))

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    inputs = inputs_of((2, 5, 2, 8), torch.float32)
    with on_backend(backend):
        torch.testing.assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


def test_compiled_plain_pytorch_has_no_complex_numbers():
    """Inductor has no code for them."""
    nodes = []

    def keep(graph, _):
        nodes.extend(graph.graph.nodes)
        return graph

    with on_backend("torch"):
        torch.compile(uk.qk_norm_rope, backend=keep)(*inputs_of((2, 5, 2, 8), torch.float32), *tables(5, 8), 2)
    assert nodes and not any("complex" in str(node.target) for node in nodes)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_nothing(backend):
    inputs = inputs_of((2, 5, 2, 8), torch.bfloat16)
    expected = run(backend, inputs, *tables(5, 8), 0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for ours, theirs in zip(run(backend, inputs, *tables(5, 8), 0), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


REFUSED = {
    "rank": (ValueError, "qkv has shape .* must be \\[B, N, 3, H, d\\]", {"qkv": normal(2, 5, 3, 16)}),
    "two parts": (ValueError, "must be \\[B, N, 3, H, d\\]", {"qkv": normal(2, 5, 2, 2, 8)}),
    "odd": (ValueError, "even width from 2 to 256", {"qkv": normal(2, 5, 3, 2, 7)}),
    "unrotated": (ValueError, "unrotated is 6; it must lie in \\[0, 5\\]", {"unrotated": 6}),
    "rows": (ValueError, "5 rotated tokens need at least as many rows of 4", {"cos": normal(4, 4), "unrotated": 0}),
    "sin": (ValueError, "sin has shape", {"sin": normal(5, 8)}),
    "table strides": (ValueError, "cos has strides", {"cos": normal(5, 8)[:, :4]}),
    "weight": (ValueError, "k_weight has shape", {"k_weight": normal(4)}),
    "dtype": (TypeError, "q_weight is torch.float16", {"q_weight": normal(8).half()}),
    "device": (ValueError, "sin is on meta", {"sin": torch.ones(5, 4, device="meta")}),
    "strides": (ValueError, "qkv has strides", {"qkv": normal(2, 3, 5, 2, 8).transpose(1, 2)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    error, sentence, changes = REFUSED[case]
    cos, sin = tables(5, 8)
    arguments = {"qkv": normal(2, 5, 3, 2, 8), "q_weight": normal(8), "k_weight": normal(8)}
    arguments |= {"cos": cos, "sin": sin, "unrotated": 2} | changes
    with pytest.raises(error, match=f"qk_norm_rope: .*{sentence}"):
        uk.qk_norm_rope(**arguments)
