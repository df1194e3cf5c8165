"""Bonds from coordinates: RDKit's Hückel perception, in worker processes that a hang or a crash cannot take along."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, RDLogger
from rdkit.Chem import rdDetermineBonds

from unite_fast.data.molecules.molecule_set import ATOMIC_NUMBERS, MoleculeSet, content_hash
from unite_fast.errors import UserError
from unite_fast.progress import track
from unite_fast.replacing import replacing_file
from unite_fast.workers import Lost, bounded_map

log = logging.getLogger("unite_fast.molecules")

# A molecule takes 4 to 7 ms and a bad geometry up to 30; what takes a thousand times that is lost in the search for
# bond orders.
SECONDS = 10.0


class Perceived(NamedTuple):
    """What perception made of a molecule."""

    valid: bool  # bonds of a neutral, sanitised molecule were found
    reason: str  # why not, else empty
    fragments: int  # connected parts; 0 if not valid
    smiles: str  # canonical, without stereochemistry; empty if not valid
    inchi: str  # standard InChI with the stereochemistry of the coordinates; empty if not valid
    bonds: tuple[tuple[int, int, int], ...]  # atom, atom, Kekulé order 1 … 3
    charges: tuple[int, ...]  # [n] formal charges

    @property
    def connected(self) -> bool:
        """Whether the molecule is valid and of one piece."""
        return self.fragments == 1


def failed(reason: str) -> Perceived:
    """The answer for a molecule without one."""
    return Perceived(False, reason, 0, "", "", (), ())


def perceive(atoms: tuple[NDArray[np.uint8], NDArray[np.float32]]) -> Perceived:
    """Perceive one molecule in this process, without any limit of time.

    rdDetermineBonds with the extended Hückel method, total charge 0, charged fragments allowed; it sanitises.

    Args:
        atoms: element codes [n] and positions [n, 3] in Å.
    """
    RDLogger.DisableLog("rdApp.*")
    molecule = bare(*atoms)
    try:
        rdDetermineBonds.DetermineBonds(
            molecule, useHueckel=True, charge=0, allowChargedFragments=True, embedChiral=True
        )
        Chem.SanitizeMol(molecule)
        inchi = Chem.MolToInchi(molecule)
        fragments = len(Chem.GetMolFrags(molecule))
        kekulised = Chem.Mol(molecule)
        Chem.Kekulize(kekulised, clearAromaticFlags=True)
        Chem.RemoveStereochemistry(molecule)  # else RemoveHs keeps the hydrogens that a double bond's stereo needs
        smiles = Chem.MolToSmiles(Chem.RemoveHs(molecule), isomericSmiles=False)
    except (ValueError, RuntimeError) as error:  # RDKit's own errors are ValueErrors, its C++ ones RuntimeErrors
        # "Final molecular charge (0) does not match input (-1); could not find …": what counts in a sheet stands last.
        sentence = " ".join(str(error).split()).split(". ")[0].split("; ")[-1]
        return failed(sentence[:100] or type(error).__name__)
    bonds = tuple(
        (bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), int(bond.GetBondTypeAsDouble())) for bond in kekulised.GetBonds()
    )
    charges = tuple(atom.GetFormalCharge() for atom in molecule.GetAtoms())
    return Perceived(True, "", fragments, smiles, inchi, bonds, charges)


def perceive_all(
    molecules: MoleculeSet, *, what: str = "perceiving bonds", seconds: float = SECONDS, processes: int | None = None
) -> list[Perceived]:
    """Perceive every molecule of a set, in order, with progress; a timeout or a crash is an invalid molecule.

    Args:
        molecules: n of them.
        what: a few words for the progress display.
        seconds: limit for one molecule, by the clock.
        processes: workers, by default one a core.
    """
    work = [molecules.atoms(index) for index in range(len(molecules))]
    with track(what, len(work)) as advance:
        found = [
            failed(str(result)) if isinstance(result, Lost) else result
            for result in bounded_map(perceive, work, seconds=seconds, processes=processes, advance=advance)
        ]
    lost = sum(result.reason in set(Lost) for result in found)
    if lost:
        log.warning("%d of %d molecules hung or crashed bond perception and count as invalid", lost, len(found))
    return found


def perceived_smiles(
    molecules: MoleculeSet, *, cache: str | Path | None = None, seconds: float = SECONDS, **options: Any
) -> list[str]:
    """SMILES that `perceive_all` gives for every molecule of a set, empty where it fails.

    Args:
        molecules: n of them.
        cache: folder that keeps them for the next time; without it, or where it cannot be written, they are not kept.
        seconds, options: as `perceive_all`.
    """
    by = f"{metadata.version('rdkit')} {seconds:g} {content_hash(molecules)}"
    file = None if cache is None else Path(cache) / f"smiles_{hashlib.sha256(by.encode()).hexdigest()[:16]}.json"
    if file is not None:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or cut off by a crash
            return json.loads(file.read_text())
    perceived = perceive_all(molecules, seconds=seconds, **options)
    found = [one.smiles for one in perceived]
    # What a busy machine was too slow for is asked again.
    if file is not None and all(one.reason not in set(Lost) for one in perceived):
        try:
            with replacing_file(file) as temporary:
                temporary.write_text(json.dumps(found))
        except UserError as error:
            log.warning("%s; the next evaluation perceives these molecules again", error)
    return found


def bare(elements: NDArray[np.uint8], positions: NDArray[np.float32]) -> Chem.RWMol:
    """An RDKit molecule of atoms [n] at positions [n, 3] Å, without bonds."""
    molecule = Chem.RWMol()
    for code in elements:
        molecule.AddAtom(Chem.Atom(int(ATOMIC_NUMBERS[code])))
    conformer = Chem.Conformer(len(elements))
    conformer.SetPositions(np.asarray(positions, np.float64))
    conformer.Set3D(True)
    molecule.AddConformer(conformer)
    return molecule


def with_bonds(elements: NDArray[np.uint8], positions: NDArray[np.float32], perceived: Perceived) -> Chem.RWMol:
    """The RDKit molecule that perception found, sanitised; atoms without bonds where it found none."""
    molecule = bare(elements, positions)
    for atom in molecule.GetAtoms():
        # Hydrogens are explicit: what lacks one is a radical, not an invitation to add it. Without bonds an SDF would
        # else be read as so many valid methanes.
        atom.SetNoImplicit(True)
    if not perceived.valid:
        return molecule
    for first, second, order in perceived.bonds:
        molecule.AddBond(first, second, Chem.BondType.values[order])
    for atom, charge in zip(molecule.GetAtoms(), perceived.charges, strict=True):
        atom.SetFormalCharge(charge)
    Chem.SanitizeMol(molecule)
    return molecule


def canonical_order(molecule: Chem.Mol) -> list[int]:
    """Heavy atoms in RDKit's canonical SMILES order, each followed by its hydrogens.

    A generator that knows atoms by their index learns this order better than one with all hydrogens at the end: nearly
    every bond is between neighbours in the order.

    Args:
        molecule: with bonds and explicit hydrogens.
    """
    heavy = Chem.Mol(molecule)
    for atom in heavy.GetAtoms():
        atom.SetIntProp("_place", atom.GetIdx())
    Chem.RemoveStereochemistry(heavy)
    heavy = Chem.RemoveHs(heavy)
    Chem.MolToSmiles(heavy, isomericSmiles=False)
    written = list(heavy.GetPropsAsDict(includePrivate=True, includeComputed=True)["_smilesAtomOutputOrder"])
    places = [heavy.GetAtomWithIdx(index).GetIntProp("_place") for index in written]
    order = []
    for place in places:
        order.append(place)
        neighbours = [neighbour.GetIdx() for neighbour in molecule.GetAtomWithIdx(place).GetNeighbors()]
        # RemoveHs leaves H2 and lone hydrogens, which are among the places then.
        order += [index for index in neighbours if index not in places]
    return order
