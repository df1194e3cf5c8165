"""The pixel decoder: a pre-norm vision transformer from latents to patches of pixels.

Shapes: B batch, K registers, D latent channels, P patches, Cd width, p patch side.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import ModelConfig
from unite_fast.model.attention import attend
from unite_fast.model.casts import cast_together
from unite_fast.model.conditioning import sincos_1d, sincos_2d
from unite_fast.model.linear import Linear

LAYER_NORM_EPS = 1e-12


class ResidualLayerNorm(nn.LayerNorm):
    """(x + branch, its LayerNorm) in one operator; without a branch of x alone."""

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        if branch is None:
            return x, uk.layer_norm(x, self.weight, self.bias, eps=self.eps)
        return uk.residual_layer_norm(x, branch, self.weight, self.bias, eps=self.eps)


class DecoderBlock(nn.Module):
    """x += Attention(LayerNorm(x)); x += MLP(LayerNorm(x)), exact GELU, width 4Cd.

    The last sum is left to the norm that follows, as one operator does both.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = ResidualLayerNorm(width, eps=LAYER_NORM_EPS)
        self.qkv = Linear(width, 3 * width)
        self.attention_out = Linear(width, width)
        self.norm2 = ResidualLayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp_in = Linear(width, 4 * width)
        self.mlp_out = Linear(4 * width, width)
        cast_together(self.qkv, self.attention_out, self.mlp_in, self.mlp_out)

    def forward(
        self, x: Tensor, branch: Tensor | None, spans: uk.Spans | None = None, keep: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and the branch to add to it, if any, [B, N, Cd], or [1, T, Cd] under `spans` -> the same of the next block.

        `keep` drops the tokens that nothing reads behind this block once attention has used them: [B, N', Cd].
        """
        x, h = self.norm1(x, branch)
        batch, tokens, width = x.shape
        qkv = self.qkv(h).view(batch, tokens, 3, self.heads, width // self.heads)
        attended = attend(qkv, spans)
        if keep is not None:
            x, attended = x[:, keep].contiguous(), attended[:, keep]
        x, h = self.norm2(x, self.attention_out(attended))
        return x, self.mlp_out(F.gelu(self.mlp_in(h)))


class Decoder(nn.Module):
    """Latents [B, K, D] -> pixel tokens [B, P, p·p·3], channels ordered (row, column, RGB).

    With K = P (the published form) register i becomes patch i. With any other K, P copies of a learned query are
    appended to the registers and attend to them; their outputs become the patches.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        sizes = config.decoder
        self.patches = config.patches
        self.lift = Linear(config.latent_dim, sizes.inner)
        self.embed = Linear(sizes.inner, sizes.width)
        self.token = nn.Parameter(torch.zeros(sizes.width))
        grid = sincos_2d(math.isqrt(config.patches), sizes.width)
        extra = torch.zeros(1, sizes.width)
        if config.registers == config.patches:
            position = torch.cat([extra, grid])
        else:
            self.query = nn.Parameter(torch.randn(sizes.width) * 0.02)
            position = torch.cat([extra, sincos_1d(torch.arange(config.registers), sizes.width), grid])
        self.register_buffer("position", position[None], persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = ResidualLayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.pixels = Linear(sizes.width, config.patch_size**2 * 3)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.embed(self.lift(latent))
        tokens = [self.token.to(x.dtype).expand(x.shape[0], 1, -1), x]
        if hasattr(self, "query"):
            tokens.append(self.query.to(x.dtype).expand(x.shape[0], self.patches, -1))
        x, branch = torch.cat(tokens, dim=1) + self.position.to(x.dtype), None
        for block in self.blocks[:-1]:
            x, branch = block(x, branch)
        # With K = P all but one token are read, and dropping that would cost the copy that it saves.
        keep = slice(-self.patches, None) if hasattr(self, "query") else None
        _, h = self.norm(*self.blocks[-1](x, branch, keep=keep))
        return self.pixels(h[:, -self.patches :].contiguous())
