"""The all-gather of ZeRO 1's and 2's updated weights, overlapped with the next forward, in bfloat16 where possible.

Each rank updates a slice of every flat group; the next forward reads whole weights in a known order. So all groups are
sent in that order when the update ends, and a module waits only for those that it reads. A matrix that the passes read
only as autocast's bfloat16 copy is sent as that copy: half the bytes, and the same products bit for bit. The
optimizer's weights, the averages and the checkpoints stay float32.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
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


class WeightGather:
    """Gathers the ranks' updated slices before a forward reads them.

    Args:
        model: reads the weights; a HELD_BACK module's matrices are read only in that module's forward.
        groups: in reverse order of reading, those that a forward reads first are last.
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
        self._narrow = [ranks > 1 and not group.isdisjoint(rounded) for group in names]
        # What nothing holds back is waited for first, and then what is read first.
        self._readers, elsewhere = readers(model, names)
        if not lazily:
            self._readers, elsewhere = {}, set(range(len(groups)))
        self._order = sorted(reversed(range(len(groups))), key=lambda index: index not in elsewhere)
        self._at_once = [index for index in self._order if index in elsewhere]
        self._exact = [
            (group, fragment)
            for group, narrow in zip(groups, self._narrow, strict=True)
            for fragment in group.fragments
            if narrow and fragment.name not in rounded
        ]
        self._exact_work: dist.Work | None = None
        self._exact_values: dict[str, Tensor] = {}
        self._flying: dict[int, tuple[dist.Work, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self) -> None:
        """Start sending this rank's slices and receiving the others', for the next forward. Collective."""
        self._send(self._narrow)
        if not self._flying:
            return
        for module, indices in self._readers.items():
            hook = functools.partial(self._before, indices)
            self._handles.append(module.register_forward_pre_hook(hook))

    def publish(self) -> None:
        """Bring float32 values together, and wait for them. Collective."""
        self._send([False] * len(self._groups))
        self.finish()

    def before_forward(self) -> None:
        """Wait for what no hook waits for. On CUDA the device waits, not the host."""
        for index in self._at_once:
            self._settle(index)

    def finish(self) -> None:
        """Wait for everything."""
        for index in list(self._flying):
            self._settle(index)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, indices: Sequence[int], *_: object) -> None:
        for index in indices:
            self._settle(index)
        if not self._flying:
            self.finish()

    @torch.no_grad()
    def _send(self, narrow: Sequence[bool]) -> None:
        self.finish()
        if self._ranks == 1:
            for whole, own, _ in self._groups:
                whole.copy_(own)
            return
        if any(narrow):
            self._send_exact()
        for index in self._order:
            whole, own, _ = self._groups[index]
            target = torch.empty_like(whole, dtype=torch.bfloat16) if narrow[index] else whole
            mine = target.narrow(0, self._rank * own.numel(), own.numel())
            mine.copy_(own)
            self._flying[index] = dist.all_gather_into_tensor(target, mine, async_op=True), target

    @torch.no_grad()
    def _settle(self, index: int) -> None:
        if index not in self._flying:
            return
        work, target = self._flying.pop(index)
        work.wait()
        group = self._groups[index]
        if target is group.whole:
            return
        group.whole.copy_(target)
        if self._exact_work is not None:
            self._exact_work.wait()
            self._exact_work = None
        for fragment in group.fragments:
            if fragment.name in self._exact_values:
                self._parameters[fragment.name].copy_(self._exact_values.pop(fragment.name))

    def _send_exact(self) -> None:
        """The float32 parameters in bfloat16 groups, by an all-reduce of each rank's pieces padded with zeros: exact.

        They lie in only a few ranks' slices, so a gather, of equal shares, would send far more.
        """
        if not self._exact:
            return
        sizes = [fragment.shape.numel() for _, fragment in self._exact]
        values = self._exact[0][0].own.new_zeros(sum(sizes))
        for (group, fragment), value in zip(self._exact, values.split(sizes), strict=True):
            fragment.put(group.own, value)
            self._exact_values[fragment.name] = value.view(fragment.shape)
        self._exact_work = dist.all_reduce(values, async_op=True)


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
