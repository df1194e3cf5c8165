"""The gradients' average over the ranks, overlapped with the last backward of an optimizer step.

A step's backward passes add gradients locally; they become final only in the last one, mostly in the reverse order of
the forward. So gradients are sent in windows, each as soon as its last parameter is final, in the same order on every
rank (Li et al. 2020, arXiv 2006.15704, for whole gradients).
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

# Windows on their way at once: one is packed while the other travels.
IN_FLIGHT = 2


class Window(NamedTuple):
    """The piece of a flat group that one collective reduces.

    Attributes:
        group: index of the flat group.
        offset: of the window in a rank's slice of it, elements.
        length: of a part, elements.
        parts: (parameter, start, length) pieces that a part is made of; a part for each rank, or one for all. The
            parameter is an index in the group, its number of parameters where the slice is padding.
    """

    group: int
    offset: int
    length: int
    parts: list[list[tuple[int, int, int]]]


def spans(partition: int, parts: int, bucket: int) -> list[tuple[int, int]]:
    """(offset, length) of the windows of a slice; all parts of one are at most a bucket, but at least one element."""
    width = max(bucket // parts, 1)
    return [(low, min(width, partition - low)) for low in range(0, partition, width)]


def group_windows(group: int, sizes: Sequence[int], partition: int, parts: int, bucket: int) -> list[Window]:
    """A flat group cut into windows, each with the same stretch of every rank's slice, so that all links work for each.

    Args:
        group: its index.
        sizes: elements of its parameters in flat order.
        partition: elements of a rank's slice; `parts` of them hold the group, the last padded.
        parts: ranks that get a slice, 1 where all get everything.
        bucket: elements of a window's buffer.
    """
    padded = [*sizes, parts * partition - sum(sizes)]
    begins = list(accumulate(padded, initial=0))
    windows = []
    for low, length in spans(partition, parts, bucket):
        pieces = []
        for first in range(low, parts * partition, partition):
            row, at = [], first
            while at < first + length:
                index = bisect_right(begins, at) - 1
                end = min(begins[index + 1], first + length)
                row.append((index, at - begins[index], end - at))
                at = end
            pieces.append(row)
        windows.append(Window(group, low, length, pieces))
    return windows


def in_order_of_sending(
    sizes: Sequence[Sequence[int]],
    partitions: Sequence[int] | None,
    finals: Sequence[Sequence[int]],
    *,
    ranks: int,
    bucket: int,
) -> tuple[list[Window], list[set[int]]]:
    """The windows of all groups, in the order in which their gradients become final, and the parameters of each.

    Args:
        sizes: elements of each group's parameters in flat order.
        partitions, finals, ranks, bucket: as in `GradientMean`.
    """
    windows = []
    for group, elements in enumerate(sizes):
        partition = sum(elements) if partitions is None else partitions[group]
        windows += group_windows(group, elements, partition, 1 if partitions is None else ranks, bucket)
    needs = [
        {index for part in window.parts for index, _, _ in part if index < len(sizes[window.group])}
        for window in windows
    ]
    last = [max((finals[w.group][index] for index in needed), default=-math.inf) for w, needed in zip(windows, needs)]
    order = sorted(range(len(windows)), key=last.__getitem__)
    return [windows[number] for number in order], [needs[number] for number in order]


class GradientMean:
    """The mean over the ranks of gradients in flat groups, each window sent once its gradients are final.

    With a slice a rank (ZeRO 1 and 2) by reduce-scatter: a rank sends (ranks − 1) / ranks of the group, half of an
    all-reduce (Thakur et al. 2005), if the back end reduces by scattering, as NCCL does; gloo all-reduces inside.
    Whole gradients (ZeRO 0) are all-reduced and written back.

    Args:
        groups: parameters of each flat group in flat order.
        partitions: elements of a rank's slice of each group; None for whole gradients.
        finals: for each of these parameters when it is final in the backward, smaller is earlier; where that is wrong,
            windows wait longer than they need to.
        ranks: that average.
        bucket: elements of a window's buffer.
        like: of the dtype and device to reduce in.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        partitions: Sequence[int] | None,
        finals: Sequence[Sequence[int]],
        *,
        ranks: int,
        bucket: int,
        like: Tensor,
    ):
        self._groups, self._partitions, self._ranks, self._like = groups, partitions, ranks, like
        sizes = [[parameter.numel() for parameter in group] for group in groups]
        self._windows, self._needs = in_order_of_sending(sizes, partitions, finals, ranks=ranks, bucket=bucket)
        widest = max((len(window.parts) * window.length for window in self._windows), default=0)
        self._buffer_shape = min(IN_FLIGHT, len(self._windows)), widest
        # (group, parameter) -> the windows that wait for it.
        self._waiting: dict[tuple[int, int], list[int]] = {}
        for number, (window, needs) in enumerate(zip(self._windows, self._needs)):
            for index in needs:
                self._waiting.setdefault((window.group, index), []).append(number)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, loss: Tensor) -> None:
        """Called before the backward of `loss`, the last of a step: gradients that it does not reach are final now."""
        reached = leaves(loss)
        self._missing = [len(needs) for needs in self._needs]
        self._next = 0
        self._buffers = self._like.new_empty(self._buffer_shape)
        self._flying: list[tuple[dist.Work, int] | None] = [None] * len(self._buffers)
        self._means = [self._like.new_empty(size) for size in self._partitions or ()]
        self._padding = self._like.new_zeros(1)
        for group, parameters in enumerate(self._groups):
            for index, parameter in enumerate(parameters):
                if id(parameter) in reached:
                    hook = functools.partial(self._final, group, index)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
                else:
                    self._count(group, index)
        self._send()

    def finish(self) -> list[Tensor]:
        """Send what is left and wait for all of it.

        Returns:
            For each group this rank's slice [partition] of the mean; nothing where gradients are whole, which then
            are the mean themselves.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._next < len(self._windows):
            self._launch()
        for place in range(len(self._flying)):
            self._land(place)
        means, self._means = self._means, []
        del self._buffers, self._padding
        if means:
            torch._foreach_div_(means, self._ranks)
        return means

    def _final(self, group: int, index: int, _: Tensor) -> None:
        self._count(group, index)
        self._send()

    def _count(self, group: int, index: int) -> None:
        for number in self._waiting.get((group, index), ()):
            self._missing[number] -= 1

    def _send(self) -> None:
        """Launch the windows that are complete, in order, up to the first that is not."""
        while self._next < len(self._windows) and not self._missing[self._next]:
            self._launch()

    def _launch(self) -> None:
        place = self._next % len(self._flying)
        self._land(place)
        window, group = self._windows[self._next], self._groups[self._windows[self._next].group]
        buffer = self._buffers[place][: len(window.parts) * window.length]
        torch.cat([self._piece(group, *piece) for part in window.parts for piece in part], out=buffer)
        if self._partitions is None:
            work = dist.all_reduce(buffer, async_op=True)
        else:
            mean = self._means[window.group][window.offset : window.offset + window.length]
            work = dist.reduce_scatter_tensor(mean, buffer, async_op=True)
        self._flying[place] = work, self._next
        self._next += 1

    def _piece(self, group: Sequence[nn.Parameter], index: int, start: int, length: int) -> Tensor:
        gradient = group[index].grad if index < len(group) else None
        if gradient is None:
            return self._padding.expand(length)
        return gradient.detach().reshape(-1).narrow(0, start, length)

    def _land(self, place: int) -> None:
        """Wait for the window in this buffer (on CUDA the device waits, not the host); whole gradients go back."""
        if self._flying[place] is None:
            return
        work, number = self._flying[place]
        self._flying[place] = None
        work.wait()
        if self._partitions is not None:
            return
        window, at = self._windows[number], 0
        group = self._groups[window.group]
        for index, start, length in window.parts[0]:
            if group[index].grad is None:
                group[index].grad = torch.zeros_like(group[index])
            target = group[index].grad.view(-1).narrow(0, start, length)
            torch.div(self._buffers[place][at : at + length], self._ranks, out=target)
            at += length


def leaves(loss: Tensor) -> set[int]:
    """id() of every leaf tensor that a backward of `loss` adds a gradient to."""
    found: set[int] = set()
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(after for after, _ in node.next_functions)
    return found
