"""Randomly initialised Inception-v3 weights in the layout of the published file, for tests that need no download."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from unite_fast.evaluation.inception import CLASSES, FEATURES, Inception


@cache
def inception_weights(seed: int = 0) -> dict[str, Tensor]:
    """He-scaled convolutions and batch norms that are not the identity, so that features differ between images."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, convolution in Inception().convolutions():
        outputs, *rest = convolution.weight.shape
        fan_in = convolution.weight[0].numel()
        state[f"{name}.conv.weight"] = torch.randn(outputs, *rest, generator=generator) * (2 / fan_in) ** 0.5
        state[f"{name}.bn.weight"] = 0.9 + 0.2 * torch.rand(outputs, generator=generator)
        state[f"{name}.bn.bias"] = 0.1 * torch.randn(outputs, generator=generator)
        state[f"{name}.bn.running_mean"] = 0.1 * torch.randn(outputs, generator=generator)
        state[f"{name}.bn.running_var"] = 0.8 + 0.4 * torch.rand(outputs, generator=generator)
    state["fc.weight"] = torch.randn(CLASSES, FEATURES, generator=generator) * 0.1
    state["fc.bias"] = torch.randn(CLASSES, generator=generator)
    return state
