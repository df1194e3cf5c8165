"""Products in FP8: both copies of a tensor against PyTorch's casts, products against those of the numbers they keep."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import DEVICE, DTYPES, normal, on_backend, outputs_and_gradients
from torch.library import opcheck

import unite_kernels as uk
from unite_kernels import dispatch, fp8
from unite_kernels.fp8 import LARGEST, LEAST, _fp8_quantize

FORMATS = list(LARGEST)
STEP = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}  # half of what lies between a number and the next
BACKENDS = ["torch", "triton"]
# One number, fewer rows than a tile and than a multiple of 16, several tiles with a remainder each way.
SHAPES = [(1, 1), (7, 16), (33, 80), (130, 96), (257, 70)]

needs_fp8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < fp8.MIN_CAPABILITY, reason="the GPU has no FP8"
)
pytestmark = needs_fp8


def quantized(backend, x, dtype):
    with on_backend(backend):
        return uk.fp8_quantize(x, dtype)


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_copies_keep_the_numbers(backend, to, dtype, shape):
    x = normal(*shape, dtype=dtype)
    rows, columns, scale = quantized(backend, x, to)
    assert rows.shape == shape and rows.dtype == columns.dtype == to and scale.dtype == torch.float32
    assert columns.shape == (shape[1], -(-shape[0] // 16) * 16)
    largest = x.float().abs().max()
    torch.testing.assert_close(scale, largest / LARGEST[to])
    assert rows.float().abs().max() == LARGEST[to]
    # Half a step, or half of the smallest number there is.
    error, smallest = (rows.float() * scale - x.float()).abs(), {448.0: 2**-9, 57344.0: 2**-16}[LARGEST[to]]
    assert (error <= STEP[to] * x.float().abs() * 1.0001 + smallest * scale).all()
    assert torch.equal(bits(columns)[:, : shape[0]], bits(rows).t())
    assert not bits(columns)[:, shape[0] :].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 16)])
def test_sums_over_rows_are_those_of_the_numbers_that_are_given(backend, dtype, shape):
    """Before they are rounded; not asked for they are not made, and change nothing else."""
    x = normal(*shape, dtype=dtype)
    with on_backend(backend):
        *found, sums = fp8._quantize(x, torch.float8_e5m2, summed=True)
        *plain, none = fp8._quantize(x, torch.float8_e5m2, summed=False)
    assert none is None and all(torch.equal(bits(a), bits(b)) for a, b in zip(found[:2], plain[:2], strict=True))
    assert sums.shape == shape[1:] and sums.dtype == torch.float32
    # Sums in float32: 1e-6 of what they add up.
    assert (sums.double() - x.double().sum(0)).abs().sum() <= 1e-6 * x.double().abs().sum()


@pytest.mark.parametrize(("shape", "steps"), [((1200, 70), 16), ((257, 70), 8), ((130, 96), 4)])
def test_a_program_of_several_tiles_gives_the_same(monkeypatch, shape, steps):
    """Also where its last tiles lie behind the matrix."""
    x = normal(*shape, dtype=torch.bfloat16)
    with on_backend("triton"):
        *one, sums = fp8._quantize(x, torch.float8_e5m2, summed=True)
        monkeypatch.setattr(dispatch, "PROGRAMS", 1)
        assert fp8.cast_steps(*shape) == steps
        *several, again = fp8._quantize(x, torch.float8_e5m2, summed=True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one[:2], several[:2], strict=True))
    for found in (sums, again):
        assert (found.double() - x.double().sum(0)).abs().sum() <= 1e-6 * x.double().abs().sum()


def test_tiles_of_a_program_leave_a_thousand_programs():
    assert [fp8.cast_steps(64 * 544, columns) for columns in (768, 1024, 2304, 4096)] == [4, 8, 16, 16]
    assert fp8.cast_steps(2304, 768) == fp8.cast_steps(1, 1) == 1


def test_a_gradient_is_read_twice_for_all_that_it_gives(monkeypatch):
    """Nothing sums a gradient that has the size of the result."""
    right, summed = torch.Tensor.sum, []
    monkeypatch.setattr(torch.Tensor, "sum", lambda x, *given, **how: summed.append(x.shape) or right(x, *given, **how))
    with on_backend("triton"):
        outputs_and_gradients(uk.fp8_linear, [normal(300, 32), normal(48, 32, seed=1), normal(48, seed=2)])
    assert (5, 48) in summed and (300, 48) not in summed


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_tiny_and_empty(backend):
    for x in (torch.zeros(3, 16, device=DEVICE), normal(3, 16) * 1e-38, torch.zeros(0, 16, device=DEVICE)):
        rows, columns, scale = quantized(backend, x, torch.float8_e5m2)
        assert rows.shape == x.shape and scale.item() == pytest.approx(LEAST / 57344, rel=1e-5)
        assert rows.float().abs().sum() < 1 and columns.shape == (16, 0 if not len(x) else 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(backend, value):
    x = normal(40, 48)
    x[31, 17] = value
    rows, columns, scale = quantized(backend, x, torch.float8_e4m3fn)
    assert (rows.float() * scale).isnan().all() and (columns.float() * scale)[:, :40].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_kept_numbers(backend, dtype):
    """Forward with x and W as E4M3 keeps them, gradients with that of the output as E5M2 does; rows that 16 does not
    divide."""
    x, weight, bias = normal(3, 7, 48, dtype=dtype), normal(32, 48, seed=1), normal(32, seed=2)
    with on_backend(backend):
        out, grad_x, grad_weight, grad_bias = outputs_and_gradients(uk.fp8_linear, [x, weight, bias])
        bare, *gradients = outputs_and_gradients(uk.fp8_linear, [x, weight, None])
    assert out.dtype == grad_x.dtype == dtype and grad_weight.dtype == grad_bias.dtype == torch.float32
    assert torch.equal(gradients[0], grad_x) and torch.equal(gradients[1], grad_weight)

    def kept(tensor, to):
        rows, _, scale = quantized("torch", tensor.reshape(-1, tensor.shape[-1]), to)
        return rows.double() * scale.double()

    grad = normal(3, 7, 32, seed=99).to(dtype)
    torch.testing.assert_close(grad_bias, grad.float().sum((0, 1)))
    grad = kept(grad, torch.float8_e5m2)
    x, weight = kept(x, torch.float8_e4m3fn), kept(weight, torch.float8_e4m3fn)
    band = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    product = x @ weight.t()
    for found, true in (
        (bare, product), (out, product + bias.double()), (grad_x, grad @ weight), (grad_weight, grad.t() @ x)
    ):  # fmt: skip
        error = (found.double().reshape(true.shape) - true).norm() / true.norm()
        # A GPU keeps the sums of forward products in fewer bits than float32 has.
        assert error < band[found.dtype] + (2e-3 if DEVICE == "cuda" else 0)


def test_only_wanted_gradients_are_made(monkeypatch):
    x, weight = normal(16, 32), normal(48, 32, seed=1)
    made = []
    product = fp8._product

    def watched(*given, **named):
        found = product(*given, **named)
        made.append(tuple(found.shape))
        return found

    monkeypatch.setattr(fp8, "_product", watched)
    for wanted, shape in ((x, (16, 32)), (weight, (48, 32))):
        made.clear()
        leaf = wanted.requires_grad_()
        uk.fp8_linear(x, weight).sum().backward()
        assert made == [(16, 48), shape] and leaf.grad.shape == shape
        leaf.requires_grad_(False)


def test_what_is_kept_is_eight_bits():
    x, weight = normal(64, 32).requires_grad_(), normal(48, 32, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        uk.fp8_linear(x, weight)
    assert sum(t.numel() * t.element_size() for t in kept) == 64 * 32 + 48 * 32 + 2 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_quantized_once_serves_every_call(backend):
    """Its own numbers are not read: here they are none."""
    x, weight, bias = normal(5, 32), normal(48, 32, seed=1), normal(48, seed=2)
    with on_backend(backend):
        quantized = uk.fp8_quantize(weight, torch.float8_e4m3fn)
        given = [x, torch.full_like(weight, float("nan")), bias]
        expected = outputs_and_gradients(uk.fp8_linear, [x, weight, bias])
        shared = torch.compile(lambda *tensors: uk.fp8_linear(*tensors, quantized), fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        for call in (lambda *tensors: uk.fp8_linear(*tensors, quantized), shared):
            for ours, theirs in zip(outputs_and_gradients(call, given), expected, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    """One of the rounded operands alone would pass for it."""
    x, weight = normal(5, 32).requires_grad_(), normal(16, 32, seed=1).requires_grad_()
    with on_backend(backend):
        (grad,) = torch.autograd.grad(uk.fp8_linear(x, weight).square().sum(), x, create_graph=True)
        for given in (x, weight):
            with pytest.raises(RuntimeError, match="fp8_linear: its backward pass has no derivative; take F.linear"):
                torch.autograd.grad(grad.sum(), given, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_and_under_autocast_it_is_the_same(backend):
    x, weight = normal(5, 32), normal(16, 32, seed=1)
    with on_backend(backend):
        eager = outputs_and_gradients(uk.fp8_linear, [x, weight])
        compiled = torch.compile(uk.fp8_linear, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        for ours, theirs in zip(outputs_and_gradients(compiled, [x, weight]), eager, strict=True):
            torch.testing.assert_close(ours, theirs)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(uk.fp8_linear(x, weight), eager[0])


def test_opcheck():
    with on_backend("triton"):
        for wide, summed in ((False, False), (True, False), (True, True)):
            opcheck(_fp8_quantize.registered, (normal(33, 48, dtype=torch.bfloat16), wide, summed))


def test_refusals():
    x, weight = torch.zeros(4, 32), torch.zeros(16, 32)
    for arguments, error, words in (
        ((x.double(), weight), TypeError, "x is torch.float64"),
        ((x, None), TypeError, "weight is None"),
        ((x[:, :16], weight), ValueError, r"x has shape \(4, 16\) and weight \(16, 32\)"),
        ((x, torch.zeros(24, 32)), ValueError, "multiples of 16"),
        ((torch.zeros(4, 24), torch.zeros(16, 24)), ValueError, "multiples of 16"),
        ((x, weight, torch.zeros(32)), ValueError, r"bias has shape \(32,\); it must be \(16,\)"),
        ((x, weight.to("meta")), ValueError, "weight is on meta"),
    ):
        with pytest.raises(error, match=words):
            uk.fp8_linear(*arguments)
    for arguments, error, words in (
        ((x[0], torch.float8_e5m2), ValueError, r"it must be \[R, C\]"),
        ((x.t(), torch.float8_e5m2), ValueError, "must be contiguous"),
        ((x, torch.float16), TypeError, "dtype is torch.float16; it must be torch.float8_e4m3fn"),
    ):
        with pytest.raises(error, match=words):
            uk.fp8_quantize(*arguments)


def test_refusals_of_what_is_quantized():
    x, weight = torch.zeros(4, 32), torch.zeros(16, 32)
    right = uk.fp8_quantize(weight, torch.float8_e4m3fn)
    for quantized, error, words in (
        (tuple(right), TypeError, "quantized is a tuple; it must be what fp8_quantize returns"),
        (uk.fp8_quantize(weight, torch.float8_e5m2), TypeError, "quantized is torch.float8_e5m2; a weight must be"),
        (uk.fp8_quantize(x, torch.float8_e4m3fn), ValueError, r"quantized has rows \(4, 32\) .*weight, \(16, 32\)"),
        (uk.Quantized(*(part.to("meta") for part in right)), ValueError, "quantized is on meta and weight on cpu"),
    ):
        with pytest.raises(error, match=words):
            uk.fp8_linear(x, weight, None, quantized)


def test_a_gpu_without_it_is_refused(monkeypatch):
    class Other:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.9 or newer; cuda:0 has 8\.0"):
        fp8._require_fp8(Other())
