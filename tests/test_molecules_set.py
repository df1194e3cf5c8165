"""Molecules as arrays: centring, what is left out, names, the NPZ file, the split."""

import json
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("rdkit")

from unite_fast.data.molecules.doubts import doubts
from unite_fast.data.molecules.molecule_set import Molecule, assemble, read_npz, split, write_npz
from unite_fast.errors import UserError

WATER = [[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]]


def _water(name="water", shift=0.0, **rest):
    return Molecule(name, [3 + 1, 1, 1], np.array(WATER) + shift, **rest)


def test_positions_have_zero_mean_and_keep_their_distances():
    found = assemble([_water(shift=100.0)], "test")
    elements, positions = found.atoms(0)
    assert_array_equal(elements, [4, 1, 1])
    # The plain mean, not the mass-weighted one, which would put oxygen within 0.07 Å of the origin.
    np.testing.assert_allclose(positions.mean(0), 0, atol=1e-6)
    assert np.linalg.norm(positions[0]) > 0.3
    np.testing.assert_allclose(np.linalg.norm(positions[0] - positions[1]), np.hypot(0.76, 0.59), rtol=1e-5)
    assert_array_equal(found.counts, [3])


def test_what_cannot_be_held_is_left_out_and_counted_or_refused():
    unknown = Molecule("salt", [2, 0], np.zeros((2, 3)), where="salt.xyz, line 3")
    large = Molecule("large", [2] * 30, np.random.default_rng(0).normal(size=(30, 3)))
    largest = Molecule("largest", [2] * 29, np.random.default_rng(0).normal(size=(29, 3)))
    molecules = [unknown, _water(), large, largest, Molecule("void", [], np.zeros((0, 3)))]
    found = assemble(molecules, "test")
    assert found.names == ("water", "largest")
    assert found.skipped == {"an element other than H C N O F": 1, "more than 29 atoms": 1, "no atoms": 1}
    with pytest.raises(UserError, match="salt.xyz, line 3: an element other than H C N O F; with data.strict=false"):
        assemble(molecules, "test", strict=True)
    with pytest.raises(UserError, match="no molecule to use .*1 × an element other"):
        assemble([unknown], "test")


def test_two_atoms_in_one_place_are_no_molecule():
    zeros = Molecule("zeros", [4, 1, 1], np.zeros((3, 3)), where="zeros.sdf, line 1")
    found = assemble([zeros, _water()], "test")
    assert found.names == ("water",) and found.skipped == {"two atoms in one place": 1}
    with pytest.raises(UserError, match="zeros.sdf, line 1: two atoms in one place"):
        assemble([zeros, _water()], "test", strict=True)


@pytest.mark.parametrize(
    ("scale", "heavy", "gap", "words"),
    [
        (1.0, False, 8.0, None),
        (1.0, False, None, None),
        (1 / 0.529177, False, None, "the nearest atom is 2.0"),
        (0.1, False, None, "the nearest atom is 0.11 Å"),
        (1.0, True, None, "all hydrogens there"),
        (1.0, False, 0.3, "the gap is 0.3 eV"),
        (1.0, False, 8 * 27.2114, "the gap is 218 eV"),
    ],
)
def test_other_units_and_missing_hydrogens_raise_doubts(scale, heavy, gap, words):
    methyls = np.array([[0, 0, 0], [1.54, 0, 0], [-0.36, 1.03, 0], [-0.36, -0.51, 0.89], [-0.36, -0.51, -0.89],
                        [1.9, -1.03, 0], [1.9, 0.51, -0.89], [1.9, 0.51, 0.89]])  # fmt: skip
    codes, points = ([2, 2], methyls[:2]) if heavy else ([2, 2] + [1] * 6, methyls)
    atom, ethane = Molecule("atom", [1], [[0, 0, 0]]), Molecule("ethane", codes, scale * points, gap=gap)
    found = doubts(assemble([atom, ethane], "test"))
    assert len(found) == (words is not None) and all(words in doubt for doubt in found), found


def test_names_stay_unique_and_exact_repetitions_are_dropped():
    signed = Molecule("water", [4, 1, 1], np.array(WATER) * [-1, 1, 1])  # -0.0 is 0.0
    found = assemble([_water(), _water(), _water(shift=[0, 0, 1e-3]), _water("other"), signed], "test")
    assert found.names == ("water", "water#2", "other")
    assert found.skipped == {"an exact repetition": 2}
    with pytest.raises(UserError, match="water: an exact repetition"):
        assemble([_water(), _water()], "test", strict=True)


def test_many_molecules_of_one_name_are_not_compared_each_with_each():
    """Trying all names from the first on would take longer than a test may."""
    count = 50_000
    found = assemble([Molecule("untitled", [1], [[0, 0, step % count / count]]) for step in range(count + 1)], "test")
    assert found.names == ("untitled", *(f"untitled#{number}" for number in range(2, count + 1)))
    assert found.skipped == {"an exact repetition": 1}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_broken_coordinates_are_an_error(value):
    positions = np.array(WATER)
    positions[1, 2] = value
    with pytest.raises(UserError, match="a.xyz, line 4: a coordinate is not a number"):
        assemble([Molecule("a", [4, 1, 1], positions, where="a.xyz, line 4")], "test")


def test_select_keeps_everything_together():
    molecules = [_water(f"w{i}", gap=float(i), shift=0) for i in range(5)]
    found = assemble(molecules, "test").select([3, 1])
    assert (found.names, found.gap.tolist(), len(found)) == (("w3", "w1"), [3, 1], 2)


def test_npz_round_trip(tmp_path):
    generator = np.random.default_rng(0)
    molecules = [
        Molecule(f"été {n}", generator.integers(1, 6, n), generator.normal(size=(n, 3)) * 3, gap=n / 7)
        for n in range(1, 30)
    ]
    made = assemble(molecules, "a source", skipped={"why": 2})
    path = tmp_path / "new" / "set.npz"
    write_npz(made, path)
    found = read_npz(path)
    for name in ("elements", "positions", "counts", "gap"):
        assert_array_equal(getattr(found, name), getattr(made, name), strict=True)
    assert (found.names, found.source, found.skipped) == (made.names, made.source, made.skipped)
    assert [p.name for p in path.parent.iterdir()] == ["set.npz"]


def test_npz_of_others(tmp_path):
    """Any width, float64, no names, a bromine molecule among them."""
    path = tmp_path / "other.npz"
    np.savez(path, atomic_numbers=np.array([[8, 1, 1, 0], [35, 1, 0, 0]]), positions=np.ones((2, 4, 3)).cumsum(1))
    found = read_npz(path)
    assert found.names == ("other_1",) and found.source == str(path) and found.gap is None
    assert_array_equal(found.positions[0, :4, 0], [-1, 0, 1, 0])
    assert sum(found.skipped.values()) == 1
    with pytest.raises(UserError, match="molecule 2: an element other"):
        read_npz(path, strict=True)


def test_bad_npz_files(tmp_path):
    path = tmp_path / "bad.npz"
    numbers, positions = np.ones((2, 3), int), np.ones((2, 3, 3))
    for arrays, message in (
        ({"positions": positions}, "no array atomic_numbers"),
        ({"atomic_numbers": numbers, "positions": positions[:, :2]}, r"got int64 \[2, 3\] and \[2, 2, 3\]"),
        ({"atomic_numbers": numbers, "positions": positions.astype(int)}, "floating-point numbers"),
        ({"atomic_numbers": numbers - 5, "positions": positions}, "0 … 255, got -4"),
        ({"atomic_numbers": numbers, "positions": positions, "gap": np.ones(3)}, "gap must be one number a molecule"),
        ({"atomic_numbers": numbers, "positions": positions, "about": np.array("[]")}, '"about" is not the JSON'),
        ({"atomic_numbers": numbers, "positions": positions, "about": np.array("{}")}, '"about" is not the JSON'),
        ({"atomic_numbers": np.array([[object()]]), "positions": positions}, "without pickles"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            read_npz(path)
    np.savez(
        path, atomic_numbers=numbers, positions=positions, about=np.array(json.dumps({"source": "s", "skipped": {}}))
    )
    whole = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "molecules.zip", "w") as file:
        file.writestr("folder/a.xyz", "1\n\nH 0 0 0\n")
    with pytest.raises(UserError, match="molecules.zip is a ZIP archive of files such as folder/a.xyz"):
        read_npz(tmp_path / "molecules.zip")
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="bad.npz is cut off or not an NPZ file"):
            read_npz(path)
    with pytest.raises(UserError, match="cannot read .*none.npz"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(UserError, match="cannot write"):
        write_npz(assemble([_water()], "s"), path / "below.npz")


def test_qm9_split_is_the_fields():
    parts = split(130_831)
    assert [len(part) for part in parts] == [100_000, 17_748, 13_083]
    assert_array_equal(np.sort(np.concatenate(parts)), np.arange(130_831))
    # NumPy's legacy generator, seeded as Cormorant and EDM seed it.
    np.random.seed(0)
    assert_array_equal(parts.train, np.random.permutation(130_831)[:100_000])


def test_other_sizes_hold_out_a_fifth():
    parts = split(12)
    assert [len(part) for part in parts] == [10, 2, 0]
    assert_array_equal(np.sort(np.concatenate(parts)), np.arange(12))
    assert not np.array_equal(split(12, 1).train, parts.train)
    # Another division would evaluate existing models on molecules they were trained on.
    assert_array_equal(parts.validation, np.random.RandomState(0).permutation(12)[:2])
