"""Full (non-causal) attention on packed qkv, through the fastest library this device offers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _flash3() -> Callable[[Tensor], Tensor]:
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


def attend(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over all tokens.

    Args:
        qkv: [B, N, 3, H, d], packed queries, keys and values.

    Returns:
        [B, N, H·d], the heads side by side.
    """
    flash = flash_backend() if qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) else None
    if flash is not None:
        return flash[1](qkv).flatten(2)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
