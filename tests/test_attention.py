"""Attention against its equation in float64, below and above the length that decides who computes it on a CPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_testing import DEVICE, normal, outputs_and_gradients

from unite_fast.model import attention
from unite_fast.model.attention import SHORT, attend


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
