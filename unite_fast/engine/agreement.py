"""Checks that all ranks agree before training: configuration, rounding, the checkpoint to resume from or the weights to
start from, and data."""

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
from unite_fast.engine.backend import MIN_BF16_CAPABILITY, has_bf16
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
    """Refuse ranks with different configurations, which happens if each node reads its own file. Collective.

    Each would silently step its weights, or its share of them, by a different learning rate, for example.

    Raises:
        UserError: names the first key that differs between a rank and rank 0.
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
    """A warning if ranks may round differently, so that their weights would drift apart; None otherwise. Collective.

    Under ZeRO 0 every rank updates all weights by itself, and nothing synchronizes them again. AdamW's float32 steps
    differ in their last bits; Newton–Schulz, in bfloat16 on a GPU, amplifies such differences, so Muon is refused.
    Under ZeRO 1 to 3 each weight is updated on one rank and sent to all, so ranks may be of different kinds.

    Raises:
        UserError: names the first rank of a different kind, under ZeRO 0 with Muon.
    """
    if config.train.zero_stage:
        return None
    found = world.collect(rounds_as(world.device))
    if (odd := _first_other(found)) is None:
        return None
    rank, other = odd
    what = (
        "under train.zero_stage 0 every rank updates the weights by itself, and ranks that round differently drift "
        f"apart: rank 0 is {found[0]}, rank {rank} {other}. Set train.zero_stage to 1, or start all ranks on devices "
        f"of one kind with one version of torch"
    )
    if config.optimizer.kind == "muon":
        raise UserError(what)
    return what


def check_precision(config: Config, world: World) -> str | None:
    """A notice if `train.precision` auto means float32 on a GPU, which has no bfloat16 then; else None. Collective.

    Raises:
        UserError: bf16 for such a GPU, which would emulate its products (slower than float32's) and has no convolutions
            and no FlashAttention in it; auto for GPUs of both kinds.
    """
    if world.device.type != "cuda" or config.train.precision == "fp32":
        return None
    found = world.collect(has_bf16(world.device))
    if all(found):
        return None
    least = ".".join(map(str, MIN_BF16_CAPABILITY))
    rank = found.index(False)
    lacking = f"bfloat16 needs a GPU of compute capability {least} (A100, RTX 30), which rank {rank} does not have"
    if config.train.precision == "bf16" or any(found):
        raise UserError(f"{lacking}: set train.precision to fp32")
    return f"{lacking}: training in float32"


def rounds_as(device: torch.device) -> str:
    """What the rounding of an operation depends on: GPU model, or CPU maker and vector width, and PyTorch version."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind = f"{properties.name} of compute capability {properties.major}.{properties.minor}"
    else:
        kind = f"{cpuinfo('vendor_id') or platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, torch {versions('torch')['torch']}"


def newest_checkpoint(folder: Path, world: World) -> Path | None:
    """The newest checkpoint of a run, or None, once all ranks find the same, or weights would differ. Collective.

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
    """Refuse ranks with different training data. Collective.

    Each would follow its own schedule, and their weights would silently drift apart. Called after the memory trial,
    because the data are opened for the batch that it finds.

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
    """Refuse ranks that start from different weights. Collective.

    Each reads them by itself, possibly from a folder on its own node, or from a run that saves in between.

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
