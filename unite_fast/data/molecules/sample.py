"""The built-in sample set, for where no data can be fetched: `python -m unite_fast.data.molecules.sample FILE.npz`.

Random small C/N/O/F molecules (see enumeration.py) given three dimensions by RDKit: ETKDGv3 embedding, MMFF94
optimisation. These are force-field geometries of molecules nobody may have made. **It is not QM9**, and no figure
measured on it compares with a published one.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, RDLogger
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from unite_fast.data.molecules.enumeration import candidates
from unite_fast.data.molecules.molecule_set import (
    CODE_OF_NUMBER,
    Molecule,
    MoleculeSet,
    assemble,
    read_npz,
    write_npz,
)
from unite_fast.data.molecules.perception import canonical_order
from unite_fast.data.sampler import counter_hash
from unite_fast.errors import UserError
from unite_fast.progress import track
from unite_fast.workers import bounded_map

log = logging.getLogger("unite_fast.data")

COUNT = 10_000
SAMPLE_ORDER = "canonical"  # of the atoms, see arrangement.py
# Raised with every change of what a seed gives, so that an old cache is made again.
VERSION = 3
_EMBEDDING = 12  # first word of the embedding's hash, apart from those of enumeration.py and sampler.py
EMBED_ATTEMPTS = 10  # of ETKDG on one molecule; 97 % need fewer than three
OPTIMISER_STEPS = 2000  # of MMFF94; 99 % of the molecules converge within 500
# An embedding takes about 15 ms. The limit is there for the one that never ends, and so far above the rest that no
# molecule passes on one machine and fails on a busier one.
SECONDS = 60.0


def source(count: int, seed: int) -> str:
    """The label of the set."""
    return f"unite_fast's built-in sample of {count} molecules, seed {seed} (RDKit ETKDGv3 + MMFF94; not QM9)"


def sample_set(
    count: int = COUNT, seed: int = 0, *, cache: str | Path | None = None, processes: int | None = None
) -> MoleculeSet:
    """The first `count` distinct molecules of the seed's enumeration that embed and optimise.

    The result depends on (count, seed) and RDKit's version, not on the number of processes. Sets of one seed begin with
    the same molecules. Atoms stand in canonical order, see `canonical_order`. Failures are dropped, and counted in
    `skipped`.

    Args:
        count: molecules, at least 1.
        seed: of graphs and embeddings.
        cache: folder that keeps the set as NPZ (about 190 bytes a molecule); None makes it again each time.
        processes: workers, by default one a core.

    Raises:
        UserError: a count below 1, or a cache that cannot be written.
    """
    if count < 1:
        raise UserError(f"a sample set needs at least one molecule, {count} were asked for")
    path = None if cache is None else stored(count, seed, cache=cache)
    if path is not None and path.exists():
        try:
            return read_npz(path)
        except UserError as error:
            log.warning("%s; making the sample set again", error)
    molecules = _make(count, seed, processes)
    if path is not None:
        write_npz(molecules, path)
    return molecules


def stored(count: int, seed: int = 0, *, cache: str | Path) -> Path:
    """Where `sample_set` keeps the set, whether it is there or not."""
    return Path(cache) / f"sample_v{VERSION}_{count}_seed{seed}.npz"


def _make(count: int, seed: int, processes: int | None) -> MoleculeSet:
    kept: list[Molecule] = []
    dropped: Counter[str] = Counter()
    stream = candidates(seed)
    with track("making sample molecules", count) as advance:
        while len(kept) < count:
            # 3 % fail: the first round nearly always asks for enough, and what it asks beyond `count` is thrown away.
            wanted = count - len(kept)
            asked = list(itertools.islice(stream, wanted + wanted // 20 + 1))
            work = [Task(smiles, int(counter_hash(_EMBEDDING, seed)[0] % 2**31)) for smiles in asked]
            for found in bounded_map(embed, work, seconds=SECONDS, processes=processes):
                if len(kept) == count:
                    break
                if isinstance(found, Embedded):
                    kept.append(Molecule(f"sample_{len(kept)}", found.elements, found.positions))
                    advance(1)
                else:
                    dropped[str(found)] += 1
    return assemble(kept, source(count, seed), skipped=dropped)


class Task(NamedTuple):
    """What a worker is asked for."""

    smiles: str
    seed: int


class Embedded(NamedTuple):
    """What a worker gives back."""

    elements: NDArray[np.uint8]  # [n]
    positions: NDArray[np.float64]  # [n, 3] Å


def embed(task: Task) -> Embedded | str:
    """Three dimensions for one molecule, or why there are none."""
    RDLogger.DisableLog("rdApp.*")
    molecule = Chem.AddHs(Chem.MolFromSmiles(task.smiles))
    parameters = rdDistGeom.ETKDGv3()
    parameters.randomSeed = task.seed
    parameters.maxIterations = EMBED_ATTEMPTS
    if rdDistGeom.EmbedMolecule(molecule, parameters) < 0:
        return "ETKDGv3 found no embedding"
    if not rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        return "MMFF94 lacks parameters"
    if rdForceFieldHelpers.MMFFOptimizeMolecule(molecule, mmffVariant="MMFF94", maxIters=OPTIMISER_STEPS) != 0:
        return "MMFF94 did not converge"
    order = canonical_order(molecule)
    codes = np.array([CODE_OF_NUMBER[molecule.GetAtomWithIdx(index).GetAtomicNum()] for index in order], np.uint8)
    return Embedded(codes, molecule.GetConformer().GetPositions()[order])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m unite_fast.data.molecules.sample", description=__doc__)
    parser.add_argument("file", type=Path, help="NPZ file to write")
    parser.add_argument("--count", type=int, default=COUNT, help=f"molecules (default {COUNT})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        molecules = sample_set(options.count, options.seed, processes=options.processes)
        write_npz(molecules, options.file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{molecules.source} in {options.file}; dropped {molecules.skipped or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
