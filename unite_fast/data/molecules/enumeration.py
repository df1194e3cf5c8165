"""Small C/N/O/F molecules drawn as random valence-correct graphs, each from nothing but (seed, number)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rdkit import Chem, RDLogger

from unite_fast.data.sampler import counter_hash

# First word of every hash, apart from those of unite_fast.data.sampler (1, 2, 3).
_GRAPH = 11
VALENCE = {6: 4, 7: 3, 8: 2, 9: 1}
HEAVY_ATOMS = (4, 5, 6, 7, 8, 9)
# Rising with size, as the number of distinct molecules does; QM9 holds 85 % of nine heavy atoms, whose long hydrogen
# tails a small network learns slowly.
HEAVY_ATOM_WEIGHTS = (1, 2, 4, 6, 7, 7)
ELEMENT_WEIGHTS = {6: 0.72, 7: 0.12, 8: 0.14, 9: 0.02}  # QM9's heavy atoms: 72, 12, 16 and 0.3 %
RING_WEIGHTS = (0.30, 0.40, 0.22, 0.08)  # 0, 1, 2, 3 ring closures
RING_SIZE_WEIGHTS = {3: 0.7, 4: 0.6, 5: 3.0, 6: 4.0}
UNSATURATION_WEIGHTS = (0.30, 0.30, 0.18, 0.22)  # 0, 1, 2, 3 bond orders added
# Motifs that are explosive, that MMFF94 has no good parameters for, or whose rings cannot close.
UNWANTED = tuple(
    Chem.MolFromSmarts(smarts)
    for smarts in (
        "[O]-[O]",
        "[N,O]-[F]",
        "[#7]~[#7]~[#7]",
        "[O]-[N]-[O]",
        "[*]=[*]=[*]",  # cumulated double bonds
        "C#C[O,F]",
        "[*;R]#[*;R]",
        "[r3]=[r3]",  # cyclopropenes
        "[r4]=[r4]",  # cyclobutenes
        "[R3]",  # an atom in three small rings: tetrahedranes and propellanes
        "*1~*2~*~1~*~2",  # bicyclobutanes
        "[a;r3,r4]",  # aromatic atoms in small rings
    )
)


def candidates(seed: int) -> Iterator[str]:
    """Endless canonical SMILES of distinct molecules of 4 to 9 heavy atoms, in an order that only the seed decides."""
    RDLogger.DisableLog("rdApp.*")
    seen: set[str] = set()
    number = 0
    while True:
        smiles = candidate(seed, number)
        number += 1
        if smiles is not None and smiles not in seen:
            seen.add(smiles)
            yield smiles


def candidate(seed: int, number: int) -> str | None:
    """Canonical SMILES of the numbered draw, or None where it violates a rule of `UNWANTED`."""
    random = np.random.Generator(np.random.Philox(int(counter_hash(_GRAPH, seed, number)[0])))
    graph = _graph(random)
    molecule = Chem.RWMol()
    for element in graph.elements:
        molecule.AddAtom(Chem.Atom(element))
    for (first, second), order in graph.bonds.items():
        molecule.AddBond(first, second, Chem.BondType.values[order])
    if Chem.SanitizeMol(molecule, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
        return None
    if any(molecule.HasSubstructMatch(pattern) for pattern in UNWANTED) or _bredt(molecule):
        return None
    # Written, read and written again: a first SMILES may keep traces of the order in which the graph was drawn.
    again = Chem.MolFromSmiles(Chem.MolToSmiles(molecule))
    return None if again is None else Chem.MolToSmiles(again)


class _Graph:
    """Heavy atoms and bonds under construction."""

    def __init__(self, first: int):
        self.elements = [first]
        self.bonds: dict[tuple[int, int], int] = {}
        self.free = [VALENCE[first]]

    def add(self, element: int, to: int) -> None:
        self.elements.append(element)
        self.free.append(VALENCE[element])
        self.bond(to, len(self.elements) - 1)

    def bond(self, first: int, second: int) -> None:
        """Add one to the order of a bond."""
        key = (min(first, second), max(first, second))
        self.bonds[key] = self.bonds.get(key, 0) + 1
        self.free[first] -= 1
        self.free[second] -= 1

    def distances(self) -> np.ndarray:
        """Shortest paths between all pairs of atoms, in bonds (Floyd and Warshall)."""
        count = len(self.elements)
        paths = np.full((count, count), count, np.int64)
        np.fill_diagonal(paths, 0)
        for first, second in self.bonds:
            paths[first, second] = paths[second, first] = 1
        for middle in range(count):
            paths = np.minimum(paths, paths[:, middle, None] + paths[None, middle])
        return paths


def _graph(random: np.random.Generator) -> _Graph:
    """A random tree, some rings closed, some bond orders raised, never above a valence."""
    size = _pick(random, HEAVY_ATOMS, HEAVY_ATOM_WEIGHTS)
    graph = _Graph(6)
    while len(graph.elements) < size:
        element = _pick(random, ELEMENT_WEIGHTS.keys(), ELEMENT_WEIGHTS.values())
        places = [i for i, free in enumerate(graph.free) if free and (element == 6 or graph.elements[i] == 6)]
        if not places:
            break  # saturated, or heteroatoms at every open end: a smaller molecule
        graph.add(element, places[random.integers(len(places))])
    for _ in range(_pick(random, range(4), RING_WEIGHTS)):
        paths = graph.distances()
        pairs = [
            (i, j)
            for j in range(len(graph.elements))
            for i in range(j)
            if graph.free[i] and graph.free[j] and paths[i, j] + 1 in RING_SIZE_WEIGHTS
        ]
        if pairs:
            graph.bond(*_pick(random, pairs, [RING_SIZE_WEIGHTS[int(paths[pair]) + 1] for pair in pairs]))
    for _ in range(_pick(random, range(4), UNSATURATION_WEIGHTS)):
        flat = {i for bond, order in graph.bonds.items() if order > 1 for i in bond}
        open_bonds = [
            bond
            for bond, order in graph.bonds.items()
            if all(graph.free[i] for i in bond) and (order == 2 or not flat.intersection(bond))
        ]
        if open_bonds:
            graph.bond(*open_bonds[random.integers(len(open_bonds))])
    return graph


def _pick(random: np.random.Generator, values, weights):
    values, weights = list(values), np.fromiter(weights, float)
    return values[int(np.searchsorted(np.cumsum(weights) / weights.sum(), random.random(), side="right"))]


def _bredt(molecule: Chem.Mol) -> bool:
    """Whether a double bond sits at a bridgehead, or a triple bond in a ring: both tear ETKDG's small cages."""
    rings = molecule.GetRingInfo()
    bridgeheads = _bridgeheads(rings)
    for bond in molecule.GetBonds():
        if bond.GetBondTypeAsDouble() > 1 and bond.IsInRing():
            if bond.GetBondTypeAsDouble() == 3:
                return True
            if bond.GetBeginAtomIdx() in bridgeheads or bond.GetEndAtomIdx() in bridgeheads:
                return True
    return False


def _bridgeheads(rings: Chem.RingInfo) -> set[int]:
    """Ends of every path of two or more bonds that two rings share."""
    found: set[int] = set()
    atoms, bonds = rings.AtomRings(), rings.BondRings()
    for i in range(len(bonds)):
        for j in range(i):
            shared_bonds = set(bonds[i]) & set(bonds[j])
            if len(shared_bonds) > 1:
                found |= set(atoms[i]) & set(atoms[j])
    return found
