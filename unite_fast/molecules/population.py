"""How many molecules a run trains on and how large they are, before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from unite_fast.analysis.extent import Population
from unite_fast.molecules.config import MAX_ATOMS, MoleculeDataConfig

# QM9's training part of 100,000 by atoms, 0 … 29, as EDM's configuration has it (Hoogeboom et al. 2022, datasets
# configuration "qm9_with_h"): 18.03 atoms in the mean, hydrogens included.
QM9_ATOMS = (
    0, 0, 0, 1, 4, 5, 9, 16, 49, 124, 362, 807, 1689, 3060, 5136, 7796, 10644, 13025, 13364, 13832, 9482, 9970, 3393,
    4848, 539, 1506, 48, 266, 0, 25,
)  # fmt: skip


def population(config: MoleculeDataConfig) -> Population:
    """The training molecules: counted where `path` is there, else QM9's.

    The built-in sample set is counted where its cache holds it; a plan does not spend the minutes to make it.

    Raises:
        UserError: molecules that cannot be read.
    """
    if config.path is None:
        from unite_fast.data.molecules.molecule_set import split
        from unite_fast.data.molecules.sample import stored

        if not stored(config.sample_count, cache=config.cache).exists():
            samples = len(split(config.sample_count, config.split_seed).train)
            return _as_qm9(samples, "the built-in sample set has not been made yet")
    elif not Path(config.path).exists():
        return _as_qm9(sum(QM9_ATOMS), f"there are no data at {config.path}")
    from unite_fast.molecules.stream import load_parts  # needs RDKit, which planning without data does not

    # Turning molecules changes no size.
    train = load_parts(config.model_copy(update={"orientation": "random"})).train
    histogram = np.bincount(train.counts, minlength=MAX_ATOMS + 1).tolist()
    return _population(tuple(histogram), len(train), f"counted: {train.source}")


def _as_qm9(samples: int, why: str) -> Population:
    return _population(QM9_ATOMS, samples, f"sizes as in QM9's training part: {why}")


def _population(histogram: tuple[int, ...], samples: int, source: str) -> Population:
    made = Population(histogram, samples, source)
    about = f"{samples:,} molecules per epoch, {made.mean_length:.1f} atoms each, at most {made.longest}"
    return replace(made, source=f"{about} ({source})")
