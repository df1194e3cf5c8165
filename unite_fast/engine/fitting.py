"""The micro-batch and the flow chunk that fit into memory, measured before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unite_fast.analysis.chunks import resolve_chunk, with_chunk
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.planning import USABLE_MEMORY
from unite_fast.config import Config
from unite_fast.engine.backend import AutocastForward, autocast_dtype
from unite_fast.engine.batch import (
    Batch,
    bounded_on_cpu,
    find_largest,
    find_micro_batch,
    micro_batch_candidates,
    resolve_batch,
)
from unite_fast.engine.fp8 import use_fp8
from unite_fast.engine.world import World
from unite_fast.modality import Modality
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import TwoPassObjective, two_pass_step


def fit(
    config: Config, world: World, largest: Callable[[int], Extent], try_step: Callable[[Config, int], None]
) -> tuple[Batch, Config]:
    """The batch numbers, and the configuration with a fixed number of draws per chunk.

    The search for an `auto` micro-batch uses chunks that cost no memory. If memory is left, because the global batch
    limits the micro-batch or it was given, the largest chunk that fits is used. It is measured on CUDA only: on a CPU,
    whose free memory varies, a resumed run would round differently.

    Args:
        config: the run.
        world: this process; all ranks find the same.
        largest: `Modality.largest` of the run.
        try_step: runs both passes of such a run on a micro-batch of a size; raises what `is_out_of_memory` knows where
            it does not fit.

    Raises:
        UserError: batch keys that do not fit, or not even the smallest micro-batch fits.
    """
    train, device = config.train, world.device.type

    def try_size(size: int) -> None:
        try_step(resolve_chunk(config, largest(size), device=device), size)

    micro = None
    if train.micro_batch == "auto":
        candidates = micro_batch_candidates(train, world.size)
        micro = candidates[0]
        if len(candidates) > 1:
            step = try_size if device == "cuda" else bounded_on_cpu(try_size, processes=world.local_size)
            micro = find_micro_batch(step, candidates, agree=world.all_true)
    batch = resolve_batch(train, world.size, micro)
    micro = batch.micro_batch

    def largest_chunk(sizes: list[int]) -> int | None:
        if device != "cuda":
            return None
        return find_largest(lambda size: try_step(with_chunk(config, size), micro), sizes, agree=world.all_true)

    return batch, resolve_chunk(config, largest(micro), device=device, largest=largest_chunk)


class Trial:
    """Both passes of a run on a throw-away model, as `fit` tries them.

    Args:
        config, world, modality: the run.
        objective: of the run; it is left with the configuration that was tried last.
    """

    def __init__(self, config: Config, world: World, modality: Modality, objective: TwoPassObjective):
        self._config, self._device, self._modality, self._objective = config, world.device, modality, objective

    @cached_property
    def _probe(self) -> Probe:
        # Made by the first step that is tried, since it may be what does not fit.
        return Probe(self._modality, self._config, self._device)

    def __call__(self, config: Config, size: int) -> None:
        self._objective.config = config.objective
        inputs = self._modality.probe(config, size, self._device)
        draws = SeededDraws(config.objective, seed=0, step=0, stream=0, device=self._device)
        two_pass_step(self._probe, self._objective, inputs.data, inputs.labels, draws, shape=inputs.shape)

    def close(self) -> None:
        """Free the model and the memory of the tried steps.

        On a GPU it goes back to the driver, because NCCL and decoders allocate outside PyTorch; the run's peak does not
        count it.
        """
        self.__dict__.pop("_probe", None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


class Probe:
    """A throw-away model that runs passes and gradients as the engine will, to measure memory.

    It also allocates what the engine will hold besides weights and gradients: at most two moments, the EMA of each
    decay, and ZeRO's master copy, each the size of the float32 weights. On a GPU it keeps the same share of memory free
    as a plan: NCCL, a decoder on the device and prefetched micro-batches come later, and fragmentation grows with time.
    """

    def __init__(self, modality: Modality, config: Config, device: torch.device):
        model = modality.network(config.model).to(device)
        if config.train.fp8:
            use_fp8(model)
        self._forward = AutocastForward(model, autocast_dtype(config, device))
        copies = 4 + len(config.optimizer.ema_decays)
        self._engine_state = torch.empty(copies * sum(p.numel() for p in model.parameters()), device=device)
        if device.type == "cuda":
            spared = (1 - USABLE_MEMORY) * torch.cuda.mem_get_info(device)[1]
            self._spared = torch.empty(int(spared), dtype=torch.uint8, device=device)

    def __call__(self, phase: str, **inputs: Any) -> Any:
        return self._forward(phase, **inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
