"""A small UNITE for the engine's tests: its configuration and one two-pass optimizer step on any number of ranks."""

from __future__ import annotations

import torch
from engine_toy import toy_config
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import Objective, two_pass_step

SHARES, SHARE = 4, 2  # a global batch of 8 as four draws of randomness, dealt to ranks and micro-batches


def unite_config(*, stage: int, kind: str, stop_gradient: bool, precision: str = "fp32") -> Config:
    decoder = dict(depth=1, width=16, heads=2, inner=12)
    model = dict(depth=2, width=32, heads=2, image_size=8, patch_size=4, registers=4, latent_dim=6, num_classes=3)
    values = toy_config(stage=stage, kind=kind, lr=0.005).model_dump()
    values["train"]["precision"] = precision
    values["model"] = model | dict(context_len=2, context_start=1, decoder=decoder)
    values["objective"] = dict(flow_draws=2, draws_per_chunk=1, lpips=dict(weight=0), stop_gradient=stop_gradient)
    return Config.parse(values)


def unite_engine(config: Config, world: World) -> Engine:
    torch.manual_seed(4)
    model = Unite(config.model)
    for linear in (*model.encoder.modulation, model.encoder.final_modulation, model.encoder.final):
        torch.nn.init.normal_(linear.weight, std=0.02)  # behind zeros nothing has a gradient in the first step
    return Engine(model, config, world, steps_per_epoch=10)


def unite_step(engine: Engine, step: int) -> Tensor:
    """Every share once, over all ranks; returns the gradient norm."""
    config, world = engine.config, engine.world
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(SHARES * SHARE, 3, 8, 8, generator=generator).split(SHARE)
    labels = torch.randint(0, 3, (SHARES * SHARE,), generator=generator).split(SHARE)
    objective = Objective(config.objective, config.model.num_classes)
    mine = range(world.rank, SHARES, world.size)
    for share in mine:
        two_pass_step(
            engine,
            objective,
            images[share],
            labels[share],
            SeededDraws(config.objective, seed=0, step=step, stream=share, device=world.device),
            shape=torch.Size((SHARE, config.model.registers, config.model.latent_dim)),
            weight=1 / len(mine),
            last=share == mine[-1],
        )
    return engine.step()
