"""Exponential moving averages of the weights; each rank averages the weights that its optimizer updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import unite_kernels as uk
from unite_fast.engine.sharding import Layout


class Ema:
    """shadow = decay · shadow + (1 − decay) · weight after every optimizer step, in float32.

    Args:
        layout: whose masters are averaged; under ZeRO 1 to 3 each rank holds its share alone.
        decay: 0.9978 in the published runs.
        extra: decays of additional averages, to choose from after the run.
    """

    def __init__(self, layout: Layout, decay: float, extra: Sequence[float] = ()):
        self.layout, self.decay, self.extra = layout, decay, tuple(extra)
        self._shadows = {d: [master.detach().clone() for master in layout.masters] for d in (decay, *self.extra)}
        self._index = {id(master): index for index, master in enumerate(layout.masters)}
        self._taken: set[int] = set()

    @property
    def decays(self) -> list[float]:
        """The main decay and the extra ones."""
        return list(self._shadows)

    @property
    def shadows(self) -> list[Tensor]:
        """The averages that evaluation and export use, one a master."""
        return self._shadows[self.decay]

    def of(self, master: Tensor, decay: float | None = None) -> Tensor:
        """The average of a master, by the main decay if none is named."""
        return self._shadows[self.decay if decay is None else decay][self._index[id(master)]]

    def take(self, masters: Sequence[Tensor]) -> list[list[Tensor]]:
        """The averages of these masters by each of `decays`, for an optimizer that updates them in this step itself.

        The next `update` skips them.
        """
        indices = [self._index[id(master)] for master in masters]
        self._taken.update(indices)
        return [[shadows[index] for index in indices] for shadows in self._shadows.values()]

    def update(self) -> None:
        """Take the weights of this step in, of all masters whose averages nobody has taken for it."""
        rest = [index for index in range(len(self.layout.masters)) if index not in self._taken]
        self._taken.clear()
        weights = [self.layout.masters[index].detach() for index in rest]
        for decay, shadows in self._shadows.items():
            uk.ema_update_([shadows[index] for index in rest], weights, decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap weights and averages in place; a second call undoes the first. Storage addresses do not change."""
        for master, shadow in zip(self.layout.masters, self.shadows):
            kept = master.detach().clone()
            master.copy_(shadow)
            shadow.copy_(kept)
