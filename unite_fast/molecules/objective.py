"""The reconstruction loss of molecules, and the rotations that molecules are trained under.

Shapes: B molecules, N padded atoms, T real atoms in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


def turned(positions: Tensor, quaternions: Tensor) -> Tensor:
    """Vectors [T, 3], each turned by a quaternion of its own.

    Args:
        positions: float32.
        quaternions: [T, 4] of any length, the real part first; normal numbers give rotations uniform on SO(3).
    """
    # v + 2w(u × v) + 2u × (u × v). Sums of products one by one: TF32 would round a matrix product's to 0.002 Å.
    w, u = F.normalize(quaternions, dim=1).split((1, 3), dim=1)
    twice = 2 * torch.linalg.cross(u, positions)
    return torch.addcmul(positions, w, twice) + torch.linalg.cross(u, twice)


def rotate(molecules: Molecules, *, seed: int, step: int, stream: int) -> Molecules:
    """Every molecule turned by a rotation of its own, drawn from (seed, step, stream).

    Args:
        stream: number of this rank's micro-batch among all of the step's: rank · accumulation + micro-batch.
    """
    packed, positions = molecules.packed, molecules.positions
    shape = (len(packed.counts), 4)
    quaternions = uk.philox_normal(shape, seed, step, ROTATION_STREAM + stream, device=positions.device)
    return molecules._replace(positions=turned(positions, quaternions.index_select(0, packed.sequence)))


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
