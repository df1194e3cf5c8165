"""Which piece of which parameter this rank's optimizer updates, and how whole tensors are reassembled.

Plain PyTorch and ZeRO 0 update whole parameters. ZeRO 1 and 2 concatenate a parameter group into one flat tensor and
give each rank an equal slice of it; ZeRO 3 cuts every parameter into equal pieces. `Layout` describes all three, so
that checkpoints, EMA and Muon need not distinguish them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """The piece of one parameter in one master tensor of this rank; `length` 0 where the rank holds none of it.

    `master.flatten()[offset : offset + length]` is `parameter.flatten()[start : start + length]`.
    """

    name: str
    shape: torch.Size
    master: int
    offset: int
    start: int
    length: int

    def put(self, held: Tensor, whole: Tensor) -> None:
        """Copy this rank's piece from `held`, flat and laid out as its master, to its place in the flat `whole`."""
        whole.narrow(0, self.start, self.length).copy_(held.narrow(0, self.offset, self.length))


class Layout:
    """Masters of this rank and the fragments of every trained parameter in them.

    Args:
        masters: float32 tensors that the optimizer updates on this rank.
        fragments: one for every trained parameter, in the same order on every rank.
        sharded: whether other ranks hold the rest; gathering is then collective.
    """

    def __init__(self, masters: list[Tensor], fragments: list[Fragment], sharded: bool):
        self.masters, self.fragments, self.sharded = masters, fragments, sharded

    @classmethod
    def whole(cls, parameters: Mapping[str, Tensor]) -> Layout:
        """Every parameter is a master of its own."""
        fragments = [
            Fragment(name, parameter.shape, index, 0, 0, parameter.numel())
            for index, (name, parameter) in enumerate(parameters.items())
        ]
        return cls(list(parameters.values()), fragments, sharded=False)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> whole shape of every trained parameter."""
        return {fragment.name: fragment.shape for fragment in self.fragments}

    def gather(self, of: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time: collective where sharded.

        Args:
            of: master -> the tensor of the same size to gather (itself, its EMA, its momentum …), None to leave the
                master's parameters out; must answer alike on every rank.

        Yields:
            (parameter name, new tensor of the parameter's shape).
        """
        for fragment in self.fragments:
            local = of(self.masters[fragment.master])
            if local is None:
                continue
            local = local.detach().reshape(-1)
            if not self.sharded:
                yield fragment.name, local.view(fragment.shape).clone()
                continue
            # Adding zeros is exact, needs no equal sizes, and works alike on gloo and NCCL.
            full = torch.zeros(fragment.shape.numel(), dtype=local.dtype, device=local.device)
            fragment.put(local, full)
            dist.all_reduce(full)
            yield fragment.name, full.view(fragment.shape)

    def scatter(self, values: Callable[[str], Tensor], of: Callable[[Tensor], Tensor | None]) -> None:
        """Copy this rank's pieces of whole tensors into `of(master)`; no communication.

        Args:
            values: parameter name -> whole tensor.
            of: as in `gather`.
        """
        for fragment in self.fragments:
            local = of(self.masters[fragment.master])
            if local is None or not fragment.length:
                continue
            source = values(fragment.name).reshape(-1).narrow(0, fragment.start, fragment.length)
            local.detach().view(-1).narrow(0, fragment.offset, fragment.length).copy_(source)


def flat_fragments(parameters: Mapping[str, torch.Size], master: int, partition: int, rank: int) -> list[Fragment]:
    """Fragments of a group that is concatenated in order and cut into equal partitions (ZeRO 1 and 2)."""
    fragments, begin = [], 0
    for name, shape in parameters.items():
        low, high = max(begin, rank * partition), min(begin + shape.numel(), (rank + 1) * partition)
        held = (low - rank * partition, low - begin, high - low) if low < high else (0, 0, 0)
        fragments.append(Fragment(name, shape, master, *held))
        begin += shape.numel()
    return fragments


class MatrixExchange:
    """Applies a function of whole matrices to a flat group that is cut into equal partitions.

    Each matrix is processed by exactly one rank: by its holder if one partition contains it, else by the least loaded
    of the ranks that hold a part. Only those straddling matrices (at most ranks − 1 of them if matrices are smaller
    than a partition) are communicated: their pieces to the owner, the result's pieces back.

    Args:
        shapes: [rows, columns] of the group's matrices in flat order.
        partition: elements of a rank's slice.
        rank, size: of the process group that shares the flat group.
        load: operations per rank for other groups' matrices, zero if None; this group's are added in place.
    """

    def __init__(
        self, shapes: list[tuple[int, int]], partition: int, rank: int, size: int, load: list[int] | None = None
    ):
        self.shapes, self.partition, self.rank, self.size = shapes, partition, rank, size
        self._begins = list(accumulate((rows * columns for rows, columns in shapes), initial=0))
        # Per matrix: rank -> the range of the flattened matrix that it holds.
        self._pieces: list[dict[int, tuple[int, int]]] = []
        for begin, end in pairwise(self._begins):
            holders = range(begin // partition, (end - 1) // partition + 1)
            self._pieces.append(
                {r: (max(0, r * partition - begin), min(end, (r + 1) * partition) - begin) for r in holders}
            )
        self.owners = self._assign([0] * size if load is None else load)
        self.straddling = [i for i, pieces in enumerate(self._pieces) if len(pieces) > 1]

    def _assign(self, load: list[int]) -> list[int]:
        owners = [next(iter(pieces)) if len(pieces) == 1 else -1 for pieces in self._pieces]
        # A Newton-Schulz step costs about rows · columns · min(rows, columns) multiply-adds.
        costs = [rows * columns * min(rows, columns) for rows, columns in self.shapes]
        for owner, cost in zip(owners, costs):
            if owner >= 0:
                load[owner] += cost
        for index in sorted(range(len(owners)), key=lambda i: -costs[i]):
            if owners[index] < 0:
                owners[index] = min(self._pieces[index], key=lambda r: load[r])
                load[owners[index]] += costs[index]
        return owners

    def apply(self, flat: Tensor, function: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        """`function` of every matrix of the group, this rank's slice of it.

        Args:
            flat: [partition] this rank's slice.
            function: matrices [rows, columns] -> matrices of the same shapes.

        Returns:
            [partition], zero where the slice is padding. Collective where a matrix straddles ranks.
        """
        mine = [i for i, owner in enumerate(self.owners) if owner == self.rank]
        received = self._exchange(flat, lambda index, _: self._held(index, flat))
        matrices = [self._assemble(index, flat, received) for index in mine]
        results = {index: result.reshape(-1) for index, result in zip(mine, function(matrices))} if mine else {}
        returned = self._exchange(flat, lambda i, holder: results[i][slice(*self._pieces[i][holder])], back=True)
        out = torch.zeros_like(flat)
        for index, pieces in enumerate(self._pieces):
            if self.rank in pieces:
                whole = results.get(index)
                part = returned[index, self.rank] if whole is None else whole[slice(*pieces[self.rank])]
                self._held(index, out).copy_(part)
        return out

    def _held(self, index: int, flat: Tensor) -> Tensor:
        low, high = self._pieces[index][self.rank]
        at = self._begins[index] + low - self.rank * self.partition
        return flat[at : at + high - low]

    def _assemble(self, index: int, flat: Tensor, received: dict[tuple[int, int], Tensor]) -> Tensor:
        parts = [self._held(index, flat) if r == self.rank else received[index, r] for r in self._pieces[index]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shapes[index])

    def _exchange(
        self, like: Tensor, piece: Callable[[int, int], Tensor], *, back: bool = False
    ) -> dict[tuple[int, int], Tensor]:
        """Pieces of straddling matrices from their holders to their owners, or back; keyed (matrix, holder)."""
        if not self.straddling:
            return {}
        outgoing: list[list[Tensor]] = [[] for _ in range(self.size)]
        incoming: list[list[tuple[int, int]]] = [[] for _ in range(self.size)]
        for index in self.straddling:
            for holder in self._pieces[index]:
                source, target = (self.owners[index], holder) if back else (holder, self.owners[index])
                if source == target:
                    continue
                if source == self.rank:
                    outgoing[target].append(piece(index, holder))
                if target == self.rank:
                    incoming[source].append((index, holder))
        lengths = [[high - low for low, high in (self._pieces[i][h] for i, h in keys)] for keys in incoming]
        received = like.new_empty(sum(map(sum, lengths)))
        sent = torch.cat([part for parts in outgoing for part in parts] or [like.new_empty(0)])
        to_each = [sum(part.numel() for part in parts) for parts in outgoing]
        dist.all_to_all_single(received, sent, [sum(row) for row in lengths], to_each)
        keys = [key for row in incoming for key in row]
        return dict(zip(keys, received.split([length for row in lengths for length in row])))
