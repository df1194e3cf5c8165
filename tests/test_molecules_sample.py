"""The built-in molecules: what they are made of, that only the seed decides, and that bad work is bounded."""

import itertools
import os
import time

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("rdkit")

from rdkit import Chem

from unite_fast.data.molecules import sample
from unite_fast.data.molecules.enumeration import VALENCE, candidate
from unite_fast.data.molecules.molecule_set import MAX_ATOMS, SYMBOLS
from unite_fast.data.molecules.perception import perceive_all
from unite_fast.data.molecules.sample import sample_set
from unite_fast.errors import UserError
from unite_fast.workers import Lost, bounded_map

COUNT = 40


@pytest.fixture(scope="module")
def molecules():
    return sample_set(COUNT, 0, processes=1)


@pytest.fixture(scope="module")
def perceived(molecules):
    """SMILES of their bonds, which are those they were drawn with."""
    found = [one.smiles for one in perceive_all(molecules, processes=1)]
    assert found == list(itertools.islice(sample.candidates(0), COUNT))
    return found


def test_arrays(molecules):
    assert molecules.elements.shape == (COUNT, MAX_ATOMS) and molecules.elements.dtype == np.uint8
    assert molecules.positions.shape == (COUNT, MAX_ATOMS, 3) and molecules.positions.dtype == np.float32
    assert_array_equal(molecules.mask.sum(1), molecules.counts)
    assert not molecules.positions[~molecules.mask].any()
    assert np.abs(molecules.positions.sum(1)).max() < 1e-4
    assert "not QM9" in molecules.source
    assert len(set(molecules.names)) == COUNT


def test_atoms_are_those_of_the_smiles_in_canonical_order(molecules, perceived):
    for index, smiles in enumerate(perceived):
        heavy = Chem.MolFromSmiles(smiles).GetAtoms()
        expected = "".join(atom.GetSymbol() + "H" * atom.GetTotalNumHs() for atom in heavy)
        assert "".join(SYMBOLS[code - 1] for code in molecules.atoms(index)[0]) == expected
        assert Chem.CanonSmiles(smiles) == smiles


def test_geometries_are_bonded_and_not_crowded(molecules):
    for index in range(COUNT):
        _, positions = molecules.atoms(index)
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        np.fill_diagonal(distances, np.inf)
        nearest = distances.min(1)
        assert nearest.min() > 0.9 and nearest.max() < 1.55  # O-H is 0.96 Å, the longest C-C about 1.54


def test_molecules_are_distinct_and_diverse(perceived):
    assert len(set(perceived)) == COUNT
    heavy = [Chem.MolFromSmiles(smiles).GetNumHeavyAtoms() for smiles in perceived]
    assert set(heavy) >= {6, 7, 8, 9} and max(heavy) == 9
    assert {"N", "O", "F"} <= {symbol for smiles in perceived for symbol in smiles.upper()}


def test_result_does_not_depend_on_processes_and_a_smaller_set_is_a_prefix(molecules):
    again = sample_set(25, 0, processes=3)
    assert_array_equal(again.elements, molecules.elements[:25])
    assert_array_equal(again.positions, molecules.positions[:25])
    assert (sample_set(5, 1, processes=1).elements != molecules.elements[:5]).any()


def test_cache_gives_back_every_bit_and_heals(molecules, tmp_path, monkeypatch, caplog):
    made = sample_set(6, 0, cache=tmp_path, processes=1)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(sample, "_make", lambda *_: pytest.fail("made again"))
        cached = sample_set(6, 0, cache=tmp_path)
    assert (cached.names, cached.source) == (made.names, made.source)
    assert_array_equal(cached.positions, made.positions)
    path.write_bytes(path.read_bytes()[:200])
    healed = sample_set(6, 0, cache=tmp_path, processes=1)
    assert "making the sample set again" in caplog.text
    assert_array_equal(healed.positions, made.positions)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_no_molecules_asked_for():
    with pytest.raises(UserError, match="at least one molecule, 0 were"):
        sample_set(0)


def test_drawn_graphs_respect_valences_and_unwanted_motifs():
    drawn = [smiles for number in range(400) if (smiles := candidate(3, number))]
    assert len(drawn) > 200
    peroxide, cumulene = Chem.MolFromSmarts("OO"), Chem.MolFromSmarts("*=*=*")
    for smiles in drawn:
        molecule = Chem.MolFromSmiles(smiles)
        assert not molecule.HasSubstructMatch(peroxide) and not molecule.HasSubstructMatch(cumulene)
        for atom in molecule.GetAtoms():
            assert atom.GetFormalCharge() == 0 and atom.GetNumRadicalElectrons() == 0
            assert atom.GetTotalValence() == VALENCE[atom.GetAtomicNum()]


def test_molecules_that_fail_are_dropped_and_counted(monkeypatch):
    monkeypatch.setattr(sample, "candidates", lambda seed: iter(["CCO", "C1#CC1", "CC", "CN", "CCC", "CO"]))
    found = sample_set(3, 0, processes=1)
    assert [one.smiles for one in perceive_all(found, processes=1)] == ["CCO", "CC", "CN"]
    assert found.skipped == {"ETKDGv3 found no embedding": 1}


def _work(item):
    if item == "hang":
        while True:
            time.sleep(0.01)
    if item == "crash":
        os._exit(3)
    return item.upper()


def test_a_hang_or_crash_costs_its_own_item_only():
    items = ["a", "hang", "b", "crash", "c", "d"]
    told = []
    results = list(bounded_map(_work, items, seconds=4.0, processes=2, advance=told.append))
    assert results == ["A", Lost.timeout, "B", Lost.crash, "C", "D"]
    assert sum(told) == len(items)
    assert list(bounded_map(_work, [], seconds=1.0)) == []
