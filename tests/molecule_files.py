"""Molecules in the formats of QM9's files, written here as the originals are: tabs, Mathematica's exponents and all."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from unite_fast.data.molecules.molecule_set import CODE_OF_SYMBOL, SYMBOLS, Molecule, MoleculeSet, assemble

# Water, methane, ammonia and others small enough to be read in a test's failure; positions in Å.
WATER = ("OHH", [[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]])
METHANE = (
    "CHHHH",
    [[0, 0, 0], [0.629, 0.629, 0.629], [-0.629, -0.629, 0.629], [-0.629, 0.629, -0.629], [0.629, -0.629, -0.629]],
)


def mathematica(value: float) -> str:
    """A number as QM9 has it: 1.5, or 2.1997*^-6 where it is small."""
    if value and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.4e}".split("e")
        return f"{mantissa}*^{int(exponent)}"
    return f"{value:.10f}"


def qm9_text(molecules: MoleculeSet, row: int, index: int, gap: float = 0.25, end: str = "\n") -> str:
    """One dsgdb9nsd file; its SMILES and InChI are made up."""
    elements, positions = molecules.atoms(row)
    properties = [157.7, 157.7, 157.7, 0.0, 13.2, -0.38, 0.11, gap, 35.3, 0.04, -40.4, -40.4, -40.4, -40.4, 6.4]
    lines = [str(len(elements)), f"gdb {index}\t" + "\t".join(f"{value:g}" for value in properties) + "\t"]
    for code, point in zip(elements, positions.astype(float), strict=True):
        lines.append("\t".join([SYMBOLS[code - 1], *map(mathematica, point), mathematica(-2.5e-5)]))
    lines += ["1341.307\t1562.6792\t3151.7060", "C\tO\t", f"InChI=1S/{index}\tInChI=1S/{index}"]
    return end.join(lines) + end


def qm9_folder(tmp_path: Path, molecules: MoleculeSet, end: str = "\n") -> Path:
    """A folder of QM9's XYZ files, of every third index."""
    folder = tmp_path / "xyz"
    folder.mkdir()
    for row in range(len(molecules)):
        index = 3 * row + 1
        text = qm9_text(molecules, row, index, 0.1 + row / 100, end)
        (folder / f"dsgdb9nsd_{index:06d}.xyz").write_bytes(text.encode())
    return folder


def sdf_text(molecules: MoleculeSet, row: int, title: str, end: str = "\n") -> str:
    """One gdb9.sdf record, with wrong bonds: every atom bonded to the first one."""
    elements, positions = molecules.atoms(row)
    count = len(elements)
    lines = [title, "  -OEChem-03231823283D", "", f"{count:3d}{count - 1:3d}  0     0  0  0  0  0  0999 V2000"]
    for code, (x, y, z) in zip(elements, positions, strict=True):
        lines.append(f"{x:10.4f}{y:10.4f}{z:10.4f} {SYMBOLS[code - 1]:<3} 0  5  0  0  0  0  0  0  0  0  0  0")
    lines += [f"  1{atom:3d}  3  0  0  0  0" for atom in range(2, count + 1)]
    return end.join([*lines, "M  END", "$$$$"]) + end


def uncharacterized_text(indices: list[int]) -> str:
    """The list of molecules that failed the consistency check, with a header that holds numbers."""
    header = [
        "3054 molecules failed",
        "the check of 2014 , see text",
        "",
        " Index  SMILES_GDB  SMILES_geo  a b c",
        "-" * 30,
    ]
    rows = [f"  {index}  CC(=O)N   C[C](O)[NH3+]     0.1  2.0  3" for index in indices]
    return "\n".join([*header, *rows, "  "]) + "\n"


def coordinates_close(found: MoleculeSet, expected: MoleculeSet, tolerance: float) -> None:
    """Same elements and, within `tolerance` Å, the same positions."""
    np.testing.assert_array_equal(found.elements, expected.elements)
    np.testing.assert_allclose(found.positions, expected.positions, atol=tolerance)


def small(*molecules):
    return assemble(
        [Molecule(str(i), [CODE_OF_SYMBOL[s] for s in symbols], xyz) for i, (symbols, xyz) in enumerate(molecules)], "t"
    )


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, text in members:
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path
