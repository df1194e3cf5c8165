"""When gradients become final in a step's last backward, and when the next forward reads which updated weights.

So much of their communication is hidden.
"""

from __future__ import annotations

import functools
import re
from itertools import accumulate
from typing import NamedTuple

from unite_fast.analysis.update import Gathered, gathered_weights, network_of, reads, slice_elements
from unite_fast.config import Config, Sizes
from unite_fast.engine.deepspeed_backend import bucket_elements
from unite_fast.engine.optim import in_stages, parameter_groups
from unite_fast.engine.reduction import in_order_of_sending

# Parameters whose products have a row for each sample, not for each of its tokens: next to no time.
A_SAMPLE = re.compile(r"modulation|\btime\.|\blabel\.")


class Departure(NamedTuple):
    """A window of gradients.

    Attributes:
        after: the share of the last backward that has run when the last of its gradients is final.
        elements: of the whole window.
    """

    after: float
    elements: int


@functools.cache
def departures(model: Sizes, kind: str, *, ranks: int, stage: int, phase: str = "flow") -> tuple[Departure, ...]:
    """The windows in which the engine reduces gradients under ZeRO 0 to 2, in the order in which it sends them.

    A backward is taken to go through the parameters last to first, in a time proportional to their number, but for
    those that act on samples and not on tokens. What the last backward does not read is final when it begins.

    Args:
        kind: "muon" or "adamw".
        phase: of the last backward: "flow", or "reconstruct" where the flow sends its gradient into pass one.
    """
    built = network_of(model)
    parameters = dict(built.named_parameters())
    sizes = {name: parameters[name].numel() for name in built.reading_order() if parameters[name].requires_grad}
    work = {n: size if reads(model, phase, n) and not A_SAMPLE.search(n) else 0 for n, size in sizes.items()}
    done = dict(zip(reversed(sizes), accumulate(reversed(work.values())), strict=True))
    after = {name: done[name] / sum(work.values()) if reads(model, phase, name) else 0.0 for name in sizes}
    groups = list(parameter_groups(built, kind).items())
    if stage:
        groups = in_stages(groups)
    flat = [list(group) for _, group in groups]
    partitions = [slice_elements(sum(sizes[name] for name in group), ranks) for group in flat]
    names = {name: place for place, name in enumerate(sizes)}
    windows, needs = in_order_of_sending(
        [[sizes[name] for name in group] for group in flat],
        partitions if stage else None,
        [[-names[name] for name in group] for group in flat],
        ranks=ranks,
        bucket=bucket_elements(ranks, sum(sizes.values())),
    )
    return tuple(
        Departure(
            max((after[flat[window.group][index]] for index in needed), default=0.0),
            window.length * len(window.parts),
        )
        for window, needed in zip(windows, needs, strict=True)
    )


class Arrival(NamedTuple):
    """Updated weights on their way to all ranks.

    Attributes:
        gathered: what carries them.
        part: of the reconstruction pass, "tokenize" or "decode", that reads one of them first.
        before: the share of this part's forward that has run by then.
    """

    gathered: Gathered
    part: str
    before: float


def arrivals(config: Config, *, ranks: int) -> list[Arrival]:
    """The updated weights of ZeRO 1 and 2 in the order of sending, with when the next forward on GPUs reads them.

    A forward is taken to go through the parameters first to last, in times as in `departures`. Weights that pass one
    does not read are taken to be needed when its forward ends; under train.compile all are when it begins.
    """
    built = network_of(config.model)
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    reached: dict[str, tuple[str, float]] = {}
    for part in ("tokenize", "decode"):
        names = [
            name
            for name in built.reading_order()
            if reads(config.model, "reconstruct", name) and name.startswith("decoder.") == (part == "decode")
        ]
        work = [0 if A_SAMPLE.search(name) else sizes[name] for name in names]
        for name, done in zip(names, accumulate(work[:-1], initial=0), strict=True):
            reached[name] = part, done / sum(work)
    found = []
    for gathered in gathered_weights(config, ranks=ranks):
        read = [reached[name] for name in gathered.names if name in reached]
        part, before = min(read, key=lambda at: (at[0] == "decode", at[1]), default=("decode", 1.0))
        if config.train.compile:
            part, before = "tokenize", 0.0
        found.append(Arrival(gathered, part, before))
    return found
