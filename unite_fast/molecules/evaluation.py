"""One evaluation of a model of molecules: numbered molecules made by all ranks, judged by rank 0, and the protocol.

`unite-fast evaluate` and the report at the end of a run call the same `MoleculeEvaluator`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast.data.molecules.molecule_set import MoleculeSet, content_hash, from_arrays
from unite_fast.data.molecules.perception import SECONDS
from unite_fast.data.molecules.writing import write_sdf, write_xyz
from unite_fast.engine.world import World
from unite_fast.evaluation.molecules import Generation, MoleculeJudge, Reconstruction
from unite_fast.evaluation.protocol import environment
from unite_fast.evaluation.record import write_record
from unite_fast.evaluation.work import Work, digest
from unite_fast.molecules.config import MAX_ATOMS, MoleculeEvaluationConfig
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.sampling import Drawn, draw_counts, generate, reconstruct
from unite_fast.molecules.stream import Parts
from unite_fast.pictures_molecules import (
    generated_section,
    histograms,
    molecule_page,
    molecule_sheet,
    reconstruction_section,
    reconstruction_sheet,
)
from unite_fast.replacing import replacing

# Raised when pieces of former versions must not be continued, because molecules come out differently.
PIECES = 1
SHEET_RECONSTRUCTIONS = 8
PAGE_RECONSTRUCTIONS = 24
PICTURES = (
    ("samples.png", "generated molecules with their SMILES"),
    ("reconstructions.png", "held-out originals beside their reconstructions, with RMSD"),
    ("histograms.png", "atoms, elements and bond lengths against the data"),
    ("molecules.html", "all of them in 3-D, to rotate; works offline"),
    ("samples.sdf", "generated molecules (also samples.xyz)"),
)
# What a procedure is called in one line, with the choices that its implementations differ in.
DEFINITIONS = {
    "reconstruction": "held-out molecules through tokenization and decoder; rmsd by atom index after Kabsch alignment; "
    "match: same elements and the same InChI perceived from the coordinates",
    "edm": "bonds by EDM's table of lengths, margins 10/5/3 pm, valences H1 C4 N3 O2 F1",
    "rdkit": "bonds by rdDetermineBonds, extended Hückel, charge 0, charged fragments allowed; canonical SMILES "
    "without stereochemistry, of training molecules too",
    "distance": "to held-out molecules: total variation of atom counts and elements, "
    "Wasserstein-1 of bond lengths in Å",
    "_real": "the same of held-out molecules, in shares of distinct ones of at most as many as generated ones; of "
    "distances, as many training molecules against held-out ones",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        samples: generated molecules.
        reconstructions: held-out molecules that are reconstructed and compared with, the first ones of the part.
        seed: of the register noise; generation draws from seed + 1, which is no seed of the run's own training draws.
        batch: molecules at a time; halved on the way if memory runs out.
        workers: processes that perceive bonds; None takes one a core.
    """

    samples: int = 1000
    reconstructions: int = 1000
    seed: int = 0
    batch: int = 256
    workers: int | None = None


@dataclass(frozen=True)
class Drawing:
    """How molecules are drawn.

    Attributes:
        sampling: guidance, interval, solver, steps and time_shift of `generate`.
        histogram: [30], or [bins, 30] for each bin its own: training molecules of 0 … 29 atoms, from which atom counts
            are drawn.
        classes: names of the property's bins, which are asked for in turn; none without a property.
    """

    sampling: dict[str, Any]
    histogram: Sequence[int] | Sequence[Sequence[int]]
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """Numbers, what made them, and the molecules themselves."""

    metrics: dict[str, float | int]
    protocol: dict[str, Any]
    judge: MoleculeJudge
    made: MoleculeSet
    generation: Generation
    rebuilt: MoleculeSet
    reconstruction: Reconstruction

    def draw(self, folder: Path, title: str, *, sheet: int) -> None:
        """Write `PICTURES` and samples.xyz into the folder; `sheet` molecules are drawn on a sheet.

        Raises:
            UserError: a folder that cannot be written.
        """
        some = np.arange(min(len(self.made), sheet))
        shown, found = self.made.select(some), [self.generation.perceived[index] for index in some]
        molecule_sheet(
            shown, found, folder / "samples.png", title=f"Generated, the first {len(some)} of {len(self.made)}"
        )
        rebuilt = self.judge.held_out, self.judge.held_out_perceived, self.rebuilt, self.reconstruction
        reconstruction_sheet(*rebuilt, folder / "reconstructions.png", count=SHEET_RECONSTRUCTIONS)
        histograms(self.made, self.judge.held_out, folder / "histograms.png")
        sections = [generated_section(shown, found), reconstruction_section(*rebuilt, count=PAGE_RECONSTRUCTIONS)]
        molecule_page(folder / "molecules.html", title, self.judge.train.source, sections)
        write_sdf(self.made, folder / "samples.sdf", self.generation.perceived)
        write_xyz(self.made, folder / "samples.xyz")

    def publish(self, path: Path, title: str, *, sheet: int) -> None:
        """Write the record, and what `draw` draws into the folder of its name beside it.

        All is drawn aside first, so that an interruption leaves a former record and its pictures as they were.

        Raises:
            UserError: a folder that cannot be written.
        """
        with replacing(path.with_suffix("")) as aside:
            self.draw(aside, title, sheet=sheet)
        write_record(path, self.metrics, self.protocol)


class MoleculeEvaluator:
    """Measures models of molecules by one plan.

    Args:
        plan: how much.
        parts: training and held-out molecules.
        world: the ranks that share the work; rank 0 judges.
    """

    def __init__(self, plan: Plan, parts: Parts, world: World):
        self.plan, self.parts, self.world = plan, parts, world
        self.held_out = parts.held_out.select(np.arange(min(len(parts.held_out), plan.reconstructions)))
        self._hashes: dict[str, str] = {}

    def measure(
        self, model: MoleculeUnite, about: dict[str, Any], drawing: Drawing, work: Work
    ) -> Evaluation | None:
        """Make the molecules and judge them. Collective; None on all ranks but rank 0, which judges.

        Args:
            model: on this rank's device, in evaluation mode.
            about: the protocol's `model`, with the `sha256` of its weights.
            drawing: how molecules are drawn.
            work: where pieces are kept until the result is on record.

        Raises:
            UserError: a model whose molecules hold NaN, memory that ends.
        """
        began, plan = time.monotonic(), self.plan

        def rebuild(first: int, stop: int) -> dict[str, Tensor]:
            rows = slice(first, stop)
            arrays = self.held_out.elements[rows], self.held_out.positions[rows], self.held_out.counts[rows]
            tensors = (torch.from_numpy(array) for array in arrays)
            return _padded(reconstruct(model, *tensors, seed=plan.seed, first=first))

        key = {"pieces": PIECES, "model": about["sha256"], "seed": plan.seed, "batch": plan.batch}
        rebuilt = work.gather(
            "reconstructing",
            {
                **key, "what": "held-out", "molecules": self._hash("held_out", self.held_out),
                "tokenize_time": model.tokenize_time,
            },
            len(self.held_out), plan.batch, rebuild, common=True,
        )  # fmt: skip
        made = work.gather(
            "generating", {**key, "what": "generated", **_json(drawing)}, plan.samples, plan.batch,
            lambda first, stop: _padded(self._piece(model, drawing, first, stop)),
        )  # fmt: skip
        if not self.world.is_main:
            return None
        molecules = from_arrays(**_arrays(made), source=f"generated by {about['origin']}")
        again = from_arrays(**_arrays(rebuilt), source=f"rebuilt by {about['origin']}", names=self.held_out.names)
        judge = MoleculeJudge(self.parts.train, self.held_out, cache=self.parts.cache, processes=plan.workers)
        reconstruction, generation = judge.reconstruction(again), judge.generation(molecules)
        protocol = {
            "model": about,
            **self._sections(drawing),
            "definitions": DEFINITIONS,
            "warnings": self._warnings(drawing),
            "environment": environment(self.world, time.monotonic() - began),
        }
        metrics = reconstruction.metrics | generation.metrics
        return Evaluation(metrics, protocol, judge, molecules, generation, again, reconstruction)

    def generate(self, model: MoleculeUnite, drawing: Drawing, count: int) -> MoleculeSet:
        """The first molecules that `measure` judges, on this rank alone."""
        batch = self.plan.batch
        spans = ((first, min(first + batch, count)) for first in range(0, count, batch))
        return joined([self._piece(model, drawing, *span) for span in spans], "generated on the way")

    def _piece(self, model: MoleculeUnite, drawing: Drawing, first: int, stop: int) -> Drawn:
        """Molecules number first … stop − 1; bins in turn, atom counts from their training histograms."""
        seed, classes = self.plan.seed + 1, len(drawing.classes)
        numbers = torch.arange(first, stop)
        rows = np.atleast_2d(drawing.histogram)
        rows = rows[numbers.numpy() % len(rows)]
        counts = torch.from_numpy(draw_counts(rows, stop - first, seed=seed, first=first))
        labels = numbers % classes if classes else None
        return generate(model, counts, labels, seed=seed, first=first, **drawing.sampling)

    def _sections(self, drawing: Drawing) -> dict[str, Any]:
        """The protocol's sections that `protocol.MOLECULES` refers to."""
        plan = self.plan
        network = {"seed": plan.seed, "precision": "fp32"}
        return {
            "generation": {
                "count": plan.samples, **network, **_json(drawing)["sampling"], "classes": len(drawing.classes),
                "atoms": f"training histogram {digest(drawing.histogram)}",
            },
            "reconstruction": network,
            "held_out": {
                "source": self.held_out.source, "count": len(self.held_out),
                "sha256": self._hash("held_out", self.held_out),
            },
            "training": {
                "source": self.parts.train.source, "count": len(self.parts.train),
                "sha256": self._hash("train", self.parts.train),
            },
            "perception": {"rdkit": metadata.version("rdkit"), "seconds": SECONDS},
        }  # fmt: skip

    def _warnings(self, drawing: Drawing) -> list[str]:
        mine = np.bincount(self.parts.train.counts, minlength=MAX_ATOMS + 1)
        if np.array_equal(mine, np.atleast_2d(drawing.histogram).sum(0)):
            return []
        return [
            f"the training part of {self.parts.train.source} is not what the model was trained on: rdkit/novel and "
            f"figures of held-out molecules are of this set"
        ]

    def _hash(self, name: str, molecules: MoleculeSet) -> str:
        """SHA-256 of the molecules, computed once."""
        if name not in self._hashes:
            self._hashes[name] = content_hash(molecules)
        return self._hashes[name]


def plan_of(evaluation: MoleculeEvaluationConfig, seed: int) -> Plan:
    """How much a configuration measures."""
    return Plan(
        samples=evaluation.samples, reconstructions=evaluation.reconstructions, seed=seed, batch=evaluation.batch,
        workers=evaluation.workers or None,
    )  # fmt: skip


def joined(pieces: Sequence[Drawn], source: str, names: tuple[str, ...] | None = None) -> MoleculeSet:
    """One set of pieces."""
    padded = [_padded(piece) for piece in pieces]
    whole = {name: torch.cat([piece[name] for piece in padded]) for name in padded[0]}
    return from_arrays(**_arrays(whole), source=source, names=names)


def _padded(drawn: Drawn) -> dict[str, Tensor]:
    """elements [B, 29] uint8 and positions [B, 29, 3] of a piece."""
    more = MAX_ATOMS - drawn.elements.shape[1]
    return {
        "elements": torch.nn.functional.pad(drawn.elements, (0, more)),
        "positions": torch.nn.functional.pad(drawn.positions.float(), (0, 0, 0, more)),
    }


def _arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _json(drawing: Drawing) -> dict[str, Any]:
    """The drawing as JSON."""
    sampling = drawing.sampling | {"interval": list(drawing.sampling["interval"])}
    return {"sampling": sampling, "histogram": drawing.histogram, "classes": list(drawing.classes)}
