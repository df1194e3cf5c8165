"""Full (non-causal) attention on packed qkv, through the fastest library this device offers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_kernels import Spans, cpu

# Tokens up to which the attention of unite_kernels.cpu serves float32 on a CPU.
SHORT = cpu.MAX_TOKENS


# cuDNN from which PyTorch prefers its attention to FlashAttention 2 on Hopper and Blackwell (aten's sdp_utils.cpp,
# torch 2.10 on; its wheels bring such a cuDNN from 2.11 on).
CUDNN_PREFERRED = 91501


class Flash(NamedTuple):
    """An installed FlashAttention.

    Attributes:
        name: with its generation.
        apart: of queries, keys and values [B, N, H, d] each, to [B, N, H, d].
        packed: of qkv [B, N, 3, H, d], to the same.
    """

    name: str
    apart: Callable[[Tensor, Tensor, Tensor], Tensor]
    packed: Callable[[Tensor], Tensor]


def _flash3() -> Flash:
    function = importlib.import_module("flash_attn_interface").flash_attn_func

    def apart(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = function(query, key, value)
        return out[0] if isinstance(out, tuple) else out  # releases before 2.8 also return the log-sum-exp

    # Not its qkvpacked form, which would spare a copy of the gradients: until September 2025 it returned one gradient
    # too few (flash-attention, pull request 1908), and no version number tells.
    return Flash("FlashAttention 3", apart, lambda qkv: apart(*qkv.unbind(2)))


def _flash2() -> Flash:
    module = importlib.import_module("flash_attn")
    return Flash("FlashAttention 2", module.flash_attn_func, module.flash_attn_qkvpacked_func)


@functools.cache
def flash_backend() -> Flash | None:
    """The installed FlashAttention that is best on the current CUDA device; None where PyTorch's attention is better.

    FlashAttention 3 needs compute capability 9.0, FlashAttention 2 needs 8.0. On Hopper version 3 is 1.5 to 2 times as
    fast as version 2, and cuDNN, which PyTorch uses there, comes near it (arXiv 2407.08608, figures 5 and 6), so
    version 2 is not used then.
    """
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    cudnn = capability[0] in (9, 10) and (torch.backends.cudnn.version() or 0) >= CUDNN_PREFERRED
    for serves, load in ((capability[0] == 9, _flash3), (capability >= (8, 0) and not cudnn, _flash2)):
        if serves:
            try:
                return load()
            except (ImportError, AttributeError):
                continue
    return None


def attend(qkv: Tensor, spans: Spans | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v over all tokens of a sample. Under torch.compile on CUDA always PyTorch's own attention.

    Args:
        qkv: [B, N, 3, H, d], packed queries, keys and values.
        spans: if given, qkv is [1, T, 3, H, d], samples of different lengths concatenated.

    Returns:
        [B, N, H·d], the heads side by side.
    """
    if (qkv.shape[1] if spans is None else spans.longest) <= SHORT and cpu.serves_attention(qkv):
        return cpu.attention(qkv, *(spans or ()))
    if spans is not None:
        return attend_apart(*qkv.unbind(2), spans)
    flash = _flash_for(qkv)
    if flash is not None:
        return flash.packed(qkv).flatten(2)
    # Unbound before they are turned: their gradients then join in the order of memory, without a further copy.
    return _attend_padded(*qkv.unbind(2), None)


def attend_apart(query: Tensor, key: Tensor, value: Tensor, spans: Spans | None = None) -> Tensor:
    """`attend` of separate queries, keys and values [B, N, H, d], whose gradients then stay separate as well."""
    if spans is not None:
        # Without their first dimension by a view, whose gradient is one: indexing's is copied into zeros.
        return _attend_spans(query.squeeze(0), key.squeeze(0), value.squeeze(0), spans)[None].flatten(2)
    flash = _flash_for(query)
    if flash is not None:
        return flash.apart(query, key, value).flatten(2)
    return _attend_padded(query, key, value, None)


def _suits_flash(x: Tensor) -> bool:
    """Whether every FlashAttention supports heads of this width and dtype: PyTorch's own packed form and version 3
    refuse widths that are not a multiple of 8, which `scaled_dot_product_attention` pads."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256


def _flash_for(x: Tensor) -> Flash | None:
    # The compiler cannot follow the search for a library: it would break its graph at every attention.
    return flash_backend() if _suits_flash(x) and not torch.compiler.is_compiling() else None


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N, H, d] each, to the same tokens that a mask [B, N] bool calls real, all if None: [B, N, H·d]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # each [B, H, N, d]
    keys = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=keys).transpose(1, 2).flatten(2)


def _attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """`attend` within spans of q, k and v [T, H, d] each: [T, H, d]. Padding, where it is needed, takes no part in any
    sum."""
    offsets, longest = spans
    if _suits_flash(query):
        # What torch.nn.attention.varlen calls through an operator in Python, with zeros for the state of a random
        # generator that serves no dropout: past it a call saves two launches, and the host 62 µs of 70 and 42 of 75
        # backward (one core of a busy EPYC 9005, PyTorch 2.11, a driver that launches nothing).
        attend = torch.ops.aten._flash_attention_forward.default
        return attend(query, key, value, offsets, offsets, longest, longest, 0.0, False, False)[0]
    counts = offsets.diff()
    batch, places = len(counts), torch.arange(longest, device=query.device)
    mask = places < counts[:, None]
    sample = torch.arange(batch, device=query.device).repeat_interleave(counts, output_size=len(query))
    rows = sample * longest + torch.arange(len(query), device=query.device) - offsets[sample]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, rows, x)
        return padded.unflatten(0, (batch, longest))

    attended = _attend_padded(pad(query), pad(key), pad(value), mask)
    return attended.flatten(0, 1).index_select(0, rows).unflatten(1, query.shape[1:])
