"""The all-gather of ZeRO 1's and 2's updated weights, overlapped with the next forward, in bfloat16 where possible.

Each rank updates a slice of every flat group; the next forward reads whole weights in a known order. So all groups are
sent in that order when the update ends, and a module waits only for those that it reads. A matrix that the passes read
only as autocast's bfloat16 copy is sent as that copy: half the bytes, and the same products bit for bit. The
optimizer's weights, the averages and the checkpoints stay float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from unite_fast.engine.sharding import Fragment

# Modules whose parameters are read in their own forward, which a hook can therefore hold back.
HELD_BACK = (nn.Linear, nn.Embedding)


class FlatGroup(NamedTuple):
    """A flat group of ZeRO 1 and 2.

    Attributes:
        whole: [ranks · partition] float32, of which the model's parameters are views.
        own: [partition] float32, this rank's slice, which the optimizer updates.
        fragments: what of each of its parameters is in that slice.
    """

    whole: Tensor
    own: Tensor
    fragments: Sequence[Fragment]


class Arrival(NamedTuple):
    """A flat group that is on its way.

    Attributes:
        waits: each waits for a collective.
        copies: (to, from) of what is copied then, in this order; empty where the group arrives in its place.
    """

    waits: list[Callable[[], object]]
    copies: list[tuple[Tensor, Tensor]]


class WeightGather:
    """Gathers the ranks' updated slices before a forward reads them.

    Args:
        model: reads the weights; a HELD_BACK module's matrices are read only in that module's forward.
        groups: in the order of reading.
        rounded: names of the parameters that are sent as bfloat16, together with their whole group; the other
            parameters of such a group are also sent in float32.
        lazily: False where hooks cannot be used, as in a compiled forward, which then waits for all groups.
        rank, ranks: of this process.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[FlatGroup],
        *,
        rounded: Collection[str],
        lazily: bool,
        rank: int,
        ranks: int,
    ):
        self._groups, self._rank, self._ranks = groups, rank, ranks
        self._parameters = dict(model.named_parameters())
        names = [{fragment.name for fragment in group.fragments} for group in groups]
        self._bf16 = [index for index, group in enumerate(names) if not group.isdisjoint(rounded)]
        # (slice, its fragment) of the parameters that bfloat16 groups hold and that are also sent in float32.
        self._float32 = [
            (groups[index].own, fragment)
            for index in self._bf16
            for fragment in groups[index].fragments
            if fragment.name not in rounded
        ]
        everything = set(range(len(groups)))
        # What no hook waits for, every forward waits for at once: it is sent first.
        self._readers, unheld = readers(model, names) if lazily else ({}, everything)
        self._unheld = sorted(unheld)
        self._order = self._unheld + sorted(everything - unheld)
        self._flying: dict[int, Arrival] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self) -> None:
        """Start sending this rank's slices and receiving the others', for the next forward. Collective."""
        self._send(bf16=self._bf16)
        if self._flying:
            for module, indices in self._readers.items():
                hook = functools.partial(self._before, indices)
                self._hooks.append(module.register_forward_pre_hook(hook))

    def publish(self) -> None:
        """Bring float32 values together, and wait for them. Collective."""
        self._send(bf16=())
        self.finish()

    def before_forward(self) -> None:
        """Wait for what no hook waits for. On CUDA the device waits, not the host."""
        self._wait(self._unheld)

    def finish(self) -> None:
        """Wait for everything."""
        self._wait(list(self._flying))
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, indices: Sequence[int], *_: object) -> None:
        """The hook on a module that reads these groups."""
        self._wait(indices)
        if not self._flying:  # no hook has anything to wait for, and each call of one costs the host
            self.finish()

    @torch.no_grad()
    def _wait(self, indices: Sequence[int]) -> None:
        for index in indices:
            if index not in self._flying:
                continue
            waits, copies = self._flying.pop(index)
            for wait in waits:
                wait()
            for target, source in copies:
                target.copy_(source)

    @torch.no_grad()
    def _send(self, bf16: Collection[int]) -> None:
        """Send all groups, those of these indices as bfloat16."""
        self.finish()
        if self._ranks == 1:
            for whole, own, _ in self._groups:
                whole.copy_(own)
            return
        float32, values = self._send_float32() if bf16 else ([], {})
        for index in self._order:
            whole, own, fragments = self._groups[index]
            target = torch.empty_like(whole, dtype=torch.bfloat16) if index in bf16 else whole
            mine = target[self._rank * own.numel() : (self._rank + 1) * own.numel()]
            mine.copy_(own)
            waits, copies = [dist.all_gather_into_tensor(target, mine, async_op=True).wait], []
            if index in bf16:
                waits += float32
                names = [fragment.name for fragment in fragments if fragment.name in values]
                copies = [(whole, target), *((self._parameters[name], values[name]) for name in names)]
            self._flying[index] = Arrival(waits, copies)

    def _send_float32(self) -> tuple[list[Callable[[], object]], dict[str, Tensor]]:
        """Send the float32 parameters of bfloat16 groups, by an all-reduce of pieces padded with zeros, which is exact.

        They lie in only a few ranks' slices, so a gather, of equal shares, would send far more.

        Returns:
            What waits for them, and name -> value.
        """
        if not self._float32:
            return [], {}
        sizes = [fragment.shape.numel() for _, fragment in self._float32]
        values = self._float32[0][0].new_zeros(sum(sizes))
        found = {}
        for (own, fragment), value in zip(self._float32, values.split(sizes), strict=True):
            fragment.put(own, value)
            found[fragment.name] = value.view(fragment.shape)
        # Cached, because all bfloat16 groups call it and only the first needs to wait.
        return [functools.cache(dist.all_reduce(values, async_op=True).wait)], found


def readers(model: nn.Module, groups: Sequence[Collection[str]]) -> tuple[dict[nn.Module, list[int]], set[int]]:
    """The modules before whose forward each group of parameters must have arrived.

    An element of an nn.ModuleList stands for all modules inside it, because a hook costs the host some microseconds.

    Args:
        model: has the parameters.
        groups: the names of each group's.

    Returns:
        (module -> indices of the groups that it reads, the groups that others than HELD_BACK modules read, too).
    """
    modules = dict(model.named_modules())
    held: dict[nn.Module, set[int]] = {}
    elsewhere: set[int] = set()
    for index, names in enumerate(groups):
        for name in sorted(names):
            path = name.split(".")[:-1]
            if not isinstance(modules[".".join(path)], HELD_BACK):
                elsewhere.add(index)
                continue
            prefixes = [".".join(path[:end]) for end in range(len(path) + 1)]
            elements = (inner for outer, inner in pairwise(prefixes) if isinstance(modules[outer], nn.ModuleList))
            held.setdefault(modules[next(elements, prefixes[-1])], set()).add(index)
    waiting = {module: sorted(indices - elsewhere) for module, indices in held.items()}
    return {module: indices for module, indices in waiting.items() if indices}, elsewhere
