"""Sequences of different lengths without padding: all tokens concatenated, with the bounds that operators need.

Shapes: B sequences, N padded length, T real tokens in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unite_kernels import Spans


class cached_property:
    """A property computed at its first use, and then an attribute of the object.

    The one of functools holds a lock on Python 3.11, which torch.compile cannot trace.
    """

    def __init__(self, compute: Callable[[Any], Any]):
        self.compute, self.name = compute, compute.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        value = self.compute(instance)
        object.__setattr__(instance, self.name, value)
        return value


@dataclass(frozen=True)
class Packed:
    """Positions of the real tokens of a padded batch [B, N, …], computed on the device without waiting for it.

    Attributes:
        counts: [B] int64 on the device, tokens of each sequence, from 1 to `length`.
        total: T, their sum.
        longest: the largest of them.
        length: N.
    """

    counts: Tensor
    total: int
    longest: int
    length: int

    @classmethod
    def of(cls, counts: Tensor, *, length: int | None = None, device: torch.device | str = "cpu") -> Packed:
        """From counts [B] on the host; `length` N is the longest if None."""
        longest = int(counts.max())
        on_device = counts.to(device, torch.int64, non_blocking=True)
        return cls(on_device, int(counts.sum()), longest, longest if length is None else length)

    def repeat(self, times: int) -> Packed:
        """The same sequences `times` over, as a batch of times · B."""
        return Packed(self.counts.repeat(times), times * self.total, self.longest, self.length)

    @cached_property
    def _starts(self) -> Tensor:
        """[B + 1] int64, tokens before each sequence."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @cached_property
    def sequence(self) -> Tensor:
        """[T] int64, the sequence of each token."""
        rows = torch.arange(len(self.counts), device=self.counts.device)
        return rows.repeat_interleave(self.counts, output_size=self.total)

    @cached_property
    def position(self) -> Tensor:
        """[T] int64, the place of each token in its sequence."""
        return torch.arange(self.total, device=self.counts.device) - self._starts[self.sequence]

    @cached_property
    def spans(self) -> Spans:
        """The sequences as the operators take them."""
        return Spans(self._starts.int(), self.longest)

    @cached_property
    def mask(self) -> Tensor:
        """[B, N] bool, the real tokens."""
        return torch.arange(self.length, device=self.counts.device) < self.counts[:, None]

    @cached_property
    def _rows(self) -> Tensor:
        """[T] int64, row of each token in the flattened padding [B·N]."""
        return self.sequence * self.length + self.position

    def pack(self, padded: Tensor) -> Tensor:
        """[B, N, …] -> [T, …], the real tokens."""
        return padded.flatten(0, 1).index_select(0, self._rows)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, …] -> [B, N, …] with zeros behind each sequence."""
        padded = packed.new_zeros(len(self.counts) * self.length, *packed.shape[1:])
        return padded.index_copy(0, self._rows, packed).unflatten(0, (len(self.counts), self.length))

    def mean(self, packed: Tensor) -> Tensor:
        """[T, F] -> [T, F]: every token gets the mean of its sequence.

        By way of the padding: adding up into shared rows would take atomics, whose order changes from run to run.
        """
        return (self.pad(packed).sum(1) / self.counts[:, None]).index_select(0, self.sequence)

    @cached_property
    def pairs(self) -> Pairs:
        """The sequences [first tokens, second tokens], twice as long."""
        first = torch.arange(self.total, device=self.counts.device) + self._starts[self.sequence]
        order = torch.empty(2 * self.total, dtype=torch.int64, device=self.counts.device)
        order[first] = torch.arange(self.total, device=order.device)
        order[first + self.counts[self.sequence]] = torch.arange(self.total, 2 * self.total, device=order.device)
        return Pairs(Spans((2 * self._starts).int(), 2 * self.longest), order, first)


@dataclass(frozen=True)
class Pairs:
    """Sequences with two tokens in place of each one: all first tokens, then all second tokens.

    Attributes:
        spans: of the 2T tokens.
        order: [2T] int64; token k is row order[k] of all first tokens [T] followed by all second tokens [T].
        first: [T] int64, where the first tokens stand.
    """

    spans: Spans
    order: Tensor
    first: Tensor
