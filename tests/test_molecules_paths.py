"""What a path of molecules stands for: files, folders of them, and the cache of what was read."""

import os

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("rdkit")

from molecule_files import coordinates_close, qm9_folder, sdf_text

from unite_fast.data.molecules import reading
from unite_fast.data.molecules.molecule_set import write_npz
from unite_fast.data.molecules.reading import load_molecules
from unite_fast.data.molecules.sample import sample_set
from unite_fast.data.molecules.writing import write_xyz
from unite_fast.errors import UserError


@pytest.fixture(scope="module")
def molecules():
    return sample_set(12, 5, processes=1)


def test_what_is_no_molecule_file(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        load_molecules(tmp_path / "none")
    with pytest.raises(UserError, match="not exactly one SDF, tar, NPZ or Parquet file"):
        load_molecules(tmp_path)
    (tmp_path / "notes").write_text("hello\nworld\n")
    with pytest.raises(UserError, match="notes is no molecule file: .* Convert it to an SDF"):
        load_molecules(tmp_path / "notes")


def test_a_folder_of_sdf_and_mol_files(tmp_path, molecules):
    for name, row in (("b.mol", 1), ("a.sdf", 0), ("c.SDF", 2)):
        (tmp_path / name).write_text(sdf_text(molecules, row, name))
    (tmp_path / "a.sdf.csv").write_text("mol_id,gap\na.sdf,0.25\n")
    (tmp_path / "readme.md").write_text("hello\n")
    found = load_molecules(tmp_path, cache=tmp_path / "cache")
    assert found.names == ("a.sdf", "b.mol", "c.SDF") and np.isfinite(found.gap).tolist() == [True, False, False]
    (tmp_path / "a.sdf.csv").write_text("mol_id,gap\nnone,0.25\n")
    (tmp_path / "b.mol.csv").write_text("mol_id,gap\nb.mol,0.25\n")
    again = load_molecules(tmp_path, cache=tmp_path / "cache")
    assert np.isfinite(again.gap).tolist() == [False, True, False]
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"not exactly one SDF, tar, .* \(a.sdf, b.mol, c.SDF, d.npz\): name one"):
        load_molecules(tmp_path)


def test_xyz_files_alone_are_read_where_there_are_others_too(tmp_path, molecules, caplog):
    write_xyz(molecules, tmp_path / "a.xyz")
    load_molecules(tmp_path)
    assert not caplog.messages
    (tmp_path / "b.sdf").write_text(sdf_text(molecules, 0, "b"))
    assert len(load_molecules(tmp_path)) == len(molecules)
    assert caplog.messages == [f"of {tmp_path} only the XYZ files are read, not b.sdf"]


def test_a_folder_stands_for_its_only_file(tmp_path, molecules):
    write_npz(molecules, tmp_path / "set.npz")
    (tmp_path / "readme.md").write_text("about")
    coordinates_close(load_molecules(tmp_path), molecules, 0)
    (tmp_path / "gdb9.sdf").write_text(sdf_text(molecules, 0, "a"))
    with pytest.raises(UserError, match="gdb9.sdf, set.npz"):
        load_molecules(tmp_path)


def test_cache_follows_the_files(tmp_path, molecules, monkeypatch):
    folder, cache = qm9_folder(tmp_path, molecules), tmp_path / "cache"
    first = load_molecules(folder, cache=cache)
    with monkeypatch.context() as patched:
        patched.setattr(reading, "_read", lambda *_: pytest.fail("read again"))
        again = load_molecules(folder, cache=cache)
    assert_array_equal(again.positions, first.positions)
    assert (again.names, again.smiles, again.source) == (first.names, first.smiles, first.source)
    next(iter(cache.iterdir())).write_bytes(b"damaged")
    assert len(load_molecules(folder, cache=cache)) == 12
    os.remove(folder / "dsgdb9nsd_000004.xyz")
    assert len(load_molecules(folder, cache=cache)) == 11
