"""How much a micro-batch asks for: what its operations, bytes and activations are counted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """Samples of one micro-batch, of a step or of many: what is counted from an extent is linear in it.

    Attributes:
        samples: images or molecules.
        tokens: registers of all samples, where samples differ in them; 0 where all have what the model says.
        pairs: Σ n² over samples of n registers, what attention within samples computes; 0 as `tokens`.
    """

    samples: int
    tokens: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, lengths: Tensor) -> Self:
        """Of samples of these lengths, [B] int64 on the host."""
        return cls(len(lengths), int(lengths.sum()), int(lengths.square().sum()))

    def __add__(self, other: Extent) -> Extent:
        return Extent(self.samples + other.samples, self.tokens + other.tokens, self.pairs + other.pairs)
