"""The order of the images, without state: every question about it is arithmetic on (seed, epoch, index).

A run reads one endless stream of positions 0, 1, 2, …: position p is image `permutation(n, seed, p // n)[p mod n]`.
Step s owns positions [s·G, (s+1)·G) of the global batch G, whatever the number of ranks and micro-batches, so no image
is lost or repeated in an epoch, and starting at any step costs one permutation.

Random numbers are hashes of counters. NumPy's generators would do, but NumPy does not promise that a permutation stays
the same from one version to the next, and a resumed run must continue its own order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# First word of every hash, so that the uses draw from unrelated sequences.
_ORDER, _FLIP, _SUBSTITUTE = 1, 2, 3


def counter_hash(*words: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for a tuple of non-negative integers (arrays broadcast).

    Each word is added to the state and mixed by the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = state + np.asarray(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of `count` images in an epoch: [count], each of 0 … count-1 once."""
    return np.argsort(counter_hash(_ORDER, seed, epoch, np.arange(count)), kind="stable")


def flips(seed: int, epochs: ArrayLike, indices: ArrayLike) -> NDArray[np.bool_]:
    """Whether each image is mirrored in its epoch, with probability 1/2: [b]."""
    return (counter_hash(_FLIP, seed, epochs, indices) >> np.uint64(63)).astype(bool)


def substitute(count: int, seed: int, epoch: int, index: int, attempt: int) -> int:
    """Image that takes the place of an unreadable one at the given attempt (0, 1, 2, …)."""
    return int(counter_hash(_SUBSTITUTE, seed, epoch, index, attempt)[0] % np.uint64(count))


class Draw(NamedTuple):
    """What a micro-batch asks for."""

    step: int
    micro_batch: int
    epochs: NDArray[np.int64]  # [b]
    indices: NDArray[np.int64]  # [b]


@dataclass(frozen=True)
class Sampler:
    """The images of one rank: global_batch = micro_batch · accumulation · world_size.

    Raises:
        ValueError: the batch numbers do not multiply, or the rank lies outside the world.
    """

    count: int
    seed: int
    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int = 0
    world_size: int = 1
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.global_batch != self.micro_batch * self.accumulation * self.world_size:
            raise ValueError(
                f"global batch {self.global_batch} is not micro-batch {self.micro_batch} × accumulation "
                f"{self.accumulation} × {self.world_size} ranks"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} lies outside a world of {self.world_size}")

    def positions(self, step: int, micro_batch: int) -> range:
        """Stream positions of a micro-batch; those of all ranks at one micro-batch lie side by side."""
        start = step * self.global_batch + (micro_batch * self.world_size + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)

    def draw(self, step: int, micro_batch: int) -> Draw:
        """Epochs and image indices of a micro-batch, in order."""
        positions = np.asarray(self.positions(step, micro_batch), dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.count)
        indices = np.empty_like(offsets)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._order(epoch)[offsets[here]]
        return Draw(step, micro_batch, epochs, indices)

    def draws(self, start_step: int = 0) -> Iterator[Draw]:
        """Every micro-batch from a step on, without end."""
        step = start_step
        while True:
            for micro_batch in range(self.accumulation):
                yield self.draw(step, micro_batch)
            step += 1

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders.clear()  # the stream never goes back, and an order of 10⁶ images takes 8 MB
            self._orders[epoch] = permutation(self.count, self.seed, epoch)
        return self._orders[epoch]
