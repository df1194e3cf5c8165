"""What the two-pass step is held against: the whole loss as one graph, and draws that are given, not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unite_fast.objective.draws import Draws, FlowDraws, TokenizeDraws
from unite_fast.objective.two_pass import TwoPassObjective


class RecordedDraws:
    """Draws given as tensors.

    Args:
        tokenize: the tokenization pass's draws.
        noise, t, drop: [S, B, K, D], [S, B] and [S, B] of the denoising pass.
    """

    def __init__(self, tokenize: TokenizeDraws, noise: Tensor, t: Tensor, drop: Tensor):
        self._tokenize, self._noise, self._t, self._drop = tokenize, noise, t, drop

    def tokenize(self, shape: torch.Size) -> TokenizeDraws:
        return self._tokenize

    def flow(self, z1: Tensor, first: int, count: int) -> FlowDraws:
        chosen = slice(first, first + count)
        t = self._t[chosen]
        weight = t[:, :, None, None]
        return FlowDraws(weight * z1 + (1 - weight) * self._noise[chosen], t, self._drop[chosen])

    def seed_generators(self) -> None:
        """Nothing: dropout is not recorded."""


def one_graph_loss(
    run: Callable[..., Any], objective: TwoPassObjective, data: Any, labels: Tensor, draws: Draws, *, shape: torch.Size
) -> Tensor:
    """The same total loss as one graph, every draw alive at once: what the two-pass step must agree with."""
    loss, _, z0 = objective.reconstruction(run, data, draws, shape)
    z1 = z0.detach() if objective.config.stop_gradient else z0
    config = objective.config
    return loss + config.flow_weight * objective.flow(run, z1, labels, draws, 0, config.flow_draws, data)
