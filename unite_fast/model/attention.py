"""Full (non-causal) attention on packed qkv, through the fastest library this device offers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_kernels import Spans, cpu

# Tokens up to which the attention of unite_kernels.cpu serves float32 on a CPU.
SHORT = cpu.MAX_TOKENS


def _flash3() -> Callable[[Tensor], Tensor]:
    # Not its qkvpacked form, which would spare a copy of the gradients: until September 2025 it returned one gradient
    # too few (flash-attention, pull request 1908), and no version number tells.
    function = importlib.import_module("flash_attn_interface").flash_attn_func

    def attend(qkv: Tensor) -> Tensor:
        out = function(*qkv.unbind(2))
        return out[0] if isinstance(out, tuple) else out  # releases before 2.8 also return the log-sum-exp

    return attend


def _flash2() -> Callable[[Tensor], Tensor]:
    return importlib.import_module("flash_attn").flash_attn_qkvpacked_func


@functools.cache
def flash_backend() -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """The FlashAttention that imports and suits the current CUDA device, as (name, function); None without one.

    FlashAttention 3 needs compute capability 9.0, FlashAttention 2 needs 8.0.
    """
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    for name, needed, load in (("FlashAttention 3", (9, 0), _flash3), ("FlashAttention 2", (8, 0), _flash2)):
        if capability >= needed and not (needed == (9, 0) and capability[0] != 9):
            try:
                return name, load()
            except (ImportError, AttributeError):
                continue
    return None


def _suits_flash(qkv: Tensor) -> bool:
    return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16)


def attend(qkv: Tensor, spans: Spans | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v over all tokens of a sample. Under torch.compile on CUDA by PyTorch's own attention alone.

    Args:
        qkv: [B, N, 3, H, d], packed queries, keys and values.
        spans: qkv is [1, T, 3, H, d], samples of different lengths behind one another.

    Returns:
        [B, N, H·d], the heads side by side.
    """
    if (qkv.shape[1] if spans is None else spans.longest) <= SHORT and cpu.serves_attention(qkv):
        return cpu.attention(qkv, *(spans or ()))
    if spans is not None:
        return _attend_spans(qkv[0], spans)[None].flatten(2)
    # The compiler cannot follow the search for a library: it would break its graph at every attention.
    flash = flash_backend() if _suits_flash(qkv) and not torch.compiler.is_compiling() else None
    if flash is not None:
        return flash[1](qkv).flatten(2)
    return _attend_padded(qkv, None)


def _attend_padded(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` of qkv [B, N, 3, H, d] to the tokens that a mask [B, N] bool calls real, all if None: [B, N, H·d]."""
    # Taken apart before they are turned, so that a backward puts the gradients together packed, in one copy.
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # each [B, H, N, d]
    keys = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=keys).transpose(1, 2).flatten(2)


def _attend_spans(qkv: Tensor, spans: Spans) -> Tensor:
    """`attend` within spans of qkv [T, 3, H, d]: [T, H, d]. Padding, where it is needed, takes no part in any sum."""
    offsets, longest = spans
    if _suits_flash(qkv):
        # Torch's own FlashAttention; torch.nn.attention.varlen is there from torch 2.10 on.
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(*qkv.unbind(1), offsets, offsets, longest, longest)
    counts = offsets.diff()
    batch, places = len(counts), torch.arange(longest, device=qkv.device)
    mask = places < counts[:, None]
    sample = torch.arange(batch, device=qkv.device).repeat_interleave(counts, output_size=len(qkv))
    rows = sample * longest + torch.arange(len(qkv), device=qkv.device) - offsets[sample]
    padded = qkv.new_zeros(batch * longest, *qkv.shape[1:]).index_copy(0, rows, qkv)
    attended = _attend_padded(padded.unflatten(0, (batch, longest)), mask)
    return attended.flatten(0, 1).index_select(0, rows).unflatten(1, qkv.shape[2:])
