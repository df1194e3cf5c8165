"""What a path of molecules stands for: files, folders of them, and the cache of what was read."""

import os

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("rdkit")

from molecule_files import METHANE, coordinates_close, qm9_folder, sdf_text, uncharacterized_text

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
    with pytest.raises(UserError, match="holds no XYZ, SDF, MOL, tar, NPZ or Parquet file"):
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
    with pytest.raises(UserError, match=r"several sets of molecules \(a.sdf, b.mol, c.SDF, d.npz\): name one"):
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
    assert (again.names, again.source) == (first.names, first.source)
    next(iter(cache.iterdir())).write_bytes(b"damaged")
    assert len(load_molecules(folder, cache=cache)) == 12
    os.remove(folder / "dsgdb9nsd_000004.xyz")
    assert len(load_molecules(folder, cache=cache)) == 11


def test_cache_follows_how_the_files_are_read_and_what_lies_beside_them(tmp_path, molecules):
    cache = tmp_path / "cache"
    folder = qm9_folder(tmp_path, molecules)
    (folder / "salt.xyz").write_text("2\nsalt\nNa 0 0 0\nCl 0 0 2.4\n")
    load_molecules(folder, cache=cache)
    with pytest.raises(UserError, match="an element other than"):
        load_molecules(folder, cache=cache, strict=True)
    (folder / "salt.xyz").unlink()
    assert len(load_molecules(folder, cache=cache)) == 12
    (folder / "uncharacterized.txt").write_text(uncharacterized_text([4, 10, 3054, 2014]))
    assert len(load_molecules(folder, cache=cache)) == 10

    symbols, points = METHANE[0][::-1], METHANE[1][::-1]
    lines = [f"{symbol} {x} {y} {z}" for symbol, (x, y, z) in zip(symbols, points)]
    (tmp_path / "b.xyz").write_text("\n".join(["5", "", *lines]))
    for order, first in (("file", 1), ("canonical", 2)):
        assert load_molecules(tmp_path / "b.xyz", cache=cache, order=order).elements[0, 0] == first

    sdf, table = tmp_path / "a.sdf", tmp_path / "a.sdf.csv"
    sdf.write_text(sdf_text(molecules, 0, "a"))
    assert load_molecules(sdf, cache=cache).gap is None
    for gap in (0.25, 0.35):  # of the same length
        table.write_text(f"mol_id,gap\na,{gap}\n")
        os.utime(table, ns=(0, round(gap * 1e9)))
        assert load_molecules(sdf, cache=cache).gap[0] == pytest.approx(gap * 27.2114, rel=1e-4)
