"""The network parts that all modalities share: the Generative Encoder, the latent norm, and the denoising pass.

A modality adds its patch embedding, its decoder, and the tokenization pass with its losses.
Shapes: B batch, K registers, D latent channels, S flow draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import LatentNormKind, TwoPassConfig
from unite_fast.model.generative_encoder import GenerativeEncoder

TOKENIZE_T_MAX = TwoPassConfig.model_fields["tokenize_t_max"].default  # of weights that come without a record of it
LATENT_NORM_EPS = 1e-5


class LatentNorm(nn.Module):
    """The norm over the D latent channels in float32; outside the encoder, in both modes.

    Args:
        latent_dim: D.
        kind: "layer", as published, with noise and loss in fused operators; "rms" or "none" in plain PyTorch.
    """

    def __init__(self, latent_dim: int, kind: LatentNormKind = "layer"):
        super().__init__()
        self.kind = kind
        if kind != "none":
            self.weight = nn.Parameter(torch.ones(latent_dim))
        if kind == "layer":
            self.bias = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent.float()
        if self.kind == "layer":
            return F.layer_norm(latent, self.weight.shape, self.weight, self.bias, LATENT_NORM_EPS)
        return F.rms_norm(latent, self.weight.shape, self.weight, LATENT_NORM_EPS) if self.kind == "rms" else latent

    def mix(self, latent: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(z0, decoder input): where mask [B], the input is t·z0 + (1−t)·noise."""
        if self.kind == "layer":
            return uk.latent_norm_mix(
                latent.float(), self.weight, self.bias, mask=mask, t=t, noise=noise, eps=LATENT_NORM_EPS
            )
        z0, t = self(latent), t[:, None, None]
        return z0, torch.where(mask[:, None, None], t * z0 + (1 - t) * noise, z0)

    def flow_loss(self, latent: Tensor, z1: Tensor, t: Tensor, *, weighting: bool, floor: float) -> Tensor:
        """Σ over draws of mean(((z1 − norm(latent)) / max(1−t, floor))²); undivided without weighting."""
        if self.kind == "layer":
            return uk.latent_norm_flow_loss(
                latent.float(), z1, t, self.weight, self.bias, floor=floor, weighting=weighting, eps=LATENT_NORM_EPS
            )
        error = z1 - self(latent)
        if weighting:
            error = error / (1 - t).clamp_min(floor)[:, :, None, None]
        return error.square().mean((1, 2, 3)).sum()


class TwoPassModel(nn.Module, ABC):
    """Patch embedding, Generative Encoder, latent norm and decoder under one configuration of sizes.

    With `config.shared` one encoder serves both modes; otherwise `denoiser` is a second encoder with a latent norm
    of its own (the paper's separate-weights ablation).

    Attributes:
        tokenize_t_max: `objective.tokenize_t_max` of the training: its tokenization times were U(0, this).
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.tokenize_t_max: float = TOKENIZE_T_MAX
        # This order of the parts is that of the initial random numbers and of the optimizer's parameters.
        self.patches = self.make_patches(config)
        self.encoder = GenerativeEncoder(config)
        self.latent_norm = LatentNorm(config.latent_dim, config.latent_norm)
        if not config.shared:
            self.denoiser = GenerativeEncoder(config)
            self.denoiser_norm = LatentNorm(config.latent_dim, config.latent_norm)
        self.decoder = self.make_decoder(config)

    @abstractmethod
    def make_patches(self, config: Any) -> nn.Module:
        """The module that turns data into patch tokens."""

    @abstractmethod
    def make_decoder(self, config: Any) -> nn.Module:
        """The module that turns latents into data."""

    @abstractmethod
    def _reconstruct(self, **inputs: Any) -> Any:
        """The tokenization pass with its losses; the first output is z0."""

    @abstractmethod
    def _flow(self, **inputs: Any) -> Tensor:
        """The denoising pass of several draws: their flow losses' sum."""

    @classmethod
    def state_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every entry of the state dict, without allocating the weights."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}

    @property
    def null_label(self) -> int:
        """Label that stands for no class."""
        return self.config.num_classes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.register_position.device

    @property
    def tokenize_time(self) -> float:
        """The tokenization time of evaluation, reconstruction and everything else outside of training."""
        return self.tokenize_t_max / 2

    def forward(self, phase: str, **inputs):
        """The training passes, `reconstruct` and `flow`; one entry point so that a wrapper's hooks see both."""
        return {"reconstruct": self._reconstruct, "flow": self._flow}[phase](**inputs)

    def _registers(self, noise: Tensor) -> Tensor:
        """What the registers of tokenization start as, of noise in its shape."""
        return noise if self.config.register_noise else torch.zeros_like(noise)

    def _denoiser(self) -> tuple[GenerativeEncoder, LatentNorm]:
        return (self.encoder, self.latent_norm) if self.config.shared else (self.denoiser, self.denoiser_norm)

    def reading_order(self) -> list[str]:
        """Names of the parameters in the order in which the training passes first read them.

        A backward makes their gradients final in the reverse order, as far as it reads them.
        """
        found = []
        for part, module in self.named_children():
            inside = [name for name, _ in module.named_parameters()]
            if isinstance(module, GenerativeEncoder):
                inside = module.reading_order()
            found += [f"{part}.{name}" for name in inside]
        return found

    def matrix_parameters(self) -> set[str]:
        """Names of the parameters that Muon updates (UNITE, optimisation).

        Everything with two or more dimensions except the patch embedding, the final layer, the context vectors and
        the register positions.
        """
        excluded = (".patches.", ".final.", ".final_modulation.", ".context", ".register_position")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim >= 2 and not any(part in f".{name}" for part in excluded)
        }

    def float32_matrices(self) -> set[str]:
        """Names of the weights of Linears and embeddings that the training passes read in float32 under autocast."""
        return {name for name in self.matrix_parameters() if any(part in f".{name}" for part in (".time.", ".label."))}
