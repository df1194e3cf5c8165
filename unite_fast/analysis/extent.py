"""How much a micro-batch asks for: what its operations, bytes and activations are counted from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

# Standard deviations above the mean. 8,000 epochs of QM9 are 1.6 million micro-batches a GPU, and of normal sums
# 2.9e-7 lie further out than five: such a run sees half of one.
BUSIEST = 5.0


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


@dataclass(frozen=True)
class Population:
    """The training samples of a run: how many, and how long they are.

    Attributes:
        histogram: samples of 0, 1, 2 … registers of their own, in any unit; (1,) where all are alike.
        samples: of an epoch.
        source: where both are from, for people.
    """

    histogram: tuple[int, ...]
    samples: int
    source: str

    @property
    def mean_length(self) -> float:
        return self._moment(1)

    @property
    def longest(self) -> int:
        return max(length for length, count in enumerate(self.histogram) if count)

    def mean(self, samples: int) -> Extent:
        """A micro-batch of that many samples, on average."""
        return self._extent(samples, 0.0)

    def busiest(self, samples: int) -> Extent:
        """The largest micro-batch of that many samples that a long run draws, about."""
        return self._extent(samples, BUSIEST)

    def _extent(self, samples: int, deviations: float) -> Extent:
        def total(power: int) -> int:
            mean = self._moment(power)
            deviation = math.sqrt(max(0.0, self._moment(2 * power) - mean**2))
            found = samples * mean + deviations * deviation * math.sqrt(samples)
            return round(min(found, samples * self.longest**power))

        return Extent(samples, total(1), total(2))

    def _moment(self, power: int) -> float:
        weighted = sum(count * length**power for length, count in enumerate(self.histogram))
        return weighted / sum(self.histogram)
