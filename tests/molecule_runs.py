"""Small runs on molecules for tests: a set made by RDKit in a tenth of a second, and a configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from unite_fast.config import Config
from unite_fast.data.molecules.molecule_set import CODE_OF_NUMBER, Molecule, MoleculeSet, assemble, write_npz

SMILES = ("C", "O", "N", "CO", "CN", "C=O", "C#N", "CF", "CC", "CC=O", "C1CC1", "OO", "NN", "C#C", "C=C", "COC")
SETTINGS = {
    "modality": "molecules",
    "name": "run",
    "model": {"depth": 2, "width": 32, "heads": 2, "latent_dim": 8, "decoder": {"depth": 1, "width": 32, "heads": 2}},
    "objective": {"flow_draws": 2, "position_weight": 3.0},
    "optimizer": {"lr": 0.01, "lr_batch": None, "ema_decay": 0.9},
    "train": {"steps": 12, "global_batch": 5, "accumulation": 1, "checkpoint_every": 6, "log_every": 4},
    "sampling": {"steps": 4},
    "evaluation": {"samples": 6, "sheet": 4, "batch": 4, "workers": 1},
}


def small_set(copies: int = 2) -> MoleculeSet:
    """Every SMILES `copies` times in geometries of its own, with a made-up gap in eV."""
    found = []
    for seed in range(copies):
        for number, smiles in enumerate(SMILES):
            molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
            rdDistGeom.EmbedMolecule(molecule, randomSeed=1 + seed)
            codes = np.array([CODE_OF_NUMBER[atom.GetAtomicNum()] for atom in molecule.GetAtoms()], np.uint8)
            positions = molecule.GetConformer().GetPositions()
            gap = 4.0 + number / 2 + seed / 100
            found.append(Molecule(f"m{seed}_{number}", codes, positions, gap))
    return assemble(found, "molecules of the tests")


def settings(folder: Path, **sections) -> dict:
    """A complete small configuration on a set written into the folder; sections are merged over it."""
    path = folder / "set.npz"
    if not path.exists():
        write_npz(small_set(), path)
    base = {**SETTINGS, "runs": str(folder / "runs"), "data": {"path": str(path), "cache": str(folder / "cache")}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return base


def config(folder: Path, **sections) -> Config:
    return Config.parse(settings(folder, **sections))
