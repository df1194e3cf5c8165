"""Images as a modality of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from unite_fast.analysis.counts import step_parts
from unite_fast.analysis.extent import Extent, Population
from unite_fast.analysis.parts import Dtype, Part
from unite_fast.config import Config, ModelConfig
from unite_fast.data.loader import MicroBatch
from unite_fast.data.stream import Stream, open_stream
from unite_fast.engine.batch import Batch
from unite_fast.engine.engine import Engine
from unite_fast.engine.report import Report, absent_of_evaluation, files_of_evaluation
from unite_fast.engine.world import World
from unite_fast.evaluation.files import Files
from unite_fast.evaluation.plan import Plan
from unite_fast.modality import Inputs
from unite_fast.model.unite import Unite
from unite_fast.objective.perceptual import absent_weights
from unite_fast.objective.two_pass import Objective

if TYPE_CHECKING:
    from unite_fast.analysis.isolated import Isolated
    from unite_fast.analysis.launches import Launches


IMAGENET_IMAGES = 1_281_167


class Images:
    """Class-folder images; see `unite_fast.modality.Modality`."""

    name, unit, alike, sizes, network = "images", "images", True, ModelConfig, Unite

    def objective(self, config: Config, device: torch.device, autocast: torch.dtype | None) -> Objective:
        return Objective(config.objective, config.model.num_classes, device, autocast)

    def absent_files(self, config: Config, device: torch.device) -> list[str]:
        lpips = absent_weights(config.objective.lpips) if config.objective.lpips.weight else []
        of_metrics = absent_of_evaluation(config, device)
        return lpips + [line for line in of_metrics if not any(told in line for told in lpips)]

    def evaluation_files(self, config: Config, device: torch.device) -> tuple[Plan, Files]:
        return files_of_evaluation(config, device)

    def stream(self, config: Config, batch: Batch, world: World, *, start_step: int) -> Stream:
        return open_stream(
            config.data,
            device=world.device,
            image_size=config.model.image_size,
            num_classes=config.model.num_classes,
            seed=config.train.seed,
            global_batch=batch.global_batch,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
            rank=world.rank,
            world_size=world.size,
            local_size=world.local_size,
            start_step=start_step,
        )

    def samples(self, stream: Stream) -> dict[str, int | str]:
        return stream.samples()

    def inputs(self, config: Config, micro_batch: MicroBatch, batch: Batch, world: World) -> Inputs:
        images = micro_batch.images.to(world.device, non_blocking=True).float().div_(255)
        labels = micro_batch.labels.to(world.device, non_blocking=True)
        shape = self._latents(config, len(images))
        return Inputs(images, labels, shape, 1 / batch.accumulation, Extent(len(images)))

    def probe(self, config: Config, size: int, device: torch.device) -> Inputs:
        side = config.model.image_size
        images = torch.rand(size, 3, side, side, device=device)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        return Inputs(images, labels, self._latents(config, size), 1.0, self.largest(config, size))

    def population(self, config: Config) -> Population:
        return Population((1,), IMAGENET_IMAGES, f"ImageNet's {IMAGENET_IMAGES:,} images per epoch")

    def largest(self, config: Config, size: int) -> Extent:
        return Extent(size)

    def has_data(self, config: Config) -> bool:
        return Path(config.data.path).is_dir()

    def isolated(
        self, config: Config, model: Unite, objective: Objective, inputs: Inputs, draws: int
    ) -> dict[str, Isolated]:
        from unite_fast.analysis.isolated import image_parts

        return image_parts(config, model, objective, inputs, draws)

    def counted(
        self, config: Config, extent: Extent, *, dtype: Dtype, device: Literal["cuda", "cpu"]
    ) -> dict[str, tuple[Part, int]]:
        parts = step_parts(config.model, config.objective, dtype=dtype, device=device, fp8=config.train.fp8)
        return {name: (part, extent.samples) for name, part in parts.items()}

    def launches(self, config: Config) -> Launches:
        from unite_fast.analysis.launches import image_launches

        return image_launches(config)

    def report(
        self, config: Config, folder: Path, world: World, engine: Engine, stream: Stream, files: tuple[Plan, Files]
    ) -> Report:
        return Report(config, folder, world, engine, stream.classes, stream.mode, files)

    def commands(self) -> None:
        return None

    @staticmethod
    def _latents(config: Config, size: int) -> torch.Size:
        return torch.Size((size, config.model.registers, config.model.latent_dim))
