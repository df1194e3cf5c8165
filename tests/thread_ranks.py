"""Ranks as threads of one process, whose collectives are as unkind as GPUs' may be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor


class Late:
    """A collective that is through only when somebody waits for it, and that what it sends must not change before."""

    def __init__(self, target: Tensor, result: Tensor, source: Tensor):
        self._target, self._result, self._source, self._sent = target, result, source, source.clone()
        if target.data_ptr() != source.data_ptr():
            target.fill_(torch.nan)

    def wait(self) -> None:
        assert torch.equal(self._source, self._sent), "overwritten while it was on its way"
        self._target.copy_(self._result)


class Ranks:
    """So many of them. All must ask for the same collectives in the same order.

    Attributes:
        calls: collectives so far.
    """

    def __init__(self, size: int):
        self.size, self.calls = size, 0
        self._local, self._barrier = threading.local(), threading.Barrier(size, timeout=20)
        self._sent: list[Any] = [None] * size

    @property
    def rank(self) -> int:
        return self._local.rank

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch.distributed be these."""
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
            monkeypatch.setattr(dist, name, getattr(self, name))

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What a function of the rank returns on each; an error of one is raised."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            raise error
        return results

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Late | None:
        return self._done(tensor, sum(self._all("all_reduce", tensor.clone())), tensor, async_op)

    def all_gather_into_tensor(self, output: Tensor, source: Tensor, async_op: bool = False) -> Late | None:
        if output.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            assert source.data_ptr() == output.chunk(self.size)[self.rank].data_ptr(), "NCCL takes it in its place"
        result = torch.cat(self._all("all_gather", source.clone()))
        return self._done(output, result, source.clone(), async_op)

    def reduce_scatter_tensor(self, output: Tensor, source: Tensor, async_op: bool = False) -> Late | None:
        assert source.numel() == self.size * output.numel()
        result = sum(self._all("reduce_scatter", source.clone())).chunk(self.size)[self.rank]
        return self._done(output, result, source, async_op)

    def all_to_all_single(
        self, output: Tensor, source: Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        pieces = [sent[self.rank] for sent in self._all("all_to_all", list(source.clone().split(input_splits)))]
        assert [piece.numel() for piece in pieces] == output_splits
        output.copy_(torch.cat(pieces))

    def _all(self, kind: str, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        self._sent[self.rank] = kind, value
        self._barrier.wait()
        sent = list(self._sent)
        self._barrier.wait()
        self.calls += self.rank == 0
        assert {other for other, _ in sent} == {kind}, sent
        return [value for _, value in sent]

    @staticmethod
    def _done(target: Tensor, result: Tensor, source: Tensor, async_op: bool) -> Late | None:
        late = Late(target, result, source)
        if async_op:
            return late
        late.wait()
        return None
