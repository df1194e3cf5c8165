"""How a model reads a molecule: the order of its atoms and the frame of their coordinates.

A model is neither invariant under permutations nor under rotations, so a molecule it is shown later must be arranged as
those it was trained on, and what it makes of it is put back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.molecules.molecule_set import MAX_ATOMS, MoleculeSet
from unite_fast.data.molecules.perception import Perceived, canonical_order, perceive_all, with_bonds

log = logging.getLogger("unite_fast.data")

Order = Literal["file", "canonical"]
Orientation = Literal["random", "aligned"]
HYDROGEN = 1
# Distance of the third atom from the axis of the first two: a bond of 1.0 Å or more at the 100° to 130° of small
# molecules leaves 0.75 Å, the bend of a force field's linear chain less than 0.2 Å.
OFF_AXIS = 0.5


@dataclass(frozen=True)
class Arrangement:
    """What was done to the molecules of a set, and how to undo it.

    Attributes:
        order: [n, 29] int64; atom i of an arranged molecule was atom order[i] before. Padding keeps its place.
        axes: [n, 3, 3] float64; the columns are the arranged frame's axes as the molecule had them before.
    """

    order: NDArray[np.int64]
    axes: NDArray[np.float64]

    def undo(self, molecules: MoleculeSet) -> MoleculeSet:
        """Molecules in the arranged order and frame -> in those from before."""
        inverse = np.argsort(self.order, axis=1)
        positions = np.einsum("nak,njk->naj", molecules.positions.astype(np.float64), self.axes)
        return replace(
            molecules,
            elements=np.take_along_axis(molecules.elements, inverse, 1),
            positions=np.take_along_axis(positions, inverse[..., None], 1).astype(np.float32),
        )


def arrange(
    molecules: MoleculeSet, order: Order, orientation: Orientation, perceived: Sequence[Perceived] | None = None
) -> tuple[MoleculeSet, Arrangement]:
    """Molecules as a model of that order and orientation reads them.

    Args:
        order: "file" leaves the atoms as they are, "canonical" sorts them as `canonical`.
        orientation: "random" leaves the coordinates as they are, "aligned" turns them as `aligned`.
        perceived: what `perceive_all` gives for the molecules, where that is known already.
    """
    places = np.tile(np.arange(MAX_ATOMS), (len(molecules), 1))
    axes = np.tile(np.eye(3), (len(molecules), 1, 1))
    if order == "canonical":
        molecules, places = canonical(molecules, perceived)
    if orientation == "aligned":
        molecules, axes = aligned(molecules)
    return molecules, Arrangement(places, axes)


def canonical(
    molecules: MoleculeSet, perceived: Sequence[Perceived] | None = None
) -> tuple[MoleculeSet, NDArray[np.int64]]:
    """Atoms in RDKit's canonical order on perceived bonds (see `canonical_order`), and where each was: [n, 29].

    A molecule whose bonds cannot be perceived keeps its order, and is counted in a warning.
    """
    places = np.tile(np.arange(MAX_ATOMS), (len(molecules), 1))
    unperceived = 0
    known = perceive_all(molecules, what="ordering atoms") if perceived is None else perceived
    for index, found in enumerate(known):
        if not found.valid:
            unperceived += 1
            continue
        order = canonical_order(with_bonds(*molecules.atoms(index), found))
        places[index, : len(order)] = order
    if unperceived:
        log.warning("%d of %d molecules keep their order: no bonds perceived", unperceived, len(molecules))
    elements = np.take_along_axis(molecules.elements, places, 1)
    positions = np.take_along_axis(molecules.positions, places[..., None], 1)
    return replace(molecules, elements=elements, positions=positions), places


def aligned(molecules: MoleculeSet) -> tuple[MoleculeSet, NDArray[np.float64]]:
    """Molecules in frames of their own, and the frames' axes as columns [n, 3, 3].

    x points from the first heavy atom to the second, y towards the next one off that axis, z = x × y; the centre stays.
    Hydrogens serve where heavy atoms do not suffice. A generator then needs to learn no orientations: every molecule
    has one, fixed by atoms whose places in the order are fixed. Mirror images stay apart.
    """
    rows = np.arange(len(molecules))
    positions = molecules.positions.astype(np.float64)
    # Rank of each atom as an anchor: heavy atoms in their order, then hydrogens, then padding.
    rank = np.arange(MAX_ATOMS) + MAX_ATOMS * (molecules.elements == HYDROGEN) + 2 * MAX_ATOMS * ~molecules.mask
    first, second = np.argsort(rank, axis=1)[:, :2].T
    origin = positions[rows, first]
    towards = positions[rows, second] - origin
    apart = np.linalg.norm(towards, axis=1) > OFF_AXIS  # not where there is one atom
    x = _unit(np.where(apart[:, None], towards, (1.0, 0.0, 0.0)))
    away = positions - origin[:, None]
    away -= np.einsum("nak,nk->na", away, x)[..., None] * x[:, None]
    usable = molecules.mask & (np.linalg.norm(away, axis=2) > OFF_AXIS)
    third = np.where(usable, rank, 3 * MAX_ATOMS).argmin(1)
    # All on one line: any direction across it, as a turn about the line changes nothing.
    across = np.eye(3)[np.abs(x).argmin(1)]
    across -= (across * x).sum(1, keepdims=True) * x
    y = _unit(np.where(usable.any(1)[:, None], away[rows, third], across))
    axes = np.stack([x, y, np.cross(x, y)], axis=2)
    return replace(molecules, positions=(positions @ axes).astype(np.float32)), axes


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
