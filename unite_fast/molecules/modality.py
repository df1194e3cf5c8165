"""Molecules as a modality of the trainer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

from unite_fast.analysis.extent import Extent, Population
from unite_fast.engine.batch import Batch
from unite_fast.engine.engine import Engine
from unite_fast.engine.report import Report
from unite_fast.engine.world import World
from unite_fast.modality import Inputs
from unite_fast.model.packing import Packed
from unite_fast.molecules.config import MAX_ATOMS, MoleculeConfig, MoleculeModelConfig
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.objective import MoleculeObjective, Molecules, rotate

if TYPE_CHECKING:
    from unite_fast.analysis.isolated import Isolated
    from unite_fast.analysis.launches import Launches
    from unite_fast.analysis.parts import Dtype, Part
    from unite_fast.molecules.stream import MoleculeBatch, MoleculeStream


class Molecular:
    """Molecules with coordinates; see `unite_fast.modality.Modality`."""

    name, unit, alike, sizes, network = "molecules", "molecules", False, MoleculeModelConfig, MoleculeUnite

    def objective(
        self, config: MoleculeConfig, device: torch.device, autocast: torch.dtype | None
    ) -> MoleculeObjective:
        return MoleculeObjective(config.objective, config.model.num_classes)

    def absent_files(self, config: MoleculeConfig, device: torch.device) -> list[str]:
        return []

    def evaluation_files(self, config: MoleculeConfig, device: torch.device) -> None:
        """None: their figures need no files."""

    def stream(self, config: MoleculeConfig, batch: Batch, world: World, *, start_step: int) -> MoleculeStream:
        from unite_fast.molecules.stream import MoleculeStream, load_for_all  # need RDKit, which using a model does not

        return MoleculeStream(
            load_for_all(config.data, world),
            condition=config.data.condition,
            num_classes=config.model.num_classes,
            seed=config.train.seed,
            batch=batch,
            world=world,
            start_step=start_step,
        )

    def samples(self, stream: MoleculeStream) -> dict[str, int | str]:
        train = stream.parts.train
        digest = hashlib.blake2b("\0".join(train.names).encode(errors="surrogatepass"), digest_size=16)
        digest.update(train.elements.tobytes())  # files without names number their molecules
        return {"count": len(train), "digest": digest.hexdigest()}

    def inputs(self, config: MoleculeConfig, micro_batch: MoleculeBatch, batch: Batch, world: World) -> Inputs:
        device = world.device
        packed = Packed.of(micro_batch.counts, length=micro_batch.elements.shape[1], device=device)
        molecules = Molecules(
            packed.pack(micro_batch.elements.to(device, non_blocking=True)).long(),
            packed.pack(micro_batch.positions.to(device, non_blocking=True)),
            packed,
        )
        if config.data.orientation == "random":
            stream = world.rank * batch.accumulation + micro_batch.micro_batch
            molecules = rotate(molecules, seed=config.train.seed, step=micro_batch.step, stream=stream)
        shape = torch.Size((*micro_batch.elements.shape, config.model.latent_dim))
        labels = micro_batch.labels.to(device, non_blocking=True)
        return Inputs(molecules, labels, shape, micro_batch.weight, Extent.of(micro_batch.counts))

    def probe(self, config: MoleculeConfig, size: int, device: torch.device) -> Inputs:
        packed = Packed.of(torch.full((size,), MAX_ATOMS), device=device)
        atoms = size * MAX_ATOMS
        elements = torch.ones(atoms, dtype=torch.int64, device=device)
        molecules = Molecules(elements, torch.randn(atoms, 3, device=device), packed)
        shape = torch.Size((size, MAX_ATOMS, config.model.latent_dim))
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        return Inputs(molecules, labels, shape, 1.0, self.largest(config, size))

    def population(self, config: MoleculeConfig) -> Population:
        from unite_fast.molecules.population import population

        return population(config.data)

    def largest(self, config: MoleculeConfig, size: int) -> Extent:
        return Extent(size, size * MAX_ATOMS, size * MAX_ATOMS**2)

    def has_data(self, config: MoleculeConfig) -> bool:
        return config.data.path is None or Path(config.data.path).exists()

    def isolated(
        self, config: MoleculeConfig, model: MoleculeUnite, objective: MoleculeObjective, inputs: Inputs, draws: int
    ) -> dict[str, Isolated]:
        from unite_fast.molecules.isolated import molecule_parts

        return molecule_parts(config, model, objective, inputs, draws)

    def counted(
        self, config: MoleculeConfig, extent: Extent, *, dtype: Dtype, device: Literal["cuda", "cpu"]
    ) -> dict[str, tuple[Part, int]]:
        from unite_fast.molecules.counts import packed_parts

        parts = packed_parts(
            config.model, config.objective, extent, dtype=dtype, device=device, fp8=config.train.fp8
        )
        return {name: (part, 1) for name, part in parts.items()}

    def launches(self, config: MoleculeConfig) -> Launches:
        from unite_fast.analysis.launches import Launches

        return Launches(reconstruct=233, flow=99)

    def report(
        self, config: MoleculeConfig, folder: Path, world: World, engine: Engine, stream: MoleculeStream, files: None
    ) -> Report:
        from unite_fast.molecules.report import MoleculeReport

        return MoleculeReport(config, folder, world, engine, stream)

    def commands(self) -> ModuleType:
        from unite_fast.molecules import commands

        return commands
