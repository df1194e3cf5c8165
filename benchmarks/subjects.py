"""What the benchmarks of the training step measure: configurations, and a step of ours and of the plain rival."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
import torch.nn as nn
from plain_training import PlainTrainer
from safetensors.torch import save_file
from torch import Tensor

from unite_fast.analysis.chunks import chunk_in_room, resolve_chunk
from unite_fast.config import Config
from unite_fast.engine.backend import AutocastForward, autocast_dtype
from unite_fast.engine.compiling import compile_perceptual, compiled_passes
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.modality import modality_of
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.perceptual import CHANNELS, STAGES
from unite_fast.objective.two_pass import TwoPassObjective, two_pass_step

CONFIGS = Path(__file__).parents[1] / "configs"
# B's blocks at a quarter of its width and depth, 64 × 64 pixels: everything a full step has, in a second.
SMALL = [
    'model={"image_size": 64, "registers": 16, "depth": 3, "width": 192, "heads": 3, "context_len": 8, '
    '"context_start": 1, "decoder": {"depth": 3, "width": 192, "heads": 3, "inner": 192}}',
    "objective.flow_draws=3",
    "train.zero_stage=0",
]


class Subject(NamedTuple):
    """A configuration to measure.

    Attributes:
        file: under configs/.
        overrides: of its keys.
        batch: images of a step; None for the most that fits, each contender its own.
    """

    file: str
    overrides: list[str]
    batch: int | None


def _preset(preset: str, draws: int) -> Subject:
    file = {"B": "b_h100.json", "L": "l_h100.json"}[preset]
    return Subject(file, [f"objective.flow_draws={draws}", "train.zero_stage=0"], None)


SUBJECTS = (
    {f"{preset} S={draws}": _preset(preset, draws) for preset in ("B", "L") for draws in (3, 14)}
    if measure.DEVICE == "cuda"
    else {"quickstart S=4": Subject("quickstart.json", [], 32), "small B S=3": Subject("b_h100.json", SMALL, 2)}
)


def random_perceptual_weights(folder: Path) -> dict[str, Path]:
    """Weight files for LPIPS with random numbers, by the configuration key that takes them; speed is the same."""
    generator = torch.Generator().manual_seed(0)
    vgg, inputs = {}, 3
    for indices, channels in zip(STAGES, CHANNELS, strict=True):
        for index in indices:
            # Variance 2 / fan-in keeps the maps at the size of the images (He et al. 2015).
            scale = (2 / (9 * inputs)) ** 0.5
            vgg[f"features.{index}.weight"] = scale * torch.randn(channels, inputs, 3, 3, generator=generator)
            vgg[f"features.{index}.bias"] = torch.zeros(channels)
            inputs = channels
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(CHANNELS)}
    paths = {"vgg": folder / "vgg.safetensors", "linear": folder / "linear.safetensors"}
    for name, tensors in (("vgg", vgg), ("linear", linear)):
        save_file(tensors, paths[name])
    return paths


def load(subject: Subject, weights: dict[str, Path]) -> Config:
    """The subject's configuration, with a number of draws a chunk and paths of LPIPS weights where it has the term."""
    config = Config.load(CONFIGS / subject.file, subject.overrides)
    if config.objective.lpips.weight:
        paths = [f"objective.lpips.{name}={path}" for name, path in weights.items()]
        config = Config.load(CONFIGS / subject.file, [*subject.overrides, *paths])
    return resolved(config, subject.batch)


def resolved(config: Config, batch: int | None) -> Config:
    """The run with a number of draws a chunk.

    Of `auto` what the trainer takes: the neutral chunk where the batch is the most that fits, else the largest beside
    the batch, here in half of a GPU's memory, as two contenders share it.
    """
    largest = modality_of(config).largest
    if measure.DEVICE == "cpu" or batch is None:
        # The neutral chunk is the same for every batch of 4 images or more.
        return resolve_chunk(config, largest(config, batch or 4), device=measure.DEVICE)
    room = torch.cuda.get_device_properties(0).total_memory / 2
    return chunk_in_room(config, largest(config, batch), room)


class CompiledPasses:
    """Our engine's passes under torch.compile, as `train.compile` runs them, on the same weights and optimizer."""

    def __init__(self, engine: Engine):
        self.backward = engine.backward
        dtype = autocast_dtype(engine.config, engine.world.device)
        self.forward = AutocastForward(engine.model, dtype, compiled_passes(engine.model, engine.config))

    def __call__(self, phase: str, **inputs: Any) -> Any:
        return self.forward(phase, **inputs)


class Trainers:
    """Ours and the rival from the same weights, on the device.

    Attributes:
        engine, objective: ours, as `unite_fast.engine.loop` builds them.
        plain: the rival.
    """

    def __init__(self, config: Config):
        torch.manual_seed(0)
        self.config, self.device = config, torch.device(measure.DEVICE)
        modality = modality_of(config)
        model = modality.network(config.model).to(self.device)
        autocast = autocast_dtype(config, self.device)
        self.objective = modality.objective(config, self.device, autocast)
        self.plain = self.rival(model, autocast)
        self.world = World(0, 1, 0, self.device)
        # The rival's constant rate. At a warm-up's first ones the layers that begin at zero stay so small that products
        # of them are denormal, which takes an Intel CPU up to four times a step's time.
        constant = dict(lr_batch=None, warmup_epochs=0.0, cosine_until_epoch=0.0)
        optimizer = config.optimizer.model_copy(update=constant)
        steady = config.model_copy(update={"optimizer": optimizer})
        self.engine = Engine(model, steady, self.world, steps_per_epoch=1, global_batch=1)

    def rival(self, model: nn.Module, autocast: torch.dtype | None) -> PlainTrainer:
        """The plain step from the model's weights."""
        lr, lpips = self.config.optimizer.lr, self.objective.lpips
        return PlainTrainer(self.config, model, lr=lr, lpips=lpips, autocast=autocast)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random images [B, 3, H, H] and labels [B] on the device."""
        model = self.config.model
        images = torch.rand(size, 3, model.image_size, model.image_size, device=self.device)
        return images, torch.randint(model.num_classes, (size,), device=self.device)

    def shape(self, size: int) -> torch.Size:
        """[B, K, D]."""
        return torch.Size((size, self.config.model.registers, self.config.model.latent_dim))

    def draws(self) -> SeededDraws:
        """Those of our next step."""
        return SeededDraws(
            self.config.objective, seed=0, step=self.engine.step_count, stream=0, device=self.device
        )

    def drop_gradients(self) -> None:
        """Those of both contenders; a step that ran out of memory leaves some, whose memory the next one would lack."""
        for model in (self.engine.model, self.plain.model):
            model.zero_grad(set_to_none=True)

    @functools.cached_property
    def compiled(self) -> CompiledPasses:
        """Our passes under torch.compile."""
        return CompiledPasses(self.engine)

    @functools.cached_property
    def compiled_objective(self) -> TwoPassObjective:
        """Our losses with LPIPS under torch.compile; the eager one keeps its own."""
        objective = copy.deepcopy(self.objective)
        compile_perceptual(objective)
        return objective

    def our_step(self, images: Tensor, labels: Tensor, *, compiled: bool = False) -> None:
        """Tokenize, reconstruct, denoise, backward, optimizer, EMA: what the loop does between two batches."""
        shape = self.shape(images.shape[0])
        engine, objective = (self.compiled, self.compiled_objective) if compiled else (self.engine, self.objective)
        two_pass_step(engine, objective, images, labels, self.draws(), shape=shape)
        self.engine.step()
