"""The random numbers of a training step, made on the device from (seed, step, rank).

Every number is a function of its address (seed, optimizer step, stream, flow draw, element), so resuming reproduces it,
splitting S draws into chunks changes nothing, and no generator state needs saving.
Shapes: B batch, K registers, D latent channels, S flow draws, s draws of one chunk.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import ObjectiveConfig
from unite_fast.data.sampler import counter_hash


class TokenizeDraws(NamedTuple):
    """Draws of the tokenization pass."""

    noise: Tensor  # [B, K, D] register noise
    t: Tensor  # [B] tokenization times
    mix: tuple[Tensor, Tensor, Tensor] | None  # mask [B] bool, t [B], ε [B, K, D]
    added_noise: Tensor | None  # [B, K, D], already scaled by its σ


class FlowDraws(NamedTuple):
    """Draws of one chunk of the denoising pass."""

    z_t: Tensor  # [s, B, K, D] noised latents
    t: Tensor  # [s, B] times
    drop: Tensor  # [s, B] bool, labels to replace by null


class Draws(Protocol):
    """Source of a step's random numbers."""

    def tokenize(self, shape: torch.Size) -> TokenizeDraws:
        """Draws for latents of shape [B, K, D]."""

    def flow(self, z1: Tensor, first: int, count: int) -> FlowDraws:
        """Draws `first` … `first + count − 1` on clean latents z1 [B, K, D]; differentiable in z1."""

    def seed_generators(self) -> None:
        """Seed PyTorch's own generators, for dropout, which can use no others."""


# Streams of one (rank, micro-batch), one for each kind of number.
_NOISE, _TOKENIZE_T, _MIX_MASK, _MIX_T, _DECODER_NOISE, _FLOW, _DROP, _STREAMS = range(8)
_GENERATORS = 31  # first word of the hash that seeds PyTorch's generators


class SeededDraws:
    """Draws made on the device by counter-based Philox from (seed, step, stream, draw, element).

    Args:
        config: distributions and ranges.
        seed: of the run.
        step: optimizer step, an int or a 0-dim int64 tensor on the device.
        stream: index of this micro-batch among those of all ranks in the step: rank · accumulation + micro-batch.
        device: where the numbers are made.
    """

    def __init__(self, config: ObjectiveConfig, *, seed: int, step: int | Tensor, stream: int, device: torch.device):
        self._config, self._seed, self._device, self._address = config, seed, device, (seed, step, stream)
        # Filled on the device: copying a Python number there would make the host wait, once for every draw.
        self._step = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)
        self._first_stream = stream * _STREAMS

    def _at(self, stream: int) -> tuple[int, Tensor, int]:
        return self._seed, self._step, self._first_stream + stream

    def _uniform(self, stream: int, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, **draws) -> Tensor:
        return low + (high - low) * uk.philox_uniform(shape, *self._at(stream), device=self._device, **draws)

    def _normal(self, stream: int, shape: torch.Size) -> Tensor:
        return uk.philox_normal(shape, *self._at(stream), device=self._device)

    def tokenize(self, shape: torch.Size) -> TokenizeDraws:
        config, batch = self._config, (shape[0],)
        noise = self._normal(_NOISE, shape)
        t = self._uniform(_TOKENIZE_T, batch, 0.0, config.tokenize_t_max)
        mix = added_noise = None
        if config.decoder_noise == "mix":
            mask = self._uniform(_MIX_MASK, batch) < config.mix_probability
            mix = (mask, self._uniform(_MIX_T, batch, config.mix_t_min, 1.0), self._normal(_DECODER_NOISE, shape))
        elif config.decoder_noise == "additive":
            added_noise = config.additive_sigma * self._normal(_DECODER_NOISE, shape)
        return TokenizeDraws(noise, t, mix, added_noise)

    def flow(self, z1: Tensor, first: int, count: int) -> FlowDraws:
        config = self._config
        seed, step, stream = self._at(_FLOW)
        # The paper's uniform law has no shift; the published configuration shifts its logit-normal times.
        shift = config.time_shift if config.time_law == "logit_normal" else 1.0
        z_t, t = uk.flow_noise(
            z1, count, seed, step, stream=stream, law=config.time_law, shift=shift, first_draw=first
        )
        drop = self._uniform(_DROP, (z1.shape[0],), draws=count, first_draw=first) < config.label_drop
        return FlowDraws(z_t, t, drop)

    def seed_generators(self) -> None:
        """From (seed, step, stream), so that ranks differ and a resumed run repeats; waits for a step on the device."""
        torch.manual_seed(int(counter_hash(_GENERATORS, *map(int, self._address))[0]))
