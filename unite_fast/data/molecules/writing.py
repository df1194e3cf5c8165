"""Molecules out: extended XYZ, and SDF with perceived bonds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rdkit import Chem

from unite_fast.data.molecules.molecule_set import SYMBOLS, MoleculeSet
from unite_fast.data.molecules.perception import Perceived, perceive_all, with_bonds
from unite_fast.weights import write_text


def write_xyz(molecules: MoleculeSet, path: str | Path) -> None:
    """Write extended XYZ, one frame a molecule, with its name and, where known, its gap in eV.

    Raises:
        UserError: a path that cannot be written.
    """
    lines = []
    for index, name in enumerate(molecules.names):
        comment = f"Properties=species:S:1:pos:R:3 name={_quoted(name)}"
        if molecules.gap is not None and np.isfinite(molecules.gap[index]):
            comment += f" gap={molecules.gap[index]:.6g}"
        elements, positions = molecules.atoms(index)
        lines += [str(len(elements)), comment]
        lines += [
            f"{SYMBOLS[code - 1]:<2} {x:12.6f} {y:12.6f} {z:12.6f}"
            for code, (x, y, z) in zip(elements, positions.tolist(), strict=True)
        ]
    write_text("\n".join(lines) + "\n", path)


def write_sdf(molecules: MoleculeSet, path: str | Path, perceived: Sequence[Perceived] | None = None) -> None:
    """Write V2000 SDF records, with bonds and charges where perception succeeds and none where it fails.

    Each record carries `valid` (0 or 1), `fragments` and `smiles` as `perceive` gives them.

    Args:
        molecules: n of them.
        path: the file.
        perceived: what perception found for each; None perceives here.

    Raises:
        UserError: a path that cannot be written.
    """
    if perceived is None:
        perceived = perceive_all(molecules)
    text = io.StringIO()
    writer = Chem.SDWriter(text)
    for index, (name, found) in enumerate(zip(molecules.names, perceived, strict=True)):
        molecule = with_bonds(*molecules.atoms(index), found)
        molecule.SetProp("_Name", " ".join(name.split()))
        molecule.SetIntProp("valid", int(found.valid))
        molecule.SetIntProp("fragments", found.fragments)
        molecule.SetProp("smiles", found.smiles)
        writer.write(molecule)
    writer.close()
    write_text(text.getvalue(), path)


def _quoted(text: str) -> str:
    text = " ".join(text.split()).replace('"', "'")
    return f'"{text}"' if " " in text or not text else text
