"""The Generative Encoder: one transformer, two modes (UNITE, arXiv 2603.22283).

With patch tokens it tokenizes (registers attend to the image); without, it denoises (registers alone, with a label).
Shapes: B batch, K registers, D latent channels, P patches, C width, M context tokens, T tokens of a packed batch.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import unite_kernels as uk
from unite_fast.config import ModelConfig
from unite_fast.model.blocks import Block, Modulation, Rotary
from unite_fast.model.conditioning import TimeEmbedding, rotary_tables, sincos_1d
from unite_fast.model.linear import Linear
from unite_fast.model.packing import Packed


class GenerativeEncoder(nn.Module):
    """GE(latent [B,K,D], t [B], label [B], patches [B,P,C] or none) -> [B,K,D], before the latent LayerNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.registers = config.registers
        self.null_label = config.num_classes
        self.context_start = config.context_start if config.context_len else None
        self.checkpoint_activations = config.checkpoint_activations
        self.register_in = Linear(config.latent_dim, width)
        self.register_position = nn.Parameter(sincos_1d(torch.arange(config.registers), width)[None])
        self.time = TimeEmbedding(width)
        # One row a class, the null label, and a last row that published checkpoints carry unused.
        self.label = nn.Embedding(config.num_classes + 2, width)
        if config.context_len:
            self.context = nn.Parameter(torch.empty(1, config.context_len, width))
        self.modulation = nn.ModuleList(Linear(width, 6 * width) for _ in range(config.depth))
        self.final_modulation = Linear(width, 2 * width)
        self.opening_norm = nn.Parameter(torch.ones(width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final = Linear(width, config.latent_dim)
        cos, sin = rotary_tables(config.registers + config.patches, width // config.heads)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        for weight in (self.time.lift.weight, self.time.project.weight, self.label.weight):
            nn.init.normal_(weight, std=0.02)
        if self.context_start is not None:
            nn.init.normal_(self.context, std=0.02)
        for linear in (*self.modulation, self.final_modulation, self.final):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        latent: Tensor,
        t: Tensor,
        labels: Tensor,
        patches: Tensor | None = None,
        packed: Packed | None = None,
    ) -> Tensor:
        """One evaluation in either mode.

        Args:
            latent: [B, K, D] noise (tokenization) or noised latents (denoising).
            t: [B] times in [0, 1]; 1 is clean.
            labels: [B] int64; `null_label` stands for no class.
            patches: [B, P, C] patch tokens, given in tokenization mode only.
            packed: samples of different lengths: latent and result are [T, D], patches [T, C], one patch a register,
                which stand at the same rotary position. Such a model has no context tokens.
        """
        label = self.label(labels)
        condition = F.silu(self.time(t) + label)
        x = self.register_in(latent)
        if packed is not None:
            return self._forward_packed(x, condition, patches, packed)
        x = x + self.register_position.to(x.dtype)
        if patches is not None:
            x = torch.cat([x, patches.to(x.dtype)], dim=1)
        rotary = Rotary(self.rotary_cos, self.rotary_sin, 0)
        context = None
        if self.context_start is not None:
            context = (label[:, None] + self.context).to(x.dtype)
            with_context = Rotary(self.rotary_cos, self.rotary_sin, context.shape[1])
        if self.context_start == 0:
            x, rotary = torch.cat([context, x], dim=1), with_context

        terms = self._terms(0, condition)
        h = uk.rms_norm_modulate(x, self.opening_norm, *terms[:2])
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            following = self._terms(index + 1, condition)
            prepend = context if index + 1 == self.context_start else None
            keep = slice(rotary.unrotated, rotary.unrotated + self.registers) if index == last else None
            x, h = self._run_block(block, (x, h, Modulation(*terms), *following[:2], rotary, keep, prepend))
            if prepend is not None:
                rotary = with_context
            terms = following
        return self.final(h)

    def _forward_packed(
        self,
        x: Tensor,
        condition: Tensor,
        patches: Tensor | None,
        packed: Packed,
    ) -> Tensor:
        """The blocks and the final layer on registers x [T, C] of samples of different lengths -> [T, D]."""
        # Rounded behind the selection: CUDA adds the gradients of one row up in their own dtype, and bfloat16 stays at
        # 256 whatever ones are added to it.
        x = x + self.register_position.squeeze(0).index_select(0, packed.position).to(x.dtype)
        spans, position, keep = packed.spans, packed.position, None
        if patches is not None:
            spans, keep = packed.pairs.spans, packed.pairs.first
            x = torch.cat([x, patches.to(x.dtype)]).index_select(0, packed.pairs.order)
            position = position.repeat(2).index_select(0, packed.pairs.order)
        rotary = Rotary(self.rotary_cos.index_select(0, position), self.rotary_sin.index_select(0, position), 0)
        x = x[None]
        terms = self._terms(0, condition)
        h = uk.rms_norm_modulate(x, self.opening_norm, *terms[:2], spans=spans)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            following = self._terms(index + 1, condition)
            rows = keep if index == last else None
            arguments = (x, h, Modulation(*terms), *following[:2], rotary, rows, None, spans, packed.spans)
            x, h = self._run_block(block, arguments)
            terms = following
        return self.final(h.squeeze(0))

    def _terms(self, index: int, condition: Tensor) -> tuple[Tensor, ...]:
        """Modulation terms [B, C] of block `index`, or of the final layer behind the last one; shift and scale first.

        They are computed right before the block that uses them, not all at the start, so that their Linears' gradients,
        a quarter of all, become final block by block in a backward and are reduced across ranks while it still runs.
        """
        linear = self.modulation[index] if index < len(self.modulation) else self.final_modulation
        return linear(condition).split(condition.shape[-1], dim=-1)

    def reading_order(self) -> list[str]:
        """Names of the parameters in the order in which `forward` first reads them.

        A backward makes their gradients final in the reverse order.
        """
        depth = len(self.blocks)
        single = {"opening_norm": -1, "final_modulation": 2 * depth - 2, "final": 2 * depth}

        def place(name: str) -> int:
            part, index, *_ = [*name.split("."), ""]
            if part == "blocks":
                return 2 * int(index) + 1
            if part == "modulation":  # the block before reads it, too
                return 2 * int(index) - 2
            return single.get(part, -3)

        return sorted((name for name, _ in self.named_parameters()), key=place)

    def _run_block(self, block: Block, arguments: tuple) -> tuple[Tensor, Tensor]:
        if self.checkpoint_activations and torch.is_grad_enabled():
            # A block draws no random numbers, so their generator's state need not be kept.
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)
