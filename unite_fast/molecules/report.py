"""What a run on molecules leaves for people: sheets, histograms, a page of 3-D views, files, and every metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from unite_fast.data.molecules.molecule_set import MoleculeSet, from_arrays
from unite_fast.data.molecules.perception import perceive_all
from unite_fast.data.molecules.writing import write_sdf, write_xyz
from unite_fast.engine.engine import Engine
from unite_fast.engine.report import Report
from unite_fast.engine.world import World
from unite_fast.evaluation.molecules import Generation, MoleculeJudge, Reconstruction
from unite_fast.molecules.config import MAX_ATOMS, MoleculeConfig
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.sampling import draw_counts, generate, reconstruct
from unite_fast.molecules.stream import MoleculeStream
from unite_fast.pictures_molecules import (
    generated_section,
    histograms,
    molecule_page,
    molecule_sheet,
    reconstruction_section,
    reconstruction_sheet,
)

SHEET_RECONSTRUCTIONS = 8
PAGE_RECONSTRUCTIONS = 24


class MoleculeReport(Report):
    """Pictures and metrics of a run on molecules, made on the main rank while the others wait."""

    config: MoleculeConfig
    shown = (
        "reconstruction/element_accuracy", "reconstruction/rmsd", "reconstruction/match", "reconstruction/match_real",
        "rdkit/valid", "rdkit/valid_real", "rdkit/connected", "rdkit/connected_real", "rdkit/unique", "rdkit/novel",
        "rdkit/valid_connected_unique", "edm/atom_stable", "edm/atom_stable_real", "distance/bond_lengths",
    )  # fmt: skip
    sheets = (
        ("samples.png", "generated molecules with their SMILES"),
        ("reconstructions.png", "held-out originals beside their reconstructions, with RMSD"),
        ("histograms.png", "atoms, elements and bond lengths against the data"),
        ("molecules.html", "all of them in 3-D, to rotate; works offline"),
        ("samples.sdf", "generated molecules (also samples.xyz)"),
    )

    def __init__(
        self, config: MoleculeConfig, folder: Path, world: World, engine: Engine, stream: MoleculeStream
    ):
        self._parts = stream.parts
        super().__init__(config, folder, world, engine, stream.classes, stream.mode)

    def _prepare(self) -> None:
        if not self.world.is_main:
            return
        held_out = self._parts.held_out
        self._held_out = held_out.select(np.arange(min(len(held_out), self.config.evaluation.reconstructions)))

    def _sheets(self, model: MoleculeUnite, suffix: str) -> None:
        """The sheet of generated molecules; at the end the metrics draw the rest, from what they perceive."""
        if suffix:
            made = self._generate(model, self.config.evaluation.sheet)
            perceived = perceive_all(made, processes=self._processes)
            molecule_sheet(made, perceived, self.folder / f"samples{suffix}.png")

    def due(self, step: int, steps_per_epoch: float) -> bool:
        """Never: molecules are judged at the end."""
        return False

    def _measure(self, model: MoleculeUnite, step: int) -> dict[str, Any]:
        if not self.world.is_main:
            return {}
        judge = MoleculeJudge(self._parts.train, self._held_out, processes=self._processes)
        rebuilt = self._reconstruct(model, self._held_out)
        reconstruction = judge.reconstruction(rebuilt)
        made = self._generate(model, self.config.evaluation.samples)
        generation = judge.generation(made)
        self._draw(judge, made, generation, rebuilt, reconstruction)
        return reconstruction.metrics | generation.metrics | {"data": self._parts.train.source}

    def _draw(
        self,
        judge: MoleculeJudge,
        made: MoleculeSet,
        generation: Generation,
        rebuilt: MoleculeSet,
        reconstruction: Reconstruction,
    ) -> None:
        folder, source = self.folder, self._parts.train.source
        some = np.arange(min(len(made), self.config.evaluation.sheet))
        shown, found = made.select(some), [generation.perceived[index] for index in some]
        molecule_sheet(shown, found, folder / "samples.png", title=f"Generated, the first {len(some)} of {len(made)}")
        originals = judge.held_out, judge.held_out_perceived
        reconstruction_sheet(
            *originals, rebuilt, reconstruction, folder / "reconstructions.png", count=SHEET_RECONSTRUCTIONS
        )
        histograms(made, self._held_out, folder / "histograms.png")
        sections = [
            generated_section(shown, found),
            reconstruction_section(*originals, rebuilt, reconstruction, count=PAGE_RECONSTRUCTIONS),
        ]
        molecule_page(folder / "molecules.html", f"Molecules of {self.config.name}", source, sections)
        write_sdf(made, folder / "samples.sdf", generation.perceived)
        write_xyz(made, folder / "samples.xyz")

    def _reconstruct(self, model: MoleculeUnite, molecules: MoleculeSet) -> MoleculeSet:
        """Held-out molecules through tokenization and decoder, register noise from the run's seed."""
        batch, pieces = self.config.evaluation.batch, []
        for first in range(0, len(molecules), batch):
            piece = molecules.select(np.arange(first, min(first + batch, len(molecules))))
            tensors = (torch.from_numpy(array) for array in (piece.elements, piece.positions, piece.counts))
            pieces.append(reconstruct(model, *tensors, seed=self.config.train.seed, first=first))
        return joined(pieces, f"reconstructions of {self.config.name}", molecules.names)

    def _generate(self, model: MoleculeUnite, count: int) -> MoleculeSet:
        """Molecules under the configured sampling, atom counts from the training histogram; bins in turn."""
        sampling, seed, pieces = self.config.sampling, self.config.train.seed + 1, []
        for first in range(0, count, self.config.evaluation.batch):
            numbers = np.arange(first, min(first + self.config.evaluation.batch, count))
            counts = draw_counts(self._data["atom_histogram"], len(numbers), seed=seed, first=first)
            labels = torch.from_numpy(numbers % len(self.classes)) if self.classes else None
            pieces.append(
                generate(
                    model, torch.from_numpy(counts), labels, seed=seed, first=first, guidance=sampling.guidance,
                    interval=sampling.interval, solver=sampling.solver, steps=sampling.steps,
                    time_shift=self.config.objective.time_shift,
                )
            )  # fmt: skip
        return joined(pieces, f"molecules of {self.config.name}")

    @property
    def _processes(self) -> int | None:
        return self.config.evaluation.workers or None


def joined(pieces: list[Any], source: str, names: tuple[str, ...] | None = None) -> MoleculeSet:
    """One set of `Drawn` pieces."""
    elements = np.zeros((sum(len(piece.counts) for piece in pieces), MAX_ATOMS), np.uint8)
    positions = np.zeros((len(elements), MAX_ATOMS, 3), np.float32)
    first = 0
    for piece in pieces:
        rows, width = slice(first, first + len(piece.counts)), piece.elements.shape[1]
        elements[rows, :width], positions[rows, :width] = piece.elements.numpy(), piece.positions.numpy()
        first += len(piece.counts)
    return from_arrays(elements, positions, source=source, names=names)
