"""The training step of UNITE (arXiv 2603.22283, Figure 3): tokenize and reconstruct, then denoise.

The two passes meet only in z0, which the second pass sees detached. So each runs forward **and backward** on its own
and drops its graph; gradients add up in place. Peak memory is that of the larger pass, whatever the number S of draws.
Shapes: B batch, K registers, D latent channels, H×H image, S flow draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unite_fast.config import ObjectiveConfig, TwoPassConfig
from unite_fast.model.casts import one_micro_batch
from unite_fast.objective.draws import Draws
from unite_fast.objective.perceptual import Lpips


class Backend(Protocol):
    """What a step needs from an engine: the model's training passes and gradient accumulation."""

    def __call__(self, phase: str, **inputs: Any) -> Any:
        """Run a training pass of the model."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; `last` marks the last backward of an optimizer step, which communicates."""


class StepLosses(NamedTuple):
    """Losses of one micro-batch, detached scalars, and its latents."""

    total: Tensor
    terms: dict[str, Tensor]  # the reconstruction's, by name
    flow: Tensor
    z0: Tensor  # [B, K, D]
    mask: Tensor | None  # [B, K] bool, the tokens of z0 that are real; None for all

    def scaled(self, weight: float) -> StepLosses:
        """The losses times a micro-batch's weight."""
        terms = {name: weight * term for name, term in self.terms.items()}
        return self._replace(total=weight * self.total, terms=terms, flow=weight * self.flow)

    @staticmethod
    def sum(parts: list[StepLosses]) -> StepLosses:
        """Sums of the losses of micro-batches, with the last one's latents."""
        terms = {name: sum(part.terms[name] for part in parts) for name in parts[-1].terms}
        return parts[-1]._replace(
            total=sum(part.total for part in parts), terms=terms, flow=sum(part.flow for part in parts)
        )


class TwoPassObjective(ABC):
    """The losses of both passes under one configuration; a modality adds its reconstruction.

    Args:
        config: weights and forms of the losses.
        null_label: the label that stands for no class.
    """

    def __init__(self, config: TwoPassConfig, null_label: int):
        self.config, self.null_label = config, null_label

    @abstractmethod
    def reconstruction(
        self, run: Callable[..., Any], data: Any, draws: Draws, shape: torch.Size
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Pass one: (weighted loss, its terms by name, z0) of a micro-batch's data; `shape` is that of z0."""

    def layout(self, data: Any) -> dict[str, Any]:
        """What the flow pass needs from the data besides the latents; nothing if all samples have one size."""
        return {}

    def mask(self, data: Any) -> Tensor | None:
        """[B, K] bool, True for real latent tokens; None if all are."""
        return None

    def flow(
        self,
        run: Callable[..., Any],
        z1: Tensor,
        labels: Tensor,
        draws: Draws,
        first: int,
        count: int,
        data: Any = None,
    ) -> Tensor:
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
            **self.layout(data),
        )


class Objective(TwoPassObjective):
    """The objective on images: mean absolute error and LPIPS.

    Args:
        config, null_label: as in `TwoPassObjective`.
        device: where the images are.
        autocast: dtype of LPIPS's convolutions and of its stored filters; None for float32.
    """

    config: ObjectiveConfig

    def __init__(
        self,
        config: ObjectiveConfig,
        null_label: int,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ):
        super().__init__(config, null_label)
        self.autocast = autocast
        self.lpips = Lpips.from_config(config.lpips).to(device) if config.lpips.weight else None
        if self.lpips and autocast is not None:
            self.lpips.features.cast(autocast)

    def reconstruction(
        self, run: Callable[..., Any], data: Tensor, draws: Draws, shape: torch.Size
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Pass one on images [B, 3, H, H] in [0, 1]; terms "l1" and, if enabled, "lpips"."""
        noise, t, mix, added_noise = draws.tokenize(shape)
        z0, l1, reconstruction = run("reconstruct", images=data, noise=noise, t=t, mix=mix, added_noise=added_noise)
        loss, terms = self.config.l1_weight * l1, {"l1": l1}
        if self.lpips:
            if self.config.lpips.dropout:
                draws.seed_generators()
            with torch.autocast(data.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                terms["lpips"] = self.lpips(data, reconstruction)
            loss = loss + self.config.lpips.weight * terms["lpips"]
        return loss, terms, z0


def two_pass_step(
    engine: Backend,
    objective: TwoPassObjective,
    data: Any,
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
        data: what the objective's reconstruction reads: images [B, 3, H, H] in [0, 1], or another modality's batch.
        labels: [B] int64.
        draws: the step's random numbers.
        shape: [B, K, D] of the latents.
        weight: of this micro-batch in the optimizer step: 1 / accumulation if all micro-batches are equal.
        last: this micro-batch ends the optimizer step.

    Returns:
        Losses without the weight, detached.
    """
    config = objective.config
    with one_micro_batch(labels.device.type):
        loss, terms, z0 = objective.reconstruction(engine, data, draws, shape)
        if config.stop_gradient:
            engine.backward(weight * loss, last=False)
            z1 = z0.detach()
        else:
            z1 = z0.detach().requires_grad_()  # collects ∂flow/∂z0 while pass one's graph waits

        flow = torch.zeros_like(loss.detach())
        for first in range(0, config.flow_draws, config.chunk):
            count = min(config.chunk, config.flow_draws - first)
            chunk = config.flow_weight * objective.flow(engine, z1, labels, draws, first, count, data)
            ends = config.stop_gradient and first + count == config.flow_draws
            engine.backward(weight * chunk, last=last and ends)
            flow += chunk.detach()

        if not config.stop_gradient:
            # The gradient of ⟨z0, g⟩ with g held fixed is g at z0: it carries the flow's gradient into pass one.
            engine.backward(weight * loss + (z0 * z1.grad).sum(), last=last)
        loss = loss.detach()
        terms = {name: term.detach() for name, term in terms.items()}
        return StepLosses(loss + flow, terms, flow, z0.detach(), objective.mask(data))
