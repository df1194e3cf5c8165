"""The training step of UNITE (arXiv 2603.22283, Figure 3): tokenize and reconstruct, then denoise.

The two passes meet only in z0, which the second sees detached. So each runs forward **and backward** on its own and
drops its graph; gradients add up in place. Peak memory is the larger pass, whatever the number of flow draws S.
Shapes: B batch, K registers, D latent channels, H×H image, S flow draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unite_fast.config import ObjectiveConfig
from unite_fast.objective.draws import Draws
from unite_fast.objective.perceptual import Lpips


class Backend(Protocol):
    """What a step needs of an engine: the model's training passes and gradient accumulation."""

    def __call__(self, phase: str, **inputs: Any) -> Any:
        """Run a training pass of the model."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; `last` marks the last backward of an optimizer step, which communicates."""


class StepLosses(NamedTuple):
    """Losses of one micro-batch, detached scalars, and its latents."""

    total: Tensor
    l1: Tensor
    lpips: Tensor
    flow: Tensor
    z0: Tensor  # [B, K, D]


class Objective:
    """The losses of both passes under one configuration.

    Args:
        config: weights and forms of the losses.
        null_label: label of no class.
        device: where the images are.
        autocast: dtype that LPIPS's convolutions compute in; None for float32.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        null_label: int,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ):
        self.config = config
        self.null_label = null_label
        self.autocast = autocast
        self.lpips = Lpips.from_config(config.lpips).to(device) if config.lpips.weight else None

    def reconstruction(self, run: Callable[..., Any], images: Tensor, draws: Draws, shape: torch.Size):
        """Pass one: (loss, l1, lpips, z0) of images [B, 3, H, H] in [0, 1]; `shape` is that of z0."""
        noise, t, mix, added_noise = draws.tokenize(shape)
        z0, l1, reconstruction = run(
            "reconstruct", images=images, noise=noise, t=t, mix=mix, added_noise=added_noise
        )
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            lpips = self.lpips(images, reconstruction) if self.lpips else torch.zeros_like(l1)
        return self.config.l1_weight * l1 + self.config.lpips.weight * lpips, l1, lpips, z0

    def flow(self, run: Callable[..., Any], z1: Tensor, labels: Tensor, draws: Draws, first: int, count: int) -> Tensor:
        """Pass two on draws first … first+count−1: Σ over draws of mean(((z1 − ẑ)/max(1−t, floor))²)."""
        config = self.config
        z_t, t, drop = draws.flow(z1, first, count)
        return run(
            "flow",
            z_t=z_t,
            t=t,
            labels=torch.where(drop, self.null_label, labels[None]),
            z1=z1,
            weighting=config.weighting == "velocity",
            floor=config.t_floor,
        )


def two_pass_step(
    engine: Backend,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    *,
    shape: torch.Size,
    weight: float = 1.0,
    last: bool = True,
) -> StepLosses:
    """Both passes, forward and backward, on one micro-batch.

    Args:
        engine: runs passes and accumulates gradients.
        images: [B, 3, H, H] in [0, 1].
        labels: [B] int64.
        draws: the step's randomness.
        shape: [B, K, D] of the latents.
        weight: of this micro-batch in the optimizer step, one over the number of accumulated ones.
        last: this micro-batch ends the optimizer step.

    Returns:
        Losses before the weight, detached.
    """
    config = objective.config
    loss, l1, lpips, z0 = objective.reconstruction(engine, images, draws, shape)
    if config.stop_gradient:
        engine.backward(weight * loss, last=False)
        z1 = z0.detach()
    else:
        z1 = z0.detach().requires_grad_()  # collects ∂flow/∂z0 while pass one's graph waits

    flow = torch.zeros_like(loss.detach())
    for first in range(0, config.flow_draws, config.draws_per_chunk):
        count = min(config.draws_per_chunk, config.flow_draws - first)
        chunk = config.flow_weight * objective.flow(engine, z1, labels, draws, first, count)
        ends = config.stop_gradient and first + count == config.flow_draws
        engine.backward(weight * chunk, last=last and ends)
        flow += chunk.detach()

    if not config.stop_gradient:
        # The gradient of ⟨z0, g⟩ with g held fixed is g at z0: it carries the flow's gradient into pass one.
        engine.backward(weight * loss + (z0 * z1.grad).sum(), last=last)
    loss = loss.detach()
    return StepLosses(loss + flow, l1.detach(), lpips.detach(), flow, z0.detach())


def one_graph_loss(
    run: Callable[..., Any], objective: Objective, images: Tensor, labels: Tensor, draws: Draws, *, shape: torch.Size
) -> Tensor:
    """The same total loss as one graph, every draw alive at once: what the two-pass step must agree with."""
    loss, _, _, z0 = objective.reconstruction(run, images, draws, shape)
    z1 = z0.detach() if objective.config.stop_gradient else z0
    config = objective.config
    return loss + config.flow_weight * objective.flow(run, z1, labels, draws, 0, config.flow_draws)
