"""The transformer block of the Generative Encoder, split at the boundaries of its fused operators.

The paper's block k is x += gate1·Attention(norm1(x)), x += gate2·SwiGLU(norm2(x)), x = norm3(x), with norm1 and norm2
modulated. norm3 and norm1 of block k+1 read the same rows, so one operator computes both: a block here goes from its
own modulated input h to the *next* block's modulated input and owns that norm's weight.
Shapes: B batch, N tokens, C width, H heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import unite_kernels as uk
from unite_fast.model.aligned import Padding, pad
from unite_fast.model.attention import attend, attend_apart
from unite_fast.model.casts import cast_together
from unite_fast.model.linear import Linear
from unite_kernels.dispatch import aligned


class Modulation(NamedTuple):
    """adaLN terms of one block, each [B, C] (order of the published Linear)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Rotary(NamedTuple):
    """Tables [R, d/2] and how many leading tokens stay unrotated."""

    cos: Tensor
    sin: Tensor
    unrotated: int


def swiglu_hidden(width: int) -> int:
    """int(2/3 · 4C): 2048 at C = 768."""
    return int(2 / 3 * 4 * width)


def swiglu_mlp(mlp_in: nn.Linear, mlp_out: nn.Linear, x: Tensor) -> Tensor:
    """Linear, SwiGLU, Linear; on CUDA and in FP8 with the hidden width padded to an `aligned` one, and with the first
    bias added by SwiGLU."""
    on_matrix_units = x.is_cuda or type(mlp_in) is not Linear
    # ZeRO 3 gathers parameters in their linear's own forward. A CPU's products add a bias free.
    if not on_matrix_units or any(hasattr(linear.weight, "ds_id") for linear in (mlp_in, mlp_out)):
        return mlp_out(uk.swiglu(mlp_in(x)))
    hidden, bias, rows, columns = mlp_out.in_features, mlp_in.bias, None, None
    if aligned(hidden) != hidden:
        # Its result does not change: silu(0) · 0 is zero, and so are the columns that it meets.
        rows, columns = Padding(0, chunks=2), Padding(1)
        bias = pad(bias, rows, dtype=bias.dtype)
    return mlp_out(uk.swiglu(mlp_in(x, rows, add_bias=False), bias), columns)


class Block(nn.Module):
    """Attention and SwiGLU of block k, its closing norm, and the opening norm of block k+1 (or of the final layer)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        hidden = swiglu_hidden(width)
        self.qkv = Linear(width, 3 * width)
        self.q_norm = nn.Parameter(torch.ones(width // heads))
        self.k_norm = nn.Parameter(torch.ones(width // heads))
        self.attention_out = Linear(width, width)
        self.norm2 = nn.Parameter(torch.ones(width))
        self.mlp_in = Linear(width, 2 * hidden)
        self.mlp_out = Linear(hidden, width)
        # Padded weights are copied by themselves.
        mlp = (self.mlp_in, self.mlp_out) if aligned(hidden) == hidden else ()
        cast_together(self.qkv, self.attention_out, *mlp)
        self.norm3 = nn.Parameter(torch.ones(width))
        self.next_norm = nn.Parameter(torch.ones(width))

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        modulation: Modulation,
        next_shift: Tensor,
        next_scale: Tensor,
        rotary: Rotary,
        keep: slice | Tensor | None = None,
        prepend: Tensor | None = None,
        spans: uk.Spans | None = None,
        kept_spans: uk.Spans | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            x: [B, N, C] residual stream.
            h: [B, N, C] RMSNorm1(x)·(1+scale1)+shift1.
            modulation: this block's terms.
            next_shift, next_scale: [B, C] opening modulation of what follows.
            rotary: tables for the N tokens.
            keep: tokens needed after this block, a slice or indices [N'] int64; the others are dropped as soon as
                attention has used them.
            prepend: [B, M, C] context tokens to prepend after this block.
            spans: if given, x and h are [1, T, C], samples of different lengths concatenated.
            kept_spans: the spans after `keep`, which makes samples shorter.

        Returns:
            The next residual stream and its modulated norm, each [B, N', C].
        """
        batch, tokens, width = x.shape
        qkv = self.qkv(h).view(batch, tokens, 3, self.heads, width // self.heads)
        normed = (qkv, self.q_norm, self.k_norm, *rotary)
        # cpu.c's attention takes them packed, all others apart.
        if qkv.is_cuda:
            attended = attend_apart(*uk.qk_norm_rope_apart(*normed), spans)
        else:
            attended = attend(uk.qk_norm_rope(*normed), spans)
        if isinstance(keep, slice):
            x, attended = x[:, keep].contiguous(), attended[:, keep].contiguous()
        elif keep is not None:
            x, attended, spans = x.index_select(1, keep), attended.index_select(1, keep), kept_spans
        x, h = uk.gated_residual_rms_norm_modulate(
            x,
            self.attention_out(attended),
            modulation.gate1,
            self.norm2,
            modulation.shift2,
            modulation.scale2,
            spans=spans,
        )
        branch = swiglu_mlp(self.mlp_in, self.mlp_out, h)
        x, h = uk.block_boundary(
            x, branch, modulation.gate2, self.norm3, self.next_norm, next_shift, next_scale, spans=spans
        )
        if prepend is not None:
            opened = uk.rms_norm_modulate(prepend, self.next_norm, next_shift, next_scale)
            x, h = torch.cat([prepend, x], dim=1), torch.cat([opened, h], dim=1)
        return x, h
