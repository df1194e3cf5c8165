"""Attention against its equation in float64, below and above the length that decides who computes it on a CPU."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import DEVICE, normal, outputs_and_gradients

import unite_kernels as uk
from unite_fast.model import attention
from unite_fast.model.attention import SHORT, attend, attend_apart


def equation(qkv):
    """softmax(q kᵀ / √d) v, sample by sample and head by head."""
    query, key, value = qkv.unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / qkv.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (3, 8, 2, 6), (2, 28, 4, 32), (2, SHORT, 1, 8), (2, SHORT + 1, 1, 8), (0, 5, 2, 4)]
)
def test_against_the_equation(shape):
    batch, tokens, heads, width = shape
    qkv = 2 * normal(batch, tokens, 3, heads, width)
    truth = outputs_and_gradients(equation, [qkv], lambda x: torch.float64)
    # float32 rounds 1e-7 of sums of up to 65 terms of size 10: 1e-5 leaves a factor of ten.
    for ours, theirs in zip(outputs_and_gradients(attend, [qkv]), truth, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


def test_strides_of_either_order_give_the_same():
    qkv = normal(3, 7, 3, 2, 4)
    heads_first = qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    for ours, theirs in zip(outputs_and_gradients(attend, [heads_first]), outputs_and_gradients(attend, [qkv])):
        assert torch.equal(ours, theirs)


def test_gradients_come_packed():
    """What reads them wants them so, and another order would cost a copy of all three."""
    for dtype, tokens in ((torch.float32, SHORT + 1), (torch.bfloat16, 8)):
        qkv = normal(2, tokens, 3, 2, 8).to(dtype).requires_grad_()
        given = 1 * qkv  # an accumulated gradient would take the strides of its leaf
        given.retain_grad()
        attend(given).sum().backward()
        assert given.grad.is_contiguous()


@pytest.mark.skipif(DEVICE == "cuda", reason="float32 on a CPU")
def test_compiled():
    qkv = normal(2, 7, 3, 2, 4)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs_and_gradients(compiled, [qkv]), outputs_and_gradients(attend, [qkv]))


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends to be one")
def test_a_compiled_attention_searches_for_no_library(monkeypatch):
    """On a GPU the search, which imports what may be there, would break the graph of every block."""
    monkeypatch.setattr(attention, "_suits_flash", lambda qkv: True)
    monkeypatch.setattr(attention, "flash_backend", lambda: importlib.import_module("no_such_library"))
    qkv = normal(2, SHORT + 1, 3, 2, 8)
    torch.compile(attend, fullgraph=True, backend="eager")(qkv)


@pytest.mark.parametrize(
    "capability, cudnn, installed, served",
    [
        ((8, 0), 91900, (2, 3), "FlashAttention 2"),
        ((8, 9), 91900, (3,), None),
        ((9, 0), 91900, (2, 3), "FlashAttention 3"),
        ((9, 0), 91900, (2,), None),  # PyTorch's own, through cuDNN
        ((9, 0), 91002, (2,), "FlashAttention 2"),
        ((9, 0), None, (2,), "FlashAttention 2"),
        ((10, 0), 91900, (2, 3), None),
        ((12, 0), 91900, (2, 3), "FlashAttention 2"),
        ((7, 5), 91900, (2, 3), None),
        ((9, 0), 91002, (), None),
    ],
)
def test_the_fastest_library_that_is_there(monkeypatch, capability, cudnn, installed, served):
    libraries = {2: "flash_attn", 3: "flash_attn_interface"}
    for version, name in libraries.items():
        functions = SimpleNamespace(flash_attn_func=None, flash_attn_qkvpacked_func=None)
        monkeypatch.setitem(sys.modules, name, functions if version in installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    found = attention.flash_backend.__wrapped__()
    assert (found and found.name) == served


@pytest.mark.parametrize("width, suits", [(8, True), (12, False), (72, True), (256, True), (264, False)])
def test_heads_that_flash_attention_refuses_go_elsewhere(width, suits):
    heads = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 2, width))
    assert attention._suits_flash(heads) == suits


def test_flash_attention_apart_and_packed_are_one(monkeypatch):
    """Of the third's function, which older releases let return a tuple."""
    given = []
    for wrap in (lambda out: out, lambda out: (out, None)):
        module = SimpleNamespace(flash_attn_func=lambda q, k, v: given.append((q, k, v)) or wrap(q + k + v))
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
        flash, qkv = attention._flash3(), normal(2, 5, 3, 2, 4)
        assert torch.equal(flash.packed(qkv), flash.apart(*qkv.unbind(2))) and flash.packed(qkv).shape == (2, 5, 2, 4)
    assert all(x.shape == (2, 5, 2, 4) for call in given for x in call)


@pytest.mark.parametrize("spans", [None, "spans"])
def test_apart_is_the_same(spans):
    batch, tokens = (2, SHORT + 1) if spans is None else (1, 80)
    qkv = normal(batch, tokens, 3, 2, 8)
    if spans:
        offsets = torch.tensor([0, SHORT + 2, 80], dtype=torch.int32, device=DEVICE)
        spans = uk.Spans(offsets, SHORT + 2)
    packed = outputs_and_gradients(lambda x: attend(x, spans), [qkv])
    apart = outputs_and_gradients(lambda x: attend_apart(*x.unbind(2), spans), [qkv])
    torch.testing.assert_close(apart, packed)
