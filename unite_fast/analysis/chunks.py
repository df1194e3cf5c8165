"""How many flow draws share one forward and backward, where `objective.draws_per_chunk` is auto.

Every chunk reads the weights, launches the kernels and adds up the weights' gradients once more, so few large chunks
are cheaper; their activations are what limits them. The chunk changes no random number, only rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from unite_fast.analysis.extent import Extent
from unite_fast.analysis.memory import predict
from unite_fast.config import Config
from unite_fast.engine.backend import autocast_dtype


def chunk_sizes(draws: int) -> list[int]:
    """Ascending sizes of chunks that share S draws evenly: ⌈S/p⌉ for p passes.

    A size between two of them needs as many passes as the smaller one, and more memory.
    """
    return sorted({-(-draws // passes) for passes in range(1, draws + 1)})


def with_chunk(config: Config, chunk: int) -> Config:
    """The run with that many draws a chunk."""
    objective = config.objective.model_copy(update={"draws_per_chunk": chunk})
    return config.model_copy(update={"objective": objective})


def resolve_chunk(
    config: Config,
    extent: Extent,
    *,
    device: Literal["cuda", "cpu"],
    largest: Callable[[list[int]], int | None] = lambda sizes: None,
) -> Config:
    """The run with a number of draws a chunk: the given one, or what `auto` stands for.

    That is the neutral chunk, the largest that is predicted to need no more memory than single draws do: pass one,
    whose activations are gone when the draws run, has needed as much already, beside the same gradients from a step's
    second micro-batch on. Where its graph waits for the flow's gradient instead (stop_gradient off), every further draw
    costs memory, and the neutral chunk is one draw.

    Args:
        config: the run.
        extent: of the largest micro-batch that could come.
        device: kind of the device that trains.
        largest: of ascending sizes beyond the neutral one, the largest that fits into memory, to be taken in its place;
            None if none does.
    """
    if isinstance(config.objective.draws_per_chunk, int):
        return config
    dtype = "fp32" if autocast_dtype(config, torch.device(device)) is None else "bf16"
    sizes = chunk_sizes(config.objective.flow_draws)
    needed = [predict(with_chunk(config, size), extent=extent, dtype=dtype, device=device).passes for size in sizes]
    neutral = [size for size, passes in zip(sizes, needed, strict=True) if passes <= needed[0]]
    larger = sizes[len(neutral) :]
    return with_chunk(config, (largest(larger) if larger else None) or neutral[-1])


def neutral_fits(config: Config, extent: Extent, room: float, *, ranks: int = 1, stage: int | None = None) -> bool:
    """Whether a micro-batch on a GPU is predicted to fit into `room`, bytes, with its neutral chunk.

    Args:
        config, extent: as in `resolve_chunk`.
        ranks, stage: as in `predict`.
    """
    run = resolve_chunk(config, extent, device="cuda")
    return predict(run, extent=extent, ranks=ranks, stage=stage).peak <= room


def chunk_in_room(config: Config, extent: Extent, room: float, *, ranks: int = 1, stage: int | None = None) -> Config:
    """`resolve_chunk` on a GPU by prediction: the largest chunk whose predicted peak fits into `room`, bytes.

    Args:
        config, extent: as there.
        ranks, stage: as in `predict`.
    """

    def largest(sizes: list[int]) -> int | None:
        def peak(size: int) -> int:
            return predict(with_chunk(config, size), extent=extent, ranks=ranks, stage=stage).peak

        return next((size for size in reversed(sizes) if peak(size) <= room), None)

    return resolve_chunk(config, extent, device="cuda", largest=largest)
