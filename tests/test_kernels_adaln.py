"""Adaptive norms: every form against its equation in float64, on both backends."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from kernel_testing import DEVICE, DTYPES, assert_twice_as_good, normal, on_backend, outputs_and_gradients
from torch.library import opcheck

import unite_kernels as uk
from unite_kernels.adaln import _backward_operator, _operator
from unite_kernels.adaln_kernels import backward_chunk

EPS = 1e-6
# The first two fill one tile of their launches. The last two have several chunks of partial sums, the last one more
# than the sum kernel takes at once.
SHAPES = [(1, 2, 768), (1, 3, 1152), (2, 37, 50), (1, 140, 33)]  # [B, N, C]


def rms_norm(x, weight):
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x if weight is None else x * weight.to(x.dtype)


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def modulate(x, shift, scale):
    x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


# The equations of the docstrings, term by term in the dtype they are given.
EQUATIONS = {
    uk.rms_norm_modulate: lambda x, w, shift, scale: modulate(rms_norm(x, w), shift, scale),
    uk.gated_residual_rms_norm_modulate: lambda x, branch, gate, w, shift, scale: (
        r := x + gate[:, None] * branch,
        modulate(rms_norm(r, w), shift, scale),
    ),
    uk.block_boundary: lambda x, branch, gate, closing, w, shift, scale: (
        r := rms_norm(x + gate[:, None] * branch, closing),
        modulate(rms_norm(r, w), shift, scale),
    ),
    uk.layer_norm_modulate: lambda x, w, b, shift, scale: modulate(layer_norm(x, w, b), shift, scale),
    uk.gated_residual_layer_norm_modulate: lambda x, branch, gate, w, b, shift, scale: (
        r := x + gate[:, None] * branch,
        modulate(layer_norm(r, w, b), shift, scale),
    ),
    uk.layer_norm: layer_norm,
    uk.residual_layer_norm: lambda x, branch, w, b: (r := x + branch, layer_norm(r, w, b)),
}
STREAMS, TERMS, VECTORS = ("x", "branch"), ("gate", "shift", "scale"), ("closing", "weight", "bias")
FORMS = {
    "rms": (uk.rms_norm_modulate, "x weight shift scale"),
    "rms bare": (uk.rms_norm_modulate, "x - - scale"),
    "gated rms": (uk.gated_residual_rms_norm_modulate, "x branch gate weight shift scale"),
    "boundary": (uk.block_boundary, "x branch gate closing weight shift scale"),
    "layer": (uk.layer_norm_modulate, "x weight bias shift scale"),
    "layer bare": (uk.layer_norm_modulate, "x - - - scale"),
    "layer bias": (uk.layer_norm_modulate, "x - bias - scale"),
    "gated layer": (uk.gated_residual_layer_norm_modulate, "x branch gate weight bias shift scale"),
    "plain layer": (uk.layer_norm, "x weight bias"),
    "residual layer": (uk.residual_layer_norm, "x branch weight bias"),
}
PARTIAL = ("rms bare", "layer bare", "layer bias")


def inputs_of(names, shape, dtype, term_dtype=None, vector_dtype=torch.float32):
    """Inputs by name; the modulation is a view of one wider tensor, as a chunk of a Linear's output is."""
    batch, _, width = shape
    wide = normal(batch, 3 * width, dtype=term_dtype or dtype, seed=7)
    tensors = {name: normal(*shape, dtype=dtype, seed=seed) for seed, name in enumerate(STREAMS)}
    tensors |= dict(zip(TERMS, wide.chunk(3, dim=-1), strict=True))
    tensors |= {name: normal(width, dtype=vector_dtype, seed=20 + seed) for seed, name in enumerate(VECTORS)}
    return [tensors.get(name) for name in names.split()]


def run(backend, function, inputs):
    with on_backend(backend):
        return outputs_and_gradients(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "form, shape",
    # Absent terms are only compiled out of the same kernels: one shape is enough for those forms.
    [(form, shape) for form in FORMS for shape in SHAPES if shape == SHAPES[2] or form not in PARTIAL],
)
def test_against_the_equation(form, dtype, shape):
    function, names = FORMS[form]
    inputs = inputs_of(names, shape, dtype)
    truth = outputs_and_gradients(EQUATIONS[function], inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(EQUATIONS[function], inputs)
    plain = run("torch", function, inputs)
    assert_twice_as_good(plain, naive, truth)
    assert_twice_as_good(run("triton", function, inputs), naive, truth)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_number(form):
    function, names = FORMS[form]
    inputs = inputs_of(names, (1, 1, 1), torch.float32)
    # A LayerNorm of one number divides zero by √eps: float32's 1.2e-7 grows a thousandfold.
    torch.testing.assert_close(run("triton", function, inputs), run("torch", function, inputs), rtol=1e-6, atol=2e-4)


def faint(names):
    """Inputs of which the mean square of x and the branch is near the default eps."""
    inputs = zip(names.split(), inputs_of(names, (2, 5, 24), torch.float32), strict=True)
    return [1e-3 * x if name in STREAMS else x for name, x in inputs]


@pytest.mark.parametrize("eps", [1e-6, 0.7])
@pytest.mark.parametrize("form", FORMS)
def test_eps_is_added_to_the_mean_square(form, eps, monkeypatch):
    monkeypatch.setitem(globals(), "EPS", eps)
    function, names = FORMS[form]
    inputs = faint(names)
    truth = outputs_and_gradients(EQUATIONS[function], inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(EQUATIONS[function], inputs)
    given = function if eps == 1e-6 else functools.partial(function, eps=eps)
    for backend in ("torch", "triton"):
        assert_twice_as_good(run(backend, given, inputs), naive, truth)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", ["gated rms", "gated layer", "residual layer"])
def test_the_norm_reads_the_stream_as_it_is_stored(form, backend):
    function, names = FORMS[form]
    norm = uk.layer_norm if form == "residual layer" else uk.layer_norm_modulate if "layer" in form else None
    inputs = inputs_of(names, (2, 5, 24), torch.bfloat16)
    with on_backend(backend):
        residual, normed = function(*inputs)
        again = (norm or uk.rms_norm_modulate)(residual, *inputs[2 if norm is uk.layer_norm else 3 :])
    assert torch.equal(normed, again)


@pytest.mark.parametrize("form", FORMS)
def test_modulation_and_weights_of_another_dtype(form):
    function, names = FORMS[form]
    for term_dtype, vector_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        inputs = inputs_of(names, (2, 5, 24), torch.bfloat16, term_dtype, vector_dtype)
        truth = outputs_and_gradients(EQUATIONS[function], inputs, lambda x: torch.float64)
        plain, fused = run("torch", function, inputs), run("triton", function, inputs)
        assert [x.dtype for x in fused[-len(inputs) :]] == [x.dtype for x in plain[-len(inputs) :]]
        assert_twice_as_good(fused, plain, truth)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("expanded", TERMS)
@pytest.mark.parametrize("form", ["boundary", "gated layer"])
def test_each_term_has_strides_of_its_own(form, expanded, backend):
    """One is the same for all samples, one dense, and one a part of a wider tensor."""
    function, names = FORMS[form]
    given = dict(zip(names.split(), inputs_of(names, (3, 5, 16), torch.float32), strict=True))
    given[expanded] = given[expanded][:1].expand(3, -1)
    dense = next(name for name in TERMS if name != expanded)
    given[dense] = given[dense].contiguous()
    copies = [x.contiguous() for x in given.values()]
    assert all(map(torch.equal, run(backend, function, given.values()), run(backend, function, copies)))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used):
    function, names = FORMS["boundary"]
    inputs = inputs_of(names, (2, 9, 20), torch.float32)
    # With the first output alone, modulation and opening weight take no part and get zeros.
    taking_part = inputs if used else inputs[:4]
    results = []
    for backend in ("torch", "triton"):
        with on_backend(backend):
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = function(*leaves)[used]
            grads = torch.autograd.grad((output * normal(*output.shape, seed=5)).sum(), leaves, allow_unused=True)
        results.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)])
    torch.testing.assert_close(results[1], results[0])
    assert all(grad.any() for grad in results[1][: len(taking_part)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["rms", "gated rms", "boundary", "gated layer"])
def test_what_is_not_finite_comes_out_as_in_pytorch(form, bad):
    function, names = FORMS[form]
    inputs = inputs_of(names, (2, 5, 24), torch.float32)
    inputs[0][1, 2, 3] = bad
    plain, fused = run("torch", function, inputs), run("triton", function, inputs)
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours.nan_to_num(0, 0, 0), theirs.nan_to_num(0, 0, 0))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 0, 8)])
@pytest.mark.parametrize("form", ["rms", "boundary", "gated layer"])
def test_empty(form, shape):
    function, names = FORMS[form]
    inputs = inputs_of(names, shape, torch.float32)
    plain, fused = run("torch", function, inputs), run("triton", function, inputs)
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.equal(ours, theirs)


# Lengths of the samples: one above a tile and a chunk, one of nothing, and the shape that every launch choice suits.
@pytest.mark.parametrize("lengths", [(5, 1, 70, 3), (2, 0, 4), (1,)])
@pytest.mark.parametrize("form", ["rms", "gated rms", "boundary"])
def test_spans_are_the_samples_one_by_one(form, lengths):
    function, names = FORMS[form]
    tokens, width = sum(lengths), 40
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    inputs = inputs_of(names, (len(lengths), 1, width), torch.float32)
    streams = [normal(1, tokens, width, seed=40 + index) for index, name in enumerate(STREAMS) if name in names]
    inputs[: len(streams)] = streams

    def one_by_one(*inputs):
        pieces = []
        for sample, (first, length) in enumerate(zip(offsets[:-1].tolist(), lengths, strict=True)):
            arguments = [
                x[:, first : first + length] if name in STREAMS else x[sample : sample + 1] if name in TERMS else x
                for name, x in zip(names.split(), inputs, strict=True)
            ]
            pieces.append(EQUATIONS[function](*arguments))
        if isinstance(pieces[0], torch.Tensor):
            return torch.cat(pieces, dim=1)
        return tuple(torch.cat(part, dim=1) for part in zip(*pieces, strict=True))

    spans = uk.Spans(offsets, max(lengths))
    truth = outputs_and_gradients(one_by_one, inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(one_by_one, inputs)
    for backend in ("torch", "triton"):
        assert_twice_as_good(run(backend, functools.partial(function, spans=spans), inputs), naive, truth)


def test_opcheck_of_spans():
    x, branch, gate, weight, shift, scale = (
        x.requires_grad_() for x in inputs_of(FORMS["gated rms"][1], (3, 1, 12), torch.float32)
    )
    x, branch = (normal(1, 9, 12, seed=seed).requires_grad_() for seed in (1, 2))
    offsets = torch.tensor([0, 4, 5, 9], dtype=torch.int32, device=DEVICE)
    opcheck(_operator.registered, (x, branch, gate, None, weight, None, shift, scale, offsets, 4, EPS, False))


@pytest.mark.parametrize(
    ("x", "offsets", "longest"),
    [
        (normal(2, 6, 8), torch.tensor([0, 2, 6], dtype=torch.int32), 4),
        (normal(1, 6, 8), torch.tensor([0, 2, 6]), 4),
        (normal(1, 6, 8), torch.tensor([0, 2, 6], dtype=torch.int32), 7),
    ],
    ids=["batch", "dtype", "longest"],
)
def test_spans_refuse(x, offsets, longest):
    with pytest.raises(ValueError, match="rms_norm_modulate: .*span"):
        uk.rms_norm_modulate(x, None, None, normal(2, 8), spans=uk.Spans(offsets.to(DEVICE), longest))


def test_same_bits_every_time():
    function, names = FORMS["boundary"]
    inputs = inputs_of(names, (2, 70, 96), torch.bfloat16)
    for first, second in zip(run("triton", function, inputs), run("triton", function, inputs), strict=True):
        assert torch.equal(first, second)


def test_chunks_follow_the_shape():
    assert [backward_chunk(b, n) for b, n in ((64, 544), (192, 288), (1, 1), (4096, 1024))] == [32, 32, 8, 64]


@pytest.mark.parametrize("form", ["rms bare", "boundary", "gated layer"])
def test_opcheck(form):
    function, names = FORMS[form]
    order = ("x", "branch", "gate", "closing", "weight", "bias", "shift", "scale")
    given = dict(zip(names.split(), inputs_of(names, (2, 3, 12), torch.float32), strict=True))
    tensors = [given[name].requires_grad_() if name in given else None for name in order]
    layer = "layer" in form
    opcheck(_operator.registered, (*tensors, None, 0, EPS, layer))
    grad = normal(2, 3, 12, seed=3)
    tensors = [None if x is None else x.detach() for x in tensors]
    opcheck(_backward_operator.registered, (grad if "branch" in given else None, grad, *tensors, None, 0, EPS, layer))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend, dynamic):
    function, names = FORMS["boundary"]

    def two_norms(*inputs):
        x, h = function(*inputs)
        return x, uk.layer_norm_modulate(torch.tanh(h), None, None, inputs[-2], inputs[-1])

    inputs = inputs_of(names, (2, 9, 40), torch.float32)
    compiler = "inductor" if DEVICE == "cuda" else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(two_norms, fullgraph=True, dynamic=dynamic, backend=compiler)
    torch.testing.assert_close(run(backend, compiled, inputs), run(backend, two_norms, inputs))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_nothing(backend):
    function, names = FORMS["boundary"]
    inputs = inputs_of(names, (2, 9, 40), torch.bfloat16, vector_dtype=torch.float32)
    expected = run(backend, function, inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for ours, theirs in zip(run(backend, function, inputs), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_cuda_graph_replays():
    x, weight, shift, scale = inputs_of(FORMS["rms"][1], (2, 64, 96), torch.bfloat16)
    expected = uk.rms_norm_modulate(x, weight, shift, scale)
    static = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = uk.rms_norm_modulate(static, weight, shift, scale)
    static.copy_(x)
    graph.replay()
    assert torch.equal(out, expected)


def call(**changes):
    arguments = {
        "x": normal(2, 3, 8),
        "branch": normal(2, 3, 8),
        "gate": normal(2, 8),
        "closing_weight": normal(8),
        "weight": normal(8),
        "shift": normal(2, 8),
        "scale": normal(2, 8),
    }
    return lambda: uk.block_boundary(**(arguments | changes))


REFUSED = {
    "x has 2 dimensions": (ValueError, "x has shape .* must be \\[B, N, C\\]", {"x": normal(2, 8)}),
    "too wide": (ValueError, ".* C from 1 to 2048", {"x": normal(1, 1, 2049)}),
    "float64": (TypeError, "x is torch.float64", {"x": normal(2, 3, 8).double()}),
    "transposed": (ValueError, "x has strides .* call .contiguous", {"x": normal(3, 2, 8).transpose(0, 1)}),
    "branch shape": (ValueError, "branch has shape .* must agree", {"branch": normal(2, 4, 8)}),
    "branch dtype": (TypeError, "branch is torch.float16", {"branch": normal(2, 3, 8).half()}),
    "branch strides": (ValueError, "branch has strides", {"branch": normal(2, 3, 16)[..., ::2]}),
    "gate shape": (ValueError, "gate has shape .* must be \\(2, 8\\)", {"gate": normal(2, 1, 8)}),
    "shift shape": (ValueError, "shift has shape", {"shift": normal(1, 8)}),
    "scale dtype": (TypeError, "scale is torch.bfloat16", {"scale": normal(2, 8).bfloat16()}),
    "scale strides": (ValueError, "scale has strides", {"scale": normal(8, 2).T}),
    "weight shape": (ValueError, "weight has shape", {"weight": normal(7)}),
    "closing shape": (ValueError, "closing_weight has shape", {"closing_weight": normal(7)}),
    "weight device": (ValueError, "weight is on meta", {"weight": torch.ones(8, device="meta")}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    error, sentence, changes = REFUSED[case]
    with pytest.raises(error, match=f"block_boundary: {sentence}"):
        call(**changes)()


def test_backend_names():
    with pytest.raises(ValueError, match="'cuda' is no backend; choose one of auto, triton, torch"):
        uk.set_backend("cuda")
    assert uk.get_backend() == "auto"
