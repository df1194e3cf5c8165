"""What looks like a mistake in a set of molecules that was read, though every file is in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.molecules.molecule_set import MoleculeSet

LOOKED_AT = 1000  # molecules, so that QM9 takes no seconds
# Å. H2 has 0.74; coordinates in nm give 0.11, in bohr 2.1, without hydrogens 1.4.
NEAREST = 0.6, 1.3
# eV. Hartrees taken for eV stay below 0.6; kcal/mol, and eV taken for Hartrees, begin above 30.
GAPS = 0.6, 30.0


def doubts(molecules: MoleculeSet) -> list[str]:
    """What looks like a mistake of units or missing hydrogens in a set, which no single molecule gives away."""
    found = []
    some = np.linspace(0, len(molecules) - 1, min(len(molecules), LOOKED_AT)).astype(np.int64)
    nearest = [_nearest(molecules.atoms(index)[1]) for index in some if molecules.counts[index] > 1]
    apart = float(np.median(np.concatenate(nearest))) if nearest else None
    if apart is not None and not NEAREST[0] < apart < NEAREST[1]:
        found.append(
            f"the nearest atom is {apart:.2f} Å away in the median, where molecules with all their hydrogens have "
            f"about 1.1 Å: are the coordinates in Å (not bohr or nm), and all hydrogens there?"
        )
    gap = None if molecules.gap is None else float(np.nanmedian(molecules.gap))
    if gap is not None and not GAPS[0] < gap < GAPS[1]:
        found.append(
            f"the gap is {gap:.3g} eV in the median, where molecules of these elements have some 3 to 15 eV: gaps are "
            f"read in eV, those of a table FILE.sdf.csv in Hartree"
        )
    return found


def _nearest(positions: NDArray[np.float32]) -> NDArray[np.float64]:
    """Distance of each atom [n] to its nearest neighbour: positions [n, 3], n at least 2."""
    points = positions.astype(np.float64)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    return apart.min(1)
