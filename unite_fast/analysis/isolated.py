"""The parts of a training step, each to run alone; those of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import Config
from unite_fast.engine.backend import autocast_dtype
from unite_fast.modality import Inputs
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import Objective


class Isolated(NamedTuple):
    """A part of the step on inputs as large as the step's."""

    forward: Callable[..., tuple[Tensor, ...]]  # of the inputs, to what gradients come back to
    inputs: list[Tensor]  # leaves that take a gradient


def image_parts(
    config: Config, model: Unite, objective: Objective, inputs: Inputs, draws: int
) -> dict[str, Isolated]:
    """tokenize, decode (with L1), lpips (where it has a weight), denoise on that many draws."""
    images, labels, shape = inputs.data, inputs.labels, inputs.shape
    seeded = SeededDraws(config.objective, seed=0, step=0, stream=0, device=images.device)
    noise, t, mix, added = seeded.tokenize(shape)
    null = torch.full_like(labels, model.null_label)
    latents = torch.randn(shape, device=images.device)

    def tokenize() -> tuple[Tensor, ...]:
        latent = model.encoder(noise, t, null, model.patches(images))
        if mix is not None:
            return model.latent_norm.mix(latent, *mix)
        z0 = model.latent_norm(latent)
        return (z0 if added is None else z0 + added,)

    def decode(latent: Tensor) -> tuple[Tensor, ...]:
        return uk.patch_l1(model.decoder(latent), images, config.model.patch_size)

    def denoise() -> tuple[Tensor, ...]:
        return (objective.flow(model, latents, labels, seeded, 0, draws),)

    found = {"tokenize": Isolated(tokenize, []), "decode": Isolated(decode, [latents.clone().requires_grad_()])}
    if objective.lpips is not None:
        picture = torch.rand_like(images).contiguous(memory_format=torch.channels_last)
        picture = picture.to(autocast_dtype(config, images.device) or torch.float32).requires_grad_()
        found["lpips"] = Isolated(lambda image: (objective.lpips(images, image),), [picture])
    return found | {"denoise": Isolated(denoise, [])}
