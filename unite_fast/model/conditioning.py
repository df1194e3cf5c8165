"""Conditioning and positions: time embedding, rotary tables and fixed sin-cos positions.

Shapes: B batch, N tokens, C width, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from unite_fast.model.linear import Linear

TIME_FREQUENCIES = 256


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of t in [0, 1], then Linear, SiLU, Linear; all in float32 (UNITE, condition c).

    2π t w with w ~ N(0, 1) reaches about 20 rad; bfloat16 keeps 8 bits of it, an error of 0.06 rad in the phase,
    so autocast is turned off here.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(TIME_FREQUENCIES))
        self.lift = Linear(2 * TIME_FREQUENCIES, width)
        self.project = Linear(width, width)
        # Nothing reads it. Published models have it, so it is kept for their parameter counts and for round trips.
        self.special = nn.Parameter(torch.zeros(width))

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, C] float32."""
        with torch.autocast(t.device.type, enabled=False):
            phase = t.float()[:, None] * self.frequencies[None] * (2 * math.pi)
            features = torch.cat([phase.sin(), phase.cos()], dim=-1)
            return self.project(F.silu(self.lift(features)))


def rotary_tables(positions: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position · 10000^(−2i/d), each [positions, d/2] float32."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency[None]
    return angle.cos().float(), angle.sin().float()


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """[sin(p·ω), cos(p·ω)], ω_i = 10000^(−i/(C/2)); positions [N] -> [N, C] float32."""
    omega = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = positions.double()[:, None] * omega[None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def sincos_2d(side: int, width: int) -> Tensor:
    """Fixed positions of a side × side grid, row-major: [side², C]; first half encodes the column, second the row."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([sincos_1d(column.flatten(), width // 2), sincos_1d(row.flatten(), width // 2)], dim=-1)
