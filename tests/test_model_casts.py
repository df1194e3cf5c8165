"""Linears that autograd hands the sum of their weights' gradients: what is rounded, what is copied, and when."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import unite_kernels as uk
from unite_fast.model import casts as subject
from unite_fast.model.aligned import Padding, pad
from unite_fast.model.casts import cast_together, current_casts, one_micro_batch
from unite_fast.model.linear import Linear

BF16 = torch.bfloat16


def layer(inputs: int = 12, outputs: int = 20, **options) -> Linear:
    torch.manual_seed(0)
    return Linear(inputs, outputs, **options)


def autocast():
    return torch.autocast("cpu", dtype=BF16)


class Operators(TorchDispatchMode):
    """Their names."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def current_copies() -> list[torch.Tensor]:
    return list(subject._casts._copies.values())


def passes(made: Linear, inputs: list[torch.Tensor], factors: list[torch.Tensor]) -> None:
    """A forward and a backward for each."""
    for x, factor in zip(inputs, factors, strict=True):
        with autocast():
            found = made(x)
        assert found.dtype == BF16
        found.backward(factor)


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (12,), (0, 12)])
def test_gradients_are_float32_sums_of_products_of_16_bits(shape):
    made = layer()
    inputs = [torch.randn(shape) for _ in range(3)]
    factors = [torch.randn(*shape[:-1], 20).to(BF16) for _ in inputs]
    with one_micro_batch("cpu"):
        passes(made, inputs, factors)
    pairs = [(x.to(BF16).float().reshape(-1, 12), g.float().reshape(-1, 20)) for x, g in zip(inputs, factors)]
    expected = sum(g.t() @ x for x, g in pairs)
    torch.testing.assert_close(made.weight.grad, expected, rtol=1e-6, atol=1e-6)  # bfloat16 would miss by 4e-3
    torch.testing.assert_close(made.bias.grad, sum(g.sum(0) for _, g in pairs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_result_and_the_gradient_of_x_are_those_of_autocast(dtype):
    """That gradient keeps float32 where x has it."""
    made, x, factor = layer(), torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 5, 20).to(BF16)
    found = []
    for context in (one_micro_batch("cpu"), torch.enable_grad()):
        leaf = x.clone().requires_grad_()
        with context:
            with autocast():
                y = made(leaf)
            y.backward(factor)
        found.append((y, leaf.grad))
    (ours, gradient), (theirs, other) = found
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and gradient.dtype == other.dtype == dtype
    assert torch.equal(gradient.to(BF16), other.to(BF16))
    if dtype == torch.float32:
        exact = factor.float() @ made.weight.detach().to(BF16).float()
        torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-6)


def test_gradients_accumulate_in_place_without_a_copy():
    made, x, factor = layer(), torch.randn(7, 12), torch.randn(7, 20).to(BF16)
    with one_micro_batch("cpu"):
        passes(made, [x], [factor])
        place = made.weight.grad.data_ptr()
        with autocast():
            found = made(x)
        with Operators() as watched:
            found.backward(factor)
    assert made.weight.grad.data_ptr() == place
    assert watched.found.count("addmm_") == 1 and watched.found.count("add_") == 1  # the bias's
    assert "clone" not in watched.found and "mm" not in watched.found


def test_hooks_run_once_a_backward_and_see_the_sum():
    made, seen, given = layer(), [], []
    made.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    made.weight.register_hook(lambda gradient: given.append(gradient.clone()))
    x, factor = torch.randn(7, 12), torch.ones(7, 20, dtype=BF16)
    with one_micro_batch("cpu"):
        passes(made, [x] * 3, [factor] * 3)
    assert len(seen) == 3 and torch.allclose(seen[2], 3 * seen[0], rtol=1e-5)
    assert len(given) == 3 and all(map(torch.equal, given, seen))


def test_a_weight_that_one_backward_reads_twice():
    made, inputs = layer(), [torch.randn(7, 12) for _ in range(2)]
    with one_micro_batch("cpu"):
        for _ in range(2):
            with autocast():
                found = made(inputs[0]).float().sum() + made(inputs[1]).float().sum()
            found.backward()
    column = 2 * sum(x.to(BF16).float().sum(0) for x in inputs)
    torch.testing.assert_close(made.weight.grad, column.expand(20, 12), rtol=1e-5, atol=1e-5)


def test_gradients_from_elsewhere_join_the_sum():
    """A micro-batch behind another, and one in float32 between them."""
    made, x, factor = layer(), torch.randn(7, 12), torch.randn(7, 20).to(BF16)
    with one_micro_batch("cpu"):
        passes(made, [x], [factor])
    single = made.weight.grad.clone()
    made(x).backward(factor.float())
    with one_micro_batch("cpu"):
        passes(made, [x], [factor])
    torch.testing.assert_close(made.weight.grad, 3 * single, rtol=0.02, atol=0.02)  # x in float32 is another


def test_a_weight_that_changes_between_micro_batches_is_cast_again():
    made, x = layer(), torch.randn(7, 12)
    for _ in range(2):
        with one_micro_batch("cpu"), autocast():
            assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
        made.weight.data += 1


def test_copies_go_with_the_micro_batch_and_its_graph():
    """At once, with nothing left for the garbage collector; a graph that stays holds its own alone."""
    made, other, x = layer(), layer(), torch.randn(7, 12)
    gc.collect()
    gc.disable()
    try:
        with one_micro_batch("cpu"):
            with autocast():
                found, last = made(x), other(x)
            copies = [weakref.ref(copied) for copied in current_copies()]
            assert len(copies) == 4
            (found.sum() + last.sum()).backward()
            assert all(copied() is not None for copied in copies)  # for the passes to come
            del last
        assert [copied() is not None for copied in copies] == [True, True, False, False]  # `found` holds its graph
        del found
        assert all(copied() is None for copied in copies)
    finally:
        gc.enable()


def test_linears_are_cast_together_in_one_launch():
    first, second, third = (layer() for _ in range(3))
    cast_together(first, second)
    x = torch.randn(7, 12)
    with one_micro_batch("cpu"), autocast():
        with Operators() as watched:
            for made in (first, second, third, third):
                assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    assert watched.found.count("_foreach_copy_") == 2
    copied = copy.deepcopy(torch.nn.ModuleList([first, second]))
    assert copied[0].cast_with == tuple(copied)


def test_a_product_without_its_bias():
    """As SwiGLU's, which adds the first one itself: beside the Linear's own."""
    made, x = layer(), torch.randn(7, 12)
    with one_micro_batch("cpu"):
        with autocast():
            found = current_casts().linear(x, made, add_bias=False)
            assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
            assert torch.equal(found, F.linear(x, made.weight))
        found.sum().backward()
    assert made.bias.grad is None and made.weight.grad is not None


def test_what_takes_no_gradient_has_no_product_for_it():
    made = layer().requires_grad_(False)
    x = torch.randn(7, 12, requires_grad=True)
    with one_micro_batch("cpu"), autocast():
        made(x).sum().backward()
        assert made.weight.grad is None and made.bias.grad is None and x.grad is not None
        made.requires_grad_(True)
        found = made(x.detach())
        with Operators() as watched:
            found.sum().backward()
    assert watched.found.count("mm") == 1  # the weight's; x takes none


def test_behind_the_micro_batch_a_gradient_is_no_sum():
    """autograd.grad then leaves `grad` alone, and a backward adds as ever."""
    made, x = layer(bias=False), torch.randn(7, 12)
    with one_micro_batch("cpu"):
        with autocast():
            found = made(x)
        found.backward(torch.ones_like(found), retain_graph=True)
    held = made.weight.grad.clone()
    (asked,) = torch.autograd.grad(found, made.weight, torch.ones_like(found), retain_graph=True)
    assert torch.equal(asked, held) and torch.equal(made.weight.grad, held)
    found.backward(torch.ones_like(found))
    assert torch.equal(made.weight.grad, 2 * held)


def test_pytorchs_linear_serves_elsewhere():
    x = torch.randn(7, 12)

    def served(made: Linear) -> bool:
        with torch.no_grad():
            casts, expected = current_casts(), F.linear(x.to(made.weight.dtype), made.weight, made.bias)
            assert torch.allclose(made(x.to(made.weight.dtype)), expected, atol=1e-6)
        return casts is not None and casts.linear(x, made) is not None

    gathered, computed = layer(), layer()
    gathered.weight.ds_id = 1  # as under ZeRO 3
    weight = computed.weight
    del computed.weight
    computed.weight = weight * 1
    with one_micro_batch("cpu"):
        with autocast():
            assert served(layer())
            assert not served(gathered) and not served(computed) and not served(layer().double())
            compiled = torch.compile(lambda: current_casts() is None, backend="eager", fullgraph=True)
            assert compiled()
        assert not served(layer())
    with autocast():
        assert not served(layer())


def test_pytorchs_linear_serves_where_no_library_adds_such_products(monkeypatch):
    found = []
    for works in (True, False):
        monkeypatch.setattr(subject, "adds_products", lambda device, works=works: works)
        made, x = layer(), torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
        with one_micro_batch("cpu"):
            with Operators() as watched:
                passes(made, [x] * 2, [torch.ones(7, 20, dtype=BF16)] * 2)
        assert ("addmm_" in watched.found) is works
        found.append(made.weight.grad)
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("error", [None, RuntimeError, torch.OutOfMemoryError])
def test_a_device_is_tried_once(monkeypatch, error):
    tried, zeros, add = [], torch.zeros, subject.add_product

    def product(total, left, right):
        tried.append(left.dtype)
        if error:
            raise error("refused")
        return add(total, left, right)

    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kind: zeros(*shape, **kind))
    monkeypatch.setattr(subject, "add_product", product)
    subject.adds_products.cache_clear()
    try:
        if error is torch.OutOfMemoryError:
            with pytest.raises(error):
                subject.adds_products(torch.device("cuda", 0))
        else:
            assert [subject.adds_products(torch.device("cuda", 0)) for _ in range(2)] == [error is None] * 2
    finally:
        subject.adds_products.cache_clear()
    assert tried == [BF16] and subject.adds_products(torch.device("cpu"))


def test_micro_batches_within_one_another_and_behind_errors():
    with one_micro_batch("cpu"), autocast():
        outer = current_casts()
        with pytest.raises(ValueError), one_micro_batch("cpu"):
            assert subject._casts is not outer
            raise ValueError
        assert subject._casts is outer and outer.open
    assert subject._casts is None and not outer.open


@pytest.mark.parametrize(("shape", "padding"), [((2 * 85, 32), Padding(0, chunks=2)), ((32, 85), Padding(1))])
def test_a_padded_weight(shape, padding):
    """Its product, and the sum of its gradients without the padding."""
    made = layer(*reversed(shape))
    weight = made.weight
    outputs, inputs = (192, 32) if padding.dim == 0 else (32, 96)
    places = torch.cat([torch.arange(85), 96 + torch.arange(85)][: padding.chunks])
    factors = [torch.randn(7, outputs).to(BF16) for _ in range(3)]
    inputs = [torch.randn(7, inputs).to(BF16) for _ in range(3)]
    addresses = set()
    with one_micro_batch("cpu"):
        for x, factor in zip(inputs, factors):
            with autocast():
                found = current_casts().linear(x, made, padding, add_bias=False)
            assert found.shape == (7, outputs)
            whole = torch.zeros(outputs, x.shape[1]).index_copy(padding.dim, places, weight.detach())
            torch.testing.assert_close(found.float(), x.float() @ whole.to(BF16).float().t(), rtol=1e-2, atol=1e-2)
            found.backward(factor)
            addresses.add(weight.grad.data_ptr())
    assert weight.grad.shape == shape and weight.grad.is_contiguous() and len(addresses) == 1
    expected = sum(f.float().t() @ x.float() for f, x in zip(factors, inputs)).index_select(padding.dim, places)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [None, Padding(1)])
def test_a_weight_in_eight_bits_is_made_once_a_micro_batch(padding):
    """With autocast or without, as its products take it."""
    weight = torch.nn.Parameter(torch.randn(32, 80 if padding is None else 85))
    found = []
    for dtype in (torch.float32, BF16):
        with one_micro_batch("cpu"):
            with torch.autocast("cpu", BF16, enabled=dtype is BF16):
                found.append(current_casts().fp8_weight(weight, padding))
            assert current_casts().fp8_weight(weight, padding) is found[-1]
        whole = weight if padding is None else pad(weight, padding, dtype=dtype)
        expected = uk.fp8_quantize(whole.detach(), torch.float8_e4m3fn)
        for ours, theirs in zip(found[-1], expected, strict=True):
            assert torch.equal(ours.float(), theirs.float()) and not ours.requires_grad
        weight.data *= 2
    assert found[1].scale != found[0].scale
    kept = [weakref.ref(part) for part in found[1]]
    del found, ours
    gc.collect()
    assert all(part() is None for part in kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="such products are CUDA's")
@pytest.mark.parametrize(
    ("outputs", "inputs", "rows"), [(2304, 768, 4096), (2730, 1024, 520), (5, 384, 77), (16, 16, 0)]
)
def test_products_of_16_bits_that_cublas_gives_in_float32(outputs, inputs, rows):
    torch.manual_seed(0)
    left, right = (torch.randn(rows, n, device="cuda").to(BF16) for n in (outputs, inputs))
    total = torch.randn(outputs, inputs, device="cuda")
    exact = left.double().t() @ right.double()
    found = subject.add_product(total.clone(), left.t(), right)
    for ours, expected in ((subject.product(left.t(), right), exact), (found, total.double() + exact)):
        # Sums in float32: 1e-5 of their size; in bfloat16 it would be 2e-3.
        assert (ours.double() - expected).norm() <= 1e-5 * expected.norm() and ours.dtype == torch.float32
