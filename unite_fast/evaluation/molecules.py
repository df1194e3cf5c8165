"""What generated and reconstructed molecules are worth, every figure beside what real molecules score by its protocol.

A key says its procedure: `edm/…` bonds by EDM's distance table (edm.py), `rdkit/…` bonds by RDKit's Hückel perception
(data/molecules/perception.py), `distance/…` distributions. The same key with `_real` is the ceiling, or for distances
the floor: held-out molecules in place of generated ones, and for distances training molecules against held-out ones.
Molecules are the same if bond perception gives them the same SMILES, training molecules too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.molecules.molecule_set import MAX_ATOMS, SYMBOLS, MoleculeSet
from unite_fast.data.molecules.perception import SECONDS, Perceived, perceive_all, perceived_smiles
from unite_fast.errors import UserError
from unite_fast.evaluation import edm
from unite_fast.workers import Lost

# An element pair with fewer bonds in the held-out molecules says more about them than about the generator.
FEWEST_BONDS = 30


@dataclass(frozen=True)
class Generation:
    """Verdict on generated molecules."""

    metrics: dict[str, float | int]
    perceived: list[Perceived]  # of each molecule, for pictures and files


@dataclass(frozen=True)
class Reconstruction:
    """Verdict on reconstructions."""

    metrics: dict[str, float | int]
    rmsd: NDArray[np.float64]  # [n] Å
    match: NDArray[np.bool_]  # [n]
    perceived: list[Perceived]


class MoleculeJudge:
    """Judges molecules against training and held-out ones.

    Attributes:
        train: training molecules.
        held_out: held-out molecules, m of them.
        held_out_perceived: their bonds.
        train_smiles: distinct SMILES perceived of the training molecules.
    """

    def __init__(
        self,
        train: MoleculeSet,
        held_out: MoleculeSet,
        *,
        cache: str | Path | None = None,
        seconds: float = SECONDS,
        processes: int | None = None,
    ):
        """Perceive the held-out and the training molecules.

        Args:
            train: what the model saw.
            held_out: what it did not.
            cache: folder that keeps what is perceived of the training molecules.
            seconds: limit for perceiving one molecule.
            processes: workers, by default one a core.

        Raises:
            UserError: an empty set.
        """
        if not len(train) or not len(held_out):
            raise UserError(
                f"molecule metrics need training and held-out molecules, got {len(train)} and {len(held_out)}"
            )
        self.train, self.held_out = train, held_out
        self._limits = {"seconds": seconds, "processes": processes}
        self.held_out_perceived = perceive_all(held_out, what="perceiving held-out molecules", **self._limits)
        smiles = perceived_smiles(train, cache=cache, what="perceiving training molecules", **self._limits)
        self.train_smiles = set(smiles) - {""}

    def generation(self, generated: MoleculeSet) -> Generation:
        """Every figure of generated molecules; all shares are of all generated molecules unless said otherwise.

        Returns:
            edm/atom_stable: share of atoms whose bond orders add up to their valence; edm/molecule_stable: share of
                molecules of such atoms only; edm/valid: share whose EDM bonds RDKit sanitises.
            rdkit/valid: share whose bonds are perceived and sanitise; rdkit/connected: valid and of one fragment;
                rdkit/charged: valid with formal charges on atoms, which is how perception explains missing hydrogens;
                rdkit/unique: distinct SMILES among the valid; rdkit/novel: share of those not among the training
                SMILES; rdkit/valid_unique, rdkit/valid_connected_unique, rdkit/valid_connected_unique_novel: distinct
                SMILES that fulfil it all, over all molecules. SMILES are canonical, without stereochemistry.
            distance/atoms, distance/elements: total variation between the histograms of atom counts and of elements and
                the held-out ones, 0 equal, 1 disjoint; distance/bond_lengths: Wasserstein-1 distance in Å between the
                lengths of pairs that EDM calls bonded, by pair of elements, averaged with the held-out weights; a pair
                that is never bonded counts as bonds of length 0.
            rdkit/timeouts: molecules that perception was killed over (they count as invalid); molecules,
                molecules_held_out, molecules_train: the protocol.
        """
        perceived = perceive_all(generated, what="perceiving generated molecules", **self._limits)
        figures: dict[str, float | int] = {}
        real = self._of_real(len(generated))
        judged = self._shares(generated, perceived) | self._distinct(perceived) | self._distances(generated)
        for name, value in judged.items():
            figures[name] = value
            figures[f"{name}_real"] = real[name]
        return Generation(
            figures
            | {
                "rdkit/timeouts": sum(found.reason == Lost.timeout for found in perceived),
                "molecules": len(generated),
                "molecules_held_out": len(self.held_out),
                "molecules_train": len(self.train),
            },
            perceived,
        )

    def reconstruction(self, reconstructed: MoleculeSet) -> Reconstruction:
        """Figures of the held-out molecules' reconstructions, in the same order and with the same atom counts.

        Returns:
            reconstruction/element_accuracy: share of atoms; reconstruction/elements_exact: share of molecules with
                every element right; reconstruction/rmsd: mean over molecules of the root-mean-square distance of atoms
                of the same index after the best proper rotation (Kabsch), in Å, and reconstruction/rmsd_median;
                reconstruction/match: share with the same elements and the same InChI perceived from the coordinates.
                reconstruction/match_real: share of originals with an InChI at all, the ceiling.

        Raises:
            UserError: other molecules than the held-out ones.
        """
        if not np.array_equal(reconstructed.counts, self.held_out.counts):
            raise UserError("reconstructions must be those of the held-out molecules: their atom counts differ")
        perceived = perceive_all(reconstructed, what="perceiving reconstructions", **self._limits)
        equal = reconstructed.elements == self.held_out.elements
        exact = equal.all(1)
        errors = rmsd(reconstructed, self.held_out)
        match = exact & np.array(
            [
                found.valid and found.inchi == original.inchi != ""
                for found, original in zip(perceived, self.held_out_perceived, strict=True)
            ]
        )
        figures: dict[str, float | int] = {
            "reconstruction/element_accuracy": float(equal[self.held_out.mask].mean()),
            "reconstruction/elements_exact": float(exact.mean()),
            "reconstruction/rmsd": float(errors.mean()),
            "reconstruction/rmsd_median": float(np.median(errors)),
            "reconstruction/match": float(match.mean()),
            "reconstruction/match_real": float(np.mean([found.inchi != "" for found in self.held_out_perceived])),
            "reconstruction/molecules": len(errors),
        }
        return Reconstruction(figures, errors, match, perceived)

    def _of_real(self, count: int) -> dict[str, float]:
        """Every figure of real molecules, beside those of `count` generated ones.

        Figures that fall with the number of molecules, shares of distinct ones and distances, are of the same number:
        of fewer where there are not so many held-out or training molecules.
        """
        some = np.random.RandomState(0).permutation(len(self.train))[:count]
        return (
            self._shares(self.held_out, self.held_out_perceived)
            | self._distinct(self.held_out_perceived[:count])
            | self._distances(self.train.select(some))
        )

    def _shares(self, molecules: MoleculeSet, perceived: list[Perceived]) -> dict[str, float]:
        count = len(molecules)
        stable = edm.stable_atoms(molecules)
        return {
            "edm/atom_stable": float(stable[molecules.mask].mean()),
            "edm/molecule_stable": float((stable.sum(1) == molecules.counts).mean()),
            "edm/valid": float(edm.valid(molecules, **self._limits).mean()),
            "rdkit/valid": sum(found.valid for found in perceived) / count,
            "rdkit/connected": sum(found.connected for found in perceived) / count,
            "rdkit/charged": sum(any(found.charges) for found in perceived) / count,
        }

    def _distinct(self, perceived: list[Perceived]) -> dict[str, float]:
        count = len(perceived)
        valid = [found.smiles for found in perceived if found.valid]
        connected = {found.smiles for found in perceived if found.connected}
        distinct = set(valid)
        return {
            "rdkit/unique": len(distinct) / max(1, len(valid)),
            "rdkit/novel": len(distinct - self.train_smiles) / max(1, len(distinct)),
            "rdkit/valid_unique": len(distinct) / count,
            "rdkit/valid_connected_unique": len(connected) / count,
            "rdkit/valid_connected_unique_novel": len(connected - self.train_smiles) / count,
        }

    def _distances(self, molecules: MoleculeSet) -> dict[str, float]:
        from scipy.stats import wasserstein_distance

        found, expected = bond_lengths(molecules), bond_lengths(self.held_out)
        # Of a few molecules every pair is rare, and none left would be a distance of 0.
        common = {pair: lengths for pair, lengths in expected.items() if len(lengths) >= FEWEST_BONDS} or expected
        nothing = np.zeros(1)
        total = sum(
            len(lengths) * wasserstein_distance(found.get(pair, nothing), lengths) for pair, lengths in common.items()
        )
        return {
            "distance/atoms": _total_variation(atom_histogram(molecules), atom_histogram(self.held_out)),
            "distance/elements": _total_variation(element_histogram(molecules), element_histogram(self.held_out)),
            "distance/bond_lengths": float(total / max(1, sum(map(len, common.values())))),
        }


def atom_histogram(molecules: MoleculeSet) -> NDArray[np.int64]:
    """[30]: molecules of 0 … 29 atoms."""
    return np.bincount(molecules.counts, minlength=MAX_ATOMS + 1)


def element_histogram(molecules: MoleculeSet) -> NDArray[np.int64]:
    """[5]: atoms that are H, C, N, O, F."""
    return np.bincount(molecules.elements[molecules.mask], minlength=len(SYMBOLS) + 1)[1:]


def bond_lengths(molecules: MoleculeSet) -> dict[str, NDArray[np.float64]]:
    """Lengths in Å of all pairs that EDM calls bonded, by pair of elements such as "C-N"; absent pairs are left out.

    EDM's rule knows distances only, so that broken molecules show here with the rest.
    """
    lengths, pairs = [], []
    for rows, orders in edm.bonds(molecules):
        bonded = np.triu(orders > 0)
        row, first, second = np.nonzero(bonded)
        lengths.append(edm.distances(molecules.positions[rows])[bonded])
        elements = molecules.elements[rows].astype(np.int64)
        one, other = elements[row, first], elements[row, second]
        pairs.append(10 * np.minimum(one, other) + np.maximum(one, other))
    length, pair = np.concatenate(lengths), np.concatenate(pairs)
    return {f"{SYMBOLS[code // 10 - 1]}-{SYMBOLS[code % 10 - 1]}": length[pair == code] for code in np.unique(pair)}


def rmsd(molecules: MoleculeSet, others: MoleculeSet) -> NDArray[np.float64]:
    """[n] Å: root-mean-square distance between atoms of the same index after the best proper rotation (Kabsch 1976).

    Mirror images stay apart. Both sets have the same counts; centring is part of a set.
    """
    return np.array(
        [
            np.sqrt(np.mean(np.sum((align(points, onto) - onto) ** 2, axis=1)))
            for points, onto in ((molecules.atoms(i)[1], others.atoms(i)[1]) for i in range(len(molecules)))
        ]
    )


def align(points: NDArray[np.float32], onto: NDArray[np.float32]) -> NDArray[np.float64]:
    """Points [n, 3] turned by the proper rotation that brings them closest to others [n, 3]; both have zero mean."""
    a, b = points.astype(np.float64), onto.astype(np.float64)
    u, _, vt = np.linalg.svd(a.T @ b)
    u[:, -1] *= np.sign(np.linalg.det(u @ vt)) or 1.0
    return a @ (u @ vt)


def _total_variation(histogram: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    return float(0.5 * np.abs(histogram / histogram.sum() - other / other.sum()).sum())
