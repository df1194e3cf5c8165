"""Order and frame of molecules: what a model reads does not depend on the file's, and is put back afterwards."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("rdkit")

from numpy.testing import assert_allclose, assert_array_equal

from unite_fast.data.molecules.arrangement import aligned, arrange, canonical
from unite_fast.data.molecules.molecule_set import Molecule, assemble
from unite_fast.data.molecules.sample import sample_set

H, C, N, O = 1, 2, 3, 4  # noqa: E741, chemical symbols


@pytest.fixture(scope="module")
def molecules():
    return sample_set(12, 0, processes=1)


def turned(molecules, seed=0):
    """Every molecule turned by a rotation of its own, and the rotations."""
    matrices = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(molecules), 3, 3)))[0]
    matrices *= np.linalg.det(matrices)[:, None, None]
    return replace(molecules, positions=(molecules.positions @ matrices).astype(np.float32))


def permuted(molecules, seed=0):
    """Atoms of every molecule in another order."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(len(molecules)):
        elements, positions = molecules.atoms(index)
        order = random.permutation(len(elements))
        rows.append(Molecule(molecules.names[index], elements[order], positions[order]))
    return assemble(rows, "permuted")


def test_the_frame_follows_the_first_heavy_atoms(molecules):
    found, axes = aligned(molecules)
    assert (found.elements[:, 0] > H).all()
    second = (found.elements[:, 1:] > H).argmax(1) + 1
    bond = found.positions[np.arange(len(found)), second] - found.positions[:, 0]
    assert_allclose(bond[:, 1:], 0, atol=1e-5)
    assert (bond[:, 0] > 1.1).all()  # Å: no bond of heavy atoms is as short
    away = found.positions - found.positions[:, :1]
    off = np.hypot(away[..., 1], away[..., 2]) > 0.5
    off &= found.elements > H
    third = off.argmax(1)
    rows = np.arange(len(found))[off.any(1)]
    assert len(rows) == len(found)  # the set holds no chain of heavy atoms on one line
    assert_allclose(away[rows, third[rows], 2], 0, atol=1e-5)
    assert (away[rows, third[rows], 1] > 0).all()
    assert_allclose(axes @ axes.transpose(0, 2, 1), np.tile(np.eye(3), (len(found), 1, 1)), atol=1e-12)
    assert_allclose(found.positions.sum(1), 0, atol=1e-4)


def test_the_frame_does_not_depend_on_the_pose_and_keeps_mirror_images_apart(molecules):
    found, _ = aligned(molecules)
    assert_allclose(aligned(turned(molecules))[0].positions, found.positions, atol=2e-5)
    mirrored, axes = aligned(replace(molecules, positions=molecules.positions * np.float32([1, 1, -1])))
    assert_allclose(np.linalg.det(axes), 1, atol=1e-12)
    assert_allclose(mirrored.positions, found.positions * [1, 1, -1], atol=2e-5)
    assert np.abs(mirrored.positions - found.positions).max(axis=(1, 2)).min() > 0.1


@pytest.mark.parametrize(
    ("elements", "positions"),
    [
        ([C], [[0, 0, 0]]),
        ([H, H], [[0, 0, -0.37], [0, 0, 0.37]]),
        ([O, C, O], [[1.16, 0, 0], [0, 0, 0], [-1.16, 0, 0]]),  # on one line
        ([H, C, N], [[0, 0, 1.07], [0, 0, 0], [0, 0, -1.16]]),
        ([O, H, H], [[0, 0, 0.12], [0, 0.76, -0.47], [0, -0.76, -0.47]]),  # hydrogens must serve
        ([C, C], [[0, 0, 0], [0, 0, 1e-6]]),  # all but on one another
    ],
)
def test_molecules_of_few_atoms(elements, positions):
    small = assemble([Molecule("small", np.uint8(elements), np.float64(positions))], "small")
    found, axes = aligned(small)
    assert np.isfinite(found.positions).all()
    assert_allclose(np.linalg.det(axes), 1)
    count = len(elements)
    distances = [
        np.linalg.norm(m.positions[0, :count, None] - m.positions[0, None, :count], axis=-1) for m in (found, small)
    ]
    assert_allclose(distances[0], distances[1], atol=1e-5)
    assert_allclose(aligned(turned(small))[0].positions, found.positions, atol=1e-5)
    # x points from one anchor to the next: heavy atoms in their order, then hydrogens.
    anchors = sorted(range(count), key=lambda atom: (elements[atom] == H, atom))[:2]
    if count > 2:
        assert_allclose(np.diff(found.positions[0, anchors], axis=0)[0, 1:], 0, atol=1e-5)


def test_an_atom_that_is_hardly_off_the_axis_does_not_turn_the_frame():
    """A chain bent by what a force field leaves of it: the hydrogen shows where y is."""
    chain = Molecule("chain", np.uint8([C, C, C, H]), np.float64([[0, 0, 0], [1.3, 0, 0], [2.6, 0.3, 0], [3, 0, 0.9]]))
    found = aligned(assemble([chain], "chain"))[0].positions[0] - aligned(assemble([chain], "chain"))[0].positions[0, 0]
    assert_allclose(found[3], [3, 0.9, 0], atol=1e-5)
    assert_allclose(found[2], [2.6, 0, -0.3], atol=1e-5)


@pytest.mark.parametrize("order", ["file", "canonical"])
@pytest.mark.parametrize("orientation", ["random", "aligned"])
def test_an_arrangement_is_undone(molecules, order, orientation):
    given = turned(permuted(molecules))
    arranged, arrangement = arrange(given, order, orientation)
    back = arrangement.undo(arranged)
    assert_array_equal(back.elements, given.elements)
    assert_allclose(back.positions, given.positions, atol=1e-5)
    assert (order == "file") == bool((arranged.elements == given.elements).all())
    if (order, orientation) == ("file", "random"):
        assert_array_equal(arranged.positions, given.positions)


def test_every_file_of_a_molecule_is_arranged_alike(molecules):
    """Order and pose of the file do not matter, up to atoms that a symmetry of the graph exchanges."""
    found = [arrange(given, "canonical", "aligned")[0] for given in (molecules, turned(permuted(molecules)))]
    assert_array_equal(found[0].elements, found[1].elements)
    heavy = (found[0].elements > H)[..., None]  # the hydrogens of a group exchange places
    same = np.abs((found[0].positions - found[1].positions) * heavy).max(axis=(1, 2)) < 1e-3
    assert same.mean() > 0.5


def test_the_sample_set_stands_in_canonical_order(molecules):
    assert_array_equal(canonical(molecules)[0].elements, molecules.elements)
