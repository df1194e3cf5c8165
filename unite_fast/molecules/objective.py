"""The reconstruction loss of molecules, and the rotations that molecules are trained under.

Shapes: B molecules, N padded atoms, T real atoms in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unite_kernels as uk
from unite_fast.model.packing import Packed
from unite_fast.molecules.config import MoleculeObjectiveConfig
from unite_fast.objective.draws import Draws
from unite_fast.objective.two_pass import TwoPassObjective

# Streams of the counter-based generator from here on are rotations; a step's other draws use seven a micro-batch.
ROTATION_STREAM = 2**30


class Molecules(NamedTuple):
    """The real atoms of a micro-batch on the device."""

    elements: Tensor  # [T] int64, 1 … 5 = H C N O F
    positions: Tensor  # [T, 3] float32 in Å
    packed: Packed


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Rotations [B, 3, 3] of quaternions [B, 4] of any length; normal numbers give rotations uniform on SO(3)."""
    w, x, y, z = (quaternions / quaternions.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=1).view(-1, 3, 3)


def rotate(molecules: Molecules, *, seed: int, step: int, stream: int) -> Molecules:
    """Every molecule turned by a rotation of its own, drawn from (seed, step, stream).

    Args:
        stream: number of this rank's micro-batch among all of the step's: rank · accumulation + micro-batch.
    """
    packed, positions = molecules.packed, molecules.positions
    shape = (len(packed.counts), 4)
    quaternions = uk.philox_normal(shape, seed, step, ROTATION_STREAM + stream, device=positions.device)
    turns = rotation_matrices(quaternions)[packed.sequence]
    # Sums of three products, not a matrix product: TF32 would round coordinates to 0.002 Å.
    return molecules._replace(positions=(turns * positions[:, None]).sum(2))


class MoleculeObjective(TwoPassObjective):
    """Cross-entropy of the elements and the error of the positions, means over real atoms."""

    config: MoleculeObjectiveConfig

    def reconstruction(
        self, run: Callable[..., Any], data: Molecules, draws: Draws, shape: torch.Size
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Pass one; terms "element" (nats) and "position" (Å, or nm² for the squared error)."""
        config = self.config
        noise, t, mix, added_noise = draws.tokenize(shape)
        z0, element, position = run(
            "reconstruct", **data._asdict(), noise=noise, t=t, mix=mix, added_noise=added_noise,
            squared=config.position_loss == "mse",
        )  # fmt: skip
        loss = config.element_weight * element + config.position_weight * position
        return loss, {"element": element, "position": position}, z0

    def layout(self, data: Molecules) -> dict[str, Any]:
        return {"packed": data.packed}

    def mask(self, data: Molecules) -> Tensor:
        return data.packed.mask
