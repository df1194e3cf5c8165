"""UNITE on images as one module: tokenizer, generator and decoder (arXiv 2603.22283).

Shapes: B batch, K registers, D latent channels, P patches, H×H image, S flow draws.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import ModelConfig
from unite_fast.model.arguments import check_labels, check_tensor, kind_of
from unite_fast.model.decoder import Decoder
from unite_fast.model.two_pass import TwoPassModel


class PatchEmbedding(nn.Module):
    """Stride-p convolution as one matrix product on unfolded patches: [B, 3, H, H] -> [B, P, C]."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        convolution = nn.Conv2d(3, width, patch_size, patch_size)  # for its default initialisation
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, images: Tensor) -> Tensor:
        width, channels, p, _ = self.weight.shape
        batch, _, height, _ = images.shape
        grid = height // p
        unfolded = images.view(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(unfolded.reshape(batch, grid * grid, channels * p * p), self.weight.flatten(1), self.bias)


class Unite(TwoPassModel):
    """UNITE on images."""

    def make_patches(self, config: ModelConfig) -> PatchEmbedding:
        return PatchEmbedding(config.patch_size, config.width)

    def make_decoder(self, config: ModelConfig) -> Decoder:
        return Decoder(config)

    def latent_noise(self, batch: int, *, generator: torch.Generator | None = None) -> Tensor:
        """N(0, 1) of shape [B, K, D] on the model's device."""
        shape = (batch, self.config.registers, self.config.latent_dim)
        return torch.randn(shape, device=self.device, generator=generator)

    def tokenize(self, images: Tensor, *, noise: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Images to latents.

        Args:
            images: [B, 3, H, H] floating point, in [0, 1].
            noise: [B, K, D] register noise; drawn from N(0, 1) if None.
            t: [B] tokenization times; drawn from U(0, tokenize_t_max) if None.

        Returns:
            z0 [B, K, D] float32.

        Raises:
            ValueError: images that are no floating-point tensor, of another size or number of channels; noise or times
                of another type or shape.
        """
        self._check_images(images)
        batch = images.shape[0]
        if noise is not None:
            self._check_latents("noise", noise, batch)
        if t is not None:
            check_tensor("t", t, batch)
        images = images.to(self.patches.weight.dtype)
        if noise is None:
            noise = self.latent_noise(batch)
        if t is None:
            t = torch.rand(batch, device=images.device) * self.tokenize_t_max
        return self.latent_norm(self._encode(images, noise, t))

    def denoise(self, z_t: Tensor, t: Tensor, labels: Tensor, *, normalise: bool = True) -> Tensor:
        """Prediction of clean latents: z_t [B, K, D], t [B], labels [B] -> ẑ0 [B, K, D] float32.

        `normalise=False` leaves the latent LayerNorm out, the form that the published unguided sampler integrates.

        Raises:
            ValueError: an argument of another type or shape; on the CPU labels outside of 0 … num_classes.
        """
        self._check_latents("z_t", z_t, "B")
        check_tensor("t", t, z_t.shape[0])
        check_labels(labels, z_t.shape[0], self.null_label)
        encoder, norm = self._denoiser()
        latent = encoder(z_t, t, labels)
        return norm(latent) if normalise else latent.float()

    def decode(self, z0: Tensor) -> Tensor:
        """Latents [B, K, D] -> images [B, 3, H, H], nominally in [0, 1], not clipped.

        Raises:
            ValueError: latents that are no floating-point tensor of that shape.
        """
        self._check_latents("z0", z0, "B")
        p = self.config.patch_size
        grid = self.config.image_size // p
        pixels = self.decoder(z0).float().view(-1, grid, grid, p, p, 3)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, grid * p, grid * p)

    def _reconstruct(self, images, noise, t, mix=None, added_noise=None):
        """(z0 [B,K,D], mean |x̂ − x|, x̂ [B,3,H,H]) with the decoder's noise: `mix` = (mask, t, ε), or added_noise."""
        latent = self._encode(images, noise, t)
        if mix is not None:
            z0, decoder_input = self.latent_norm.mix(latent, *mix)
        else:
            z0 = self.latent_norm(latent)
            decoder_input = z0 if added_noise is None else z0 + added_noise
        l1, reconstruction = uk.patch_l1(self.decoder(decoder_input), images, self.config.patch_size)
        return z0, l1, reconstruction

    def _flow(self, z_t, t, labels, z1, weighting, floor):
        """Flow loss of s draws: z_t [s,B,K,D], t [s,B], labels [s,B], z1 [B,K,D] -> scalar, summed over draws."""
        encoder, norm = self._denoiser()
        latent = encoder(z_t.flatten(0, 1), t.flatten(), labels.flatten())
        return norm.flow_loss(latent.view_as(z_t), z1, t, weighting=weighting, floor=floor)

    def _encode(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        null = torch.full((images.shape[0],), self.null_label, device=images.device)
        return self.encoder(self._registers(noise), t, null, self.patches(images))

    def _check_latents(self, name: str, latents: Tensor, batch: int | str) -> None:
        check_tensor(name, latents, batch, self.config.registers, self.config.latent_dim)

    def _check_images(self, images: Tensor) -> None:
        side = self.config.image_size
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise ValueError(
                f"images must be a floating-point tensor with values in [0, 1], got {kind_of(images)}: "
                f"divide uint8 images by 255"
            )
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images must be [B, 3, {side}, {side}], got {list(images.shape)}")
