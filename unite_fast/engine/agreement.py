"""What all ranks must find alike before they train together: configuration, how they round, checkpoint to go on from or
weights to begin with, and data."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unite_fast.config import Config
from unite_fast.engine import checkpoint
from unite_fast.engine.world import SETTLED, World
from unite_fast.errors import UserError
from unite_fast.evaluation.protocol import weights_hash
from unite_fast.importing import Trained
from unite_fast.versions import versions
from unite_kernels.cpu import cpuinfo

# Where things lie, which may be elsewhere on another node; `require_same_data` looks at what lies there.
PLACES = {
    "runs", "data.path", "data.val_path", "data.cache", "objective.lpips.vgg", "objective.lpips.linear",
    "evaluation.reference", "evaluation.inception", "train.start_from",
}  # fmt: skip


def require_same_config(config: Config, world: World) -> None:
    """Refuse ranks with other configurations, as where each node reads a file of its own. Collective.

    Each would step its weights, or its share of them, by another learning rate, say, without a word.

    Raises:
        UserError: the first key that a rank has otherwise than rank 0.
    """
    found = world.collect(config.model_dump(mode="json"))
    for rank, other in enumerate(found):
        for key, first, there in checkpoint.changes(found[0], other):
            if key not in PLACES:
                raise UserError(
                    f"the configuration is not the same for all ranks: {key} is {first!r} for rank 0, {there!r} for "
                    f"rank {rank}. Give every node the same file"
                )


def check_same_rounding(config: Config, world: World) -> str | None:
    """A warning where ranks may round otherwise and their weights part by it; None elsewhere. Collective.

    Under ZeRO 0 every rank updates all weights by itself, and nothing brings them together again. AdamW's float32 steps
    differ in their last bits; Newton–Schulz, in bfloat16 on a GPU, hands on what its products round otherwise, so Muon
    is refused. Under ZeRO 1 to 3 each weight is updated on one rank and sent to all: those may be of any kind.

    Raises:
        UserError: the first rank that is of another kind, under ZeRO 0 with Muon.
    """
    if config.train.zero_stage:
        return None
    found = world.collect(rounds_as(world.device))
    if (odd := _first_other(found)) is None:
        return None
    rank, other = odd
    what = (
        "under train.zero_stage 0 every rank updates the weights by itself, and ranks that round otherwise drift "
        f"apart: rank 0 is {found[0]}, rank {rank} {other}. Set train.zero_stage to 1, or start all ranks on devices "
        f"of one kind with one version of torch"
    )
    if config.optimizer.kind == "muon":
        raise UserError(what)
    return what


def rounds_as(device: torch.device) -> str:
    """What the same operations round by: a GPU's model, a CPU's maker and vectors, and PyTorch's version."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind = f"{properties.name} of compute capability {properties.major}.{properties.minor}"
    else:
        kind = f"{cpuinfo('vendor_id') or platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, torch {versions('torch')['torch']}"


def newest_checkpoint(folder: Path, world: World) -> Path | None:
    """The newest checkpoint of a run, or None, once all ranks find it, as from others weights would part. Collective.

    Raises:
        UserError: ranks that still find different ones after SETTLED looks.
    """
    for look in range(SETTLED):
        latest = checkpoint.latest(folder)
        found = world.collect("no checkpoint" if latest is None else latest.name)
        odd = _first_other(found)
        if odd is None:
            return latest
        if not look and world.is_main:
            print(f"waiting until all ranks see the same checkpoints in {folder}, up to {SETTLED} s", file=sys.stderr)
        time.sleep(1)
    rank, name = odd
    raise UserError(
        f"{folder} is not the same folder for all ranks: rank 0 finds {found[0]} in it, rank {rank} {name}. "
        f"Set runs to a folder that all nodes share"
    )


def require_same_data(samples: Mapping[str, Any], world: World, unit: str) -> None:
    """Refuse ranks with other training data. Collective.

    Each would follow a schedule of its own, and their weights would part without a word. Behind the memory trial, since
    the data are opened for its batch.

    Args:
        samples: count and digest of this rank's, as `Modality.samples` gives them.
        unit: what they are, in the plural.

    Raises:
        UserError: the first rank whose data are not rank 0's.
    """
    found = world.collect(samples)
    if (odd := _first_other(found)) is None:
        return
    rank, other = odd
    what = f"other {unit} of the same number" if other["count"] == found[0]["count"] else f"{other['count']}"
    raise UserError(
        f"the training data are not the same for all ranks: rank 0 has {found[0]['count']} {unit}, rank {rank} {what}. "
        f"Put the same into data.path of every node"
    )


def require_same_start(trained: Trained, world: World) -> None:
    """Refuse ranks that read other weights to begin with. Collective.

    Each reads them by itself, from a folder of its own node perhaps, or of a run that saves in between.

    Raises:
        UserError: the first rank whose weights are not rank 0's.
    """
    if world.size == 1:
        return
    steps = world.collect(trained.made_by.get("step"))
    if (odd := _first_other(world.collect(weights_hash(trained.state)))) is None:
        return
    rank, _ = odd
    raise UserError(
        f"train.start_from: {trained.origin} does not hold the same weights for all ranks (rank 0 finds step "
        f"{steps[0]}, rank {rank} step {steps[rank]}). Put the same on every node, and of a run in training name one "
        f"checkpoint, RUN/checkpoints/step_…"
    )


def _first_other(found: Sequence[Any]) -> tuple[int, Any] | None:
    """The first rank whose value is not rank 0's, and that value."""
    return next(((rank, value) for rank, value in enumerate(found) if value != found[0]), None)
