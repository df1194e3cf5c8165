"""Exponential moving average of the weights, each rank averaging what its optimizer updates."""

from __future__ import annotations

import torch
from torch import Tensor

import unite_kernels as uk
from unite_fast.engine.sharding import Layout


class Ema:
    """shadow = decay · shadow + (1 − decay) · weight after every optimizer step, in float32.

    Args:
        layout: whose masters are averaged; under ZeRO 1 to 3 each rank holds its share alone.
        decay: 0.9978 in the published runs.
    """

    def __init__(self, layout: Layout, decay: float):
        self.layout, self.decay = layout, decay
        self.shadows = [master.detach().clone() for master in layout.masters]
        self._of = {id(master): shadow for master, shadow in zip(layout.masters, self.shadows)}

    def of(self, master: Tensor) -> Tensor:
        """The average of a master."""
        return self._of[id(master)]

    def update(self) -> None:
        """Take the weights of this step in."""
        uk.ema_update_(self.shadows, [master.detach() for master in self.layout.masters], self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages in place; twice is nothing. Storage addresses stay."""
        for master, shadow in zip(self.layout.masters, self.shadows):
            kept = master.detach().clone()
            master.copy_(shadow)
            shadow.copy_(kept)
