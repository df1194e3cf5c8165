"""What the benchmark of the step on molecules measures: configurations, molecules made up, ours and the plain rival."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import measure
import numpy as np
import torch
import torch.nn as nn
from numpy.typing import NDArray
from plain_molecules import PlainMoleculeTrainer
from subjects import Trainers

from unite_fast.engine.batch import Batch
from unite_fast.molecules.config import ELEMENTS, MoleculeConfig
from unite_fast.molecules.modality import Molecular
from unite_fast.molecules.stream import MoleculeBatch
from unite_fast.objective.two_pass import two_pass_step

# Molecules with 0 … 29 atoms among the 9,000 of the built-in sample set, mean 18.5.
ATOM_HISTOGRAM = (
    0, 0, 0, 0, 0, 1, 6, 21, 29, 75, 107, 166, 259, 355, 471,
    557, 715, 777, 810, 875, 848, 739, 648, 554, 406, 282, 147, 98, 36, 18,
)  # fmt: skip


def typical_counts(size: int) -> NDArray[np.int64]:
    """Atom counts [B] of a typical batch: each is the median of its rank among B draws from the histogram.

    The largest, which padding goes by, is so the usual largest; median ranks after Benard, (i − 0.3) / (B + 0.4).
    """
    ranks = (np.arange(1, size + 1) - 0.3) / (size + 0.4)
    return np.searchsorted(np.cumsum(ATOM_HISTOGRAM), ranks * sum(ATOM_HISTOGRAM), side="right")


def mean_counts(size: int) -> NDArray[np.int64]:
    """Atom counts [B], all the typical ones' mean: nothing to pad, so the ratio is of all else that differs."""
    return np.full(size, round(typical_counts(size).mean()))


class MoleculeSubject(NamedTuple):
    """A configuration to measure.

    Attributes:
        file: under configs/.
        overrides: of its keys.
        batch: molecules of a step.
        counts: makes the atom counts [B] of a batch.
    """

    file: str
    overrides: list[str]
    batch: int
    counts: Callable[[int], NDArray[np.int64]] = typical_counts


# The paper's batch on QM9; mol_tiny takes it, too, as 32 molecules do not fill a GPU.
QM9_BATCH = 512
MOLECULE_SUBJECTS = (
    {
        "mol_tiny S=4": MoleculeSubject("molecules_quickstart.json", ['model={"preset": "mol_tiny"}'], QM9_BATCH),
        "qm9_s S=4": MoleculeSubject("qm9_s.json", [], QM9_BATCH),
        "qm9_s S=4, one size": MoleculeSubject("qm9_s.json", [], QM9_BATCH, mean_counts),
    }
    if measure.DEVICE == "cuda"
    else {
        "mol quickstart S=4": MoleculeSubject("molecules_quickstart.json", [], 32),
        "mol quickstart S=4, one size": MoleculeSubject("molecules_quickstart.json", [], 32, mean_counts),
    }
)


class MoleculeTrainers(Trainers):
    """Ours and the rival on molecules; attributes as in `Trainers`.

    Args:
        counts: makes the atom counts [B] of a batch.
    """

    def __init__(self, config: MoleculeConfig, counts: Callable[[int], NDArray[np.int64]]):
        super().__init__(config)
        self.counts = counts

    def rival(self, model: nn.Module, autocast: torch.dtype | None) -> PlainMoleculeTrainer:
        return PlainMoleculeTrainer(self.config, model, lr=self.config.optimizer.lr, autocast=autocast)

    def batch(self, size: int) -> tuple[MoleculeBatch]:
        """Random elements and positions on the host, as the loop has them."""
        generator = torch.Generator().manual_seed(0)
        counts = torch.from_numpy(self.counts(size))[torch.randperm(size, generator=generator)]
        longest = int(counts.max())
        real = torch.arange(longest) < counts[:, None]
        elements = torch.randint(1, ELEMENTS + 1, real.shape, generator=generator).mul(real).to(torch.uint8)
        positions = 2 * torch.randn(size, longest, 3, generator=generator) * real[..., None]
        labels = torch.full((size,), self.config.model.num_classes)
        tensors = [elements, positions, counts, labels]
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return (MoleculeBatch(*tensors, weight=1.0, step=0, micro_batch=0),)

    def our_step(self, batch: MoleculeBatch, *, compiled: bool = False) -> None:
        """What the loop does between two batches; packing the molecules is part of it."""
        size = len(batch.counts)
        inputs = Molecular().inputs(self.config, batch, Batch(size, 1, size), self.world)
        shape, weight = inputs.shape, inputs.weight
        engine = self.compiled if compiled else self.engine
        two_pass_step(engine, self.objective, inputs.data, inputs.labels, self.draws(), shape=shape, weight=weight)
        self.engine.step()
