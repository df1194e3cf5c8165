"""What a run on molecules leaves for people: sheets, histograms, a page of 3-D views, files, and every metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unite_fast.data.molecules.perception import perceive_all
from unite_fast.engine.engine import Engine
from unite_fast.engine.report import Report
from unite_fast.engine.world import World
from unite_fast.evaluation.protocol import FOLDER, WORK
from unite_fast.evaluation.record import about_model, default_name, write_record
from unite_fast.evaluation.work import Work
from unite_fast.molecules.config import MoleculeConfig
from unite_fast.molecules.evaluation import PICTURES, Drawing, MoleculeEvaluator, plan_of
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.stream import MoleculeStream
from unite_fast.pictures_molecules import molecule_sheet


class MoleculeReport(Report):
    """Pictures and metrics of a run on molecules: molecules are made by all ranks, judged and drawn on the main one."""

    config: MoleculeConfig
    shown = (
        "reconstruction/element_accuracy", "reconstruction/rmsd", "reconstruction/match", "reconstruction/match_real",
        "rdkit/valid", "rdkit/valid_real", "rdkit/connected", "rdkit/connected_real", "rdkit/unique", "rdkit/novel",
        "rdkit/valid_connected_unique", "edm/atom_stable", "edm/atom_stable_real", "distance/bond_lengths",
    )  # fmt: skip
    sheets = (*PICTURES, (FOLDER, "every metric with its protocol"))

    def __init__(
        self, config: MoleculeConfig, folder: Path, world: World, engine: Engine, stream: MoleculeStream
    ):
        self._parts = stream.parts
        super().__init__(config, folder, world, engine, stream.classes, stream.mode)

    def _prepare(self) -> None:
        plan = plan_of(self.config.evaluation, self.config.train.seed)
        self._evaluator = MoleculeEvaluator(plan, self._parts, self.world)
        self._drawing = Drawing(self._sampling(), self._data["atom_histogram"], self.classes)

    def _sheets(self, model: MoleculeUnite, suffix: str) -> None:
        """The sheet of generated molecules; at the end the metrics draw the rest, from what they perceive."""
        if suffix:
            made = self._evaluator.generate(model, self._drawing, self.config.evaluation.sheet)
            perceived = perceive_all(made, processes=self._evaluator.plan.workers)
            molecule_sheet(made, perceived, self.folder / f"samples{suffix}.png")

    def due(self, step: int, steps_per_epoch: float) -> bool:
        """Never: molecules are judged at the end."""
        return False

    def _measure(self, model: MoleculeUnite, step: int) -> dict[str, Any]:
        folder = self.folder / FOLDER
        work = Work(folder / WORK, self.world, unit="molecules")
        about = about_model(model.state_dict(), str(self.folder), self._made_by(step))
        found = self._evaluator.measure(model, about, self._drawing, work)
        if found is None:
            return {}
        found.draw(self.folder, f"Molecules of {self.config.name}", sheet=self.config.evaluation.sheet)
        write_record(folder / f"{default_name(found.protocol)}.json", found.metrics, found.protocol)
        work.discard()
        return found.metrics | {"data": self._parts.train.source}
