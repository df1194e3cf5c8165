"""How many kernels a training step launches, and what that says about CUDA graphs and a fused update.

    python benchmarks/launches.py   # rewrites its section of benchmarks/README.md

Launches are counted on an imagined GPU (imagined.py), floors as in profile_table.py; nothing here is a time measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from imagined import Watch

from unite_fast.config import Config
from unite_fast.data.loader import MicroBatch
from unite_fast.engine.batch import Batch
from unite_fast.engine.engine import Engine
from unite_fast.engine.loop import Run
from unite_fast.engine.meter import Meter
from unite_fast.engine.world import World
from unite_fast.modality import modality_of
from unite_fast.objective.perceptual import Lpips


class ImaginedRun(Run):
    """The training loop's own optimizer step on an imagined device, without data, records and checkpoints.

    Args:
        config: the run; LPIPS has the weights it was made with.
        device: see `imagined`.
        batch: of its one rank.
        stream: micro-batches.
    """

    def __init__(self, config: Config, device: torch.device, batch: Batch, stream: Iterator[Any]):
        self.config, self.batch, self.stream = config, batch, stream
        self.world = World(0, 1, 0, device)
        self.modality = modality_of(config)
        with mock.patch.object(Lpips, "from_config", _untrained):
            self.objective = self.modality.objective(config, device, torch.bfloat16)
        model = self.modality.network(config.model)
        self.engine = Engine(model, config, self.world, steps_per_epoch=1e6, global_batch=batch.global_batch)
        self.meter = Meter(self.world, batch, 1e6, unit=self.modality.unit)

    def step(self) -> None:
        """What the loop does between two logs."""
        self.meter.begin()
        losses = self._micro_batches(self.meter)
        self.meter.add(losses, self.engine.step())

    def watched(self) -> Watch:
        """One step."""
        with Watch() as watch:
            self.step()
        return watch


def _untrained(config: Any) -> Lpips:
    return Lpips(rescale=config.rescale, dropout=config.dropout).to(memory_format=torch.channels_last)


def images_ahead(config: Config, batch: int, device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches that lie on the device, as `stream.Ahead` hands them over."""
    side = config.model.image_size
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=device)
    labels, indices = (torch.zeros(batch, dtype=torch.int64, device=where) for where in (device, "cpu"))
    step = 0
    while True:
        yield MicroBatch(images, labels, indices, step, 0)
        step += 1
