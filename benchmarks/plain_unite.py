"""The rival of the training step: UNITE in plain PyTorch, every draw in one graph, written from the paper.

What a careful engineer writes first: the library's own layers, attention from F.scaled_dot_product_attention, one
backward over the sum of all losses; no fused operator and no autograd of its own. `plain_training.py` beside it is its
optimizer step. `tests/test_bench_plain.py` shows that loss, gradients and update are those of unite_fast on the same
weights and draws, so both do the same work.
Shapes: B batch, K registers, D latent channels, P patches, C width, H heads, d head width, S flow draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from unite_fast.config import ModelConfig, ObjectiveConfig, Sizes, TwoPassConfig
from unite_fast.model.conditioning import rotary_tables, sincos_1d, sincos_2d
from unite_fast.objective.perceptual import SCALE, SHIFT, STAGES, Lpips


class PlainDraws(NamedTuple):
    """All randomness of one step."""

    noise: Tensor  # [B, K, D] registers of the tokenization pass
    t_tokenize: Tensor  # [B]
    mix_mask: Tensor  # [B] bool
    mix_t: Tensor  # [B]
    mix_noise: Tensor  # [B, K, D]
    t: Tensor  # [S, B]
    flow_noise: Tensor  # [S, B, K, D]
    drop: Tensor  # [S, B] bool

    @classmethod
    def make(cls, config: TwoPassConfig, shape: tuple[int, int, int], device: torch.device | str) -> PlainDraws:
        """From the device's generator, under the published laws."""
        batch, draws = shape[0], config.flow_draws
        u = torch.randn(draws, batch, device=device).sigmoid()
        return cls(
            torch.randn(shape, device=device),
            config.tokenize_t_max * torch.rand(batch, device=device),
            torch.rand(batch, device=device) < config.mix_probability,
            config.mix_t_min + (1 - config.mix_t_min) * torch.rand(batch, device=device),
            torch.randn(shape, device=device),
            config.time_shift * u / (1 + (config.time_shift - 1) * u),
            torch.randn(draws, *shape, device=device),
            torch.rand(draws, batch, device=device) < config.label_drop,
        )

    def mixed(self, z0: Tensor) -> Tensor:
        """What the decoder reads of z0 [B, K, D]."""
        t = self.mix_t[:, None, None]
        return torch.where(self.mix_mask[:, None, None], t * z0 + (1 - t) * self.mix_noise, z0)

    def noised(self, z1: Tensor) -> Tensor:
        """z_t [S, B, K, D] of clean latents z1 [B, K, D]."""
        t = self.t[..., None, None]
        return t * z1 + (1 - t) * self.flow_noise


class RmsNorm(nn.RMSNorm):
    """Statistics in float32."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of x [B, N, H, d] by tables [N, 1, d/2]."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


class PlainBlock(nn.Module):
    """x += gate·Attention(modulated RMSNorm(x)); x += gate·SwiGLU(modulated RMSNorm(x)); x = RMSNorm(x)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2, self.norm3 = RmsNorm(width), RmsNorm(width), RmsNorm(width)
        self.q_norm, self.k_norm = RmsNorm(width // heads), RmsNorm(width // heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 2 * hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, keys: Tensor | None = None) -> Tensor:
        """x [B, N, C], condition [B, C] behind its SiLU, tables [N, 1, d/2], keys [B, 1, 1, N] bool that are real."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1), cos, sin, keys)
        gate, up = self.mlp_in(modulate(self.norm2(x), shift2, scale2)).chunk(2, dim=-1)
        x = x + gate2[:, None] * self.mlp_out(F.silu(gate) * up)
        return self.norm3(x)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(self.q_norm(q), cos, sin).to(v.dtype), rotate(self.k_norm(k), cos, sin).to(v.dtype)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=keys)
        return self.attention_out(out.transpose(1, 2).flatten(2))


class PlainEncoder(nn.Module):
    """The Generative Encoder in both modes, with the latent LayerNorm behind it."""

    def __init__(self, config: Sizes):
        super().__init__()
        width = config.width
        self.context_len, self.context_start = config.context_len, config.context_start
        self.register_in = nn.Linear(config.latent_dim, width)
        self.register_position = nn.Parameter(torch.zeros(1, config.registers, width))
        self.register_buffer("frequencies", torch.zeros(256))
        self.time = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.num_classes + 2, width)
        if config.context_len:
            self.context = nn.Parameter(torch.zeros(1, config.context_len, width))
        self.blocks = nn.ModuleList(PlainBlock(width, config.heads) for _ in range(config.depth))
        self.final_norm = RmsNorm(width)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, config.latent_dim)
        self.latent_norm = nn.LayerNorm(config.latent_dim, eps=1e-5)
        cos, sin = rotary_tables(config.registers + config.patches, width // config.heads)
        # The context in front is not rotated: angle zero.
        self.register_buffer("cos", F.pad(cos, (0, 0, config.context_len, 0), value=1.0)[:, None], persistent=False)
        self.register_buffer("sin", F.pad(sin, (0, 0, config.context_len, 0))[:, None], persistent=False)

    def forward(
        self, latent: Tensor, t: Tensor, labels: Tensor, patches: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """latent [B, K, D], t [B], labels [B], patches [B, P, C] -> [B, K, D] float32, normalised.

        A mask [B, K] bool tells the real registers of samples of unlike length. Each register then has one patch at its
        rotary position, and there is no context.
        """
        registers = latent.shape[1]
        label = self.label(labels)
        with torch.autocast(t.device.type, enabled=False):
            phase = 2 * math.pi * t[:, None] * self.frequencies
            time = self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        condition = F.silu(time + label)
        x = self.register_in(latent) + self.register_position[:, :registers]
        if patches is not None:
            x = torch.cat([x, patches], dim=1)
        cos, sin, keys = self.cos, self.sin, None
        if mask is not None:
            kinds = 1 if patches is None else 2
            cos, sin = (table[:registers].repeat(kinds, 1, 1) for table in (cos, sin))
            keys = mask.repeat(1, kinds)[:, None, None]
        unrotated = 0
        for index, block in enumerate(self.blocks):
            if self.context_len and index == self.context_start:
                x = torch.cat([label[:, None] + self.context, x], dim=1)
                unrotated = self.context_len
            tables = slice(self.context_len - unrotated, self.context_len - unrotated + x.shape[1])
            x = block(x, condition, cos[tables], sin[tables], keys)
        x = x[:, unrotated : unrotated + registers]
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        return self.latent_norm(self.final(modulate(self.final_norm(x), shift, scale)).float())


class PlainDecoderBlock(nn.Module):
    """x += Attention(LayerNorm(x)); x += MLP(LayerNorm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x [B, N, Cd], keys [B, 1, 1, N] bool that are real."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))


class PlainDecoder(nn.Module):
    """Latents [B, K, D] -> image [B, 3, H, H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        sizes = config.decoder
        self.config = config
        self.lift, self.embed = nn.Linear(config.latent_dim, sizes.inner), nn.Linear(sizes.inner, sizes.width)
        self.token = nn.Parameter(torch.zeros(sizes.width))
        position = [torch.zeros(1, sizes.width), sincos_2d(math.isqrt(config.patches), sizes.width)]
        if config.registers != config.patches:
            self.query = nn.Parameter(torch.zeros(sizes.width))
            position.insert(1, sincos_1d(torch.arange(config.registers), sizes.width))
        self.register_buffer("position", torch.cat(position), persistent=False)
        self.blocks = nn.ModuleList(PlainDecoderBlock(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.pixels = nn.Linear(sizes.width, 3 * config.patch_size**2)

    def forward(self, latent: Tensor) -> Tensor:
        batch, patches, p = latent.shape[0], self.config.patches, self.config.patch_size
        pieces = [self.token.expand(batch, 1, -1), self.embed(self.lift(latent))]
        if self.config.registers != patches:
            pieces.append(self.query.expand(batch, patches, -1))
        x = torch.cat(pieces, dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        grid = math.isqrt(patches)
        pixels = self.pixels(self.norm(x[:, -patches:])).view(batch, grid, grid, p, p, 3)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, grid * p, grid * p)


class PlainLpips(nn.Module):
    """LPIPS as its paper's code computes it: VGG16 on both images, maps normalised, squared differences weighted."""

    def __init__(self, lpips: Lpips):
        super().__init__()
        self.stages = nn.ModuleList()
        for stage, (ours, indices) in enumerate(zip(lpips.features.convolutions, STAGES, strict=True)):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if stage else []
            for convolution, _ in zip(ours, indices, strict=True):
                copy = nn.Conv2d(convolution.in_channels, convolution.out_channels, 3, padding=1)
                copy.load_state_dict(convolution.state_dict())
                layers += [copy, nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))
        self.weights = nn.ParameterList(weight.detach().clone().view(1, -1, 1, 1) for weight in lpips.weights)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, target: Tensor, image: Tensor) -> Tensor:
        a, b = ((x - self.shift) / self.scale for x in (target, image))
        total = torch.zeros((), device=image.device)
        for stage, weight in zip(self.stages, self.weights, strict=True):
            a, b = stage(a), stage(b)
            difference = (self.unit(a) - self.unit(b)).square()
            total = total + (difference * weight).sum(dim=1).mean()
        return total

    @staticmethod
    def unit(x: Tensor) -> Tensor:
        x = x.float()
        return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


class PlainUnite(nn.Module):
    """The model and its total loss as one graph.

    Args:
        config: sizes; shared weights, as published.
        objective: the published forms of the losses.
        lpips: the perceptual term, where it has a weight.
    """

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig, lpips: PlainLpips | None = None):
        super().__init__()
        self.config, self.objective = config, objective
        self.patches = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.encoder = PlainEncoder(config)
        self.decoder = PlainDecoder(config)
        self.lpips = lpips

    def forward(self, images: Tensor, labels: Tensor, draws: PlainDraws) -> Tensor:
        """Reconstruction loss + flow loss, summed over all S draws; images [B, 3, H, H] in [0, 1], labels [B]."""
        z0 = self.tokenize(images, draws)
        return self.reconstruct(z0, images, draws) + self.flow(z0.detach(), labels, draws)

    def tokenize(self, images: Tensor, draws: PlainDraws) -> Tensor:
        """z0 [B, K, D]."""
        null = torch.full((images.shape[0],), self.config.num_classes, device=images.device)
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.encoder(draws.noise, draws.t_tokenize, null, patches)

    def reconstruct(self, z0: Tensor, images: Tensor, draws: PlainDraws) -> Tensor:
        """Weighted L1 and LPIPS of the decoded, noised latents."""
        reconstruction = self.decoder(draws.mixed(z0)).float()
        loss = self.objective.l1_weight * (reconstruction - images).abs().mean()
        if self.lpips is not None:
            loss = loss + self.objective.lpips.weight * self.lpips(images, reconstruction)
        return loss

    def flow(self, z1: Tensor, labels: Tensor, draws: PlainDraws) -> Tensor:
        """Weighted flow loss of all draws on clean latents z1 [B, K, D]."""
        # All draws as one batch, which is the faster of the two plain forms (the other: a call a draw).
        z_t = draws.noised(z1)
        conditions = torch.where(draws.drop, self.config.num_classes, labels)
        predicted = self.encoder(z_t.flatten(0, 1), draws.t.flatten(), conditions.flatten()).view_as(z_t)
        error = (z1 - predicted) / (1 - draws.t[..., None, None]).clamp(min=self.objective.t_floor)
        return self.objective.flow_weight * error.square().mean(dim=(1, 2, 3)).sum()
