"""Molecules in archives and in compressed files: whole ones, damaged ones, and what is in neither."""

import bz2
import gzip
import lzma
import tarfile

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("rdkit")

from molecule_files import METHANE, WATER, qm9_folder, qm9_text, sdf_text, small, tar

from unite_fast.data.molecules.reading import load_molecules
from unite_fast.data.molecules.sample import sample_set
from unite_fast.data.molecules.writing import write_sdf, write_xyz
from unite_fast.errors import UserError

HARTREE = 27.211386245988


@pytest.fixture(scope="module")
def molecules():
    return sample_set(12, 5, processes=1)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.bz2", "w:bz2"), ("3195389", "w:gz"), ("a.tar.xz", "w:xz")]
)
def test_archives_in_any_order_give_the_folders_set(tmp_path, molecules, name, mode):
    folder = qm9_folder(tmp_path, molecules)
    members = [(f"./{path.name}", path.read_text()) for path in folder.iterdir()]
    members += [("readme.txt", "not a molecule"), ("._dsgdb9nsd_000001.xyz", "a resource fork")]
    archive = tar(tmp_path / name, sorted(members, reverse=True), mode)
    found, expected = load_molecules(archive), load_molecules(folder)
    assert found.names == expected.names
    assert_array_equal(found.positions, expected.positions)
    assert_array_equal(found.gap, expected.gap)


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:gz", "w:xz"])
def test_half_downloaded_archive_names_the_last_whole_member(tmp_path, molecules, mode):
    # Incompressible neighbours, so that half of the compressed bytes hold some members and not others.
    noise = np.random.default_rng(0).integers(33, 126, 20_000, dtype=np.uint8).tobytes().decode()
    members = [(f"{row}.xyz", qm9_text(molecules, row, row + 1)) for row in range(12)]
    archive = tar(tmp_path / "a", [part for member in members for part in (member, ("noise", noise))], mode)
    whole = archive.read_bytes()
    assert len(load_molecules(archive)) == 12
    for size in (len(whole) // 2, len(whole) - 700 if mode != "w" else len(whole) // 2 + 512):
        archive.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a is cut off or damaged after .*, member \d+: download it again"):
            load_molecules(archive)


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize("kind", ["sdf", "xyz"])
def test_one_compressed_file(tmp_path, opener, kind):
    two = small(WATER, METHANE)
    plain = tmp_path / f"a.{kind}"
    (write_sdf if kind == "sdf" else write_xyz)(two, plain)
    path = tmp_path / "packed" / f"a.{kind}.gz"
    path.parent.mkdir()
    with opener(path, "wb") as file:
        file.write(plain.read_bytes())
    found = [load_molecules(place) for place in (plain, path, path.parent)]
    found.append(load_molecules(path.rename(path.with_name("a"))))
    for other in found[1:]:
        assert other.names == found[0].names == two.names
        assert_array_equal(other.positions, found[0].positions)
    whole = path.with_name("a").read_bytes()
    for content in (whole[: len(whole) - 20], whole[:12], whole[:20] + b"?" * 40 + whole[60:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a.{kind}.gz is a truncated or damaged compressed file: download"):
            load_molecules(path)


def test_compressed_files_of_a_folder(tmp_path):
    """As PubChem packs them: nameless molecules are named as by the plain file, and the table of gaps is the same."""
    texts = {"a.sdf.gz": sdf_text(small(WATER), 0, ""), "b.SDF.GZ": sdf_text(small(METHANE), 0, "b")}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.SDF.csv").write_text("mol_id,gap\nb,0.5\n")
    found = load_molecules(tmp_path)
    assert found.names == ("a_1", "b") and np.isnan(found.gap[0])
    assert_allclose(found.gap[1], 0.5 * HARTREE, rtol=1e-6)
    (tmp_path / "c.xyz.xz").write_bytes(lzma.compress("\ufeff1\n\nH 0 0 0\n".encode("utf-16-le")))
    assert load_molecules(tmp_path).names == ("c",), "XYZ files alone, as of plain ones"
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"smiles,gap\nC,1\n"))
    with pytest.raises(UserError, match="d.csv.gz is no molecule file: its first lines are neither XYZ"):
        load_molecules(tmp_path / "d.csv.gz")


def test_a_compressed_file_of_a_folder_that_cannot_be_read_is_named(tmp_path):
    write_xyz(small(WATER), tmp_path / "a.xyz")
    (tmp_path / "b.xyz.gz").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"^cannot read .*/b.xyz.gz: No such file or directory; check its permissions$"):
        load_molecules(tmp_path)


def test_a_compressed_archive_without_tar_in_its_name(tmp_path, molecules):
    members = [(f"{row}.xyz", qm9_text(molecules, row, row + 1)) for row in range(3)]
    tar(tmp_path / "dsgdb9nsd.xyz.bz2", members, "w:bz2")
    assert len(load_molecules(tmp_path)) == len(load_molecules(tmp_path / "dsgdb9nsd.xyz.bz2")) == 3


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_without_xyz_files_says_so(tmp_path, mode):
    """As QM9 is also handed round: gdb9.sdf and its table in an archive."""
    water = small(WATER)
    archive = tar(tmp_path / "gdb9.tar", [("gdb9.sdf", sdf_text(water, 0, "gdb_1")), ("gdb9.sdf.csv", "mol_id")], mode)
    with pytest.raises(UserError, match="gdb9.tar holds no .xyz file, and nothing else is read from an archive"):
        load_molecules(archive)


def test_archive_cut_exactly_between_members(tmp_path, molecules):
    archive = tar(tmp_path / "a.tar", [(f"{row}.xyz", qm9_text(molecules, row, row + 1)) for row in range(5)])
    with tarfile.open(archive) as opened:
        boundary = opened.getmembers()[3].offset
    archive.write_bytes(archive.read_bytes()[:boundary])
    with pytest.raises(UserError, match="after 2.xyz, member 3"):
        load_molecules(archive)


def test_a_truncated_bzip2_file_is_not_taken_for_text(tmp_path):
    (tmp_path / "a.tar.bz2").write_bytes(bz2.compress(b"x" * 100)[:-9])
    with pytest.raises(UserError, match="cut off or damaged after its beginning, member 0"):
        load_molecules(tmp_path / "a.tar.bz2")
