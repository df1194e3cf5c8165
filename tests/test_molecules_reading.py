"""Readers on files written here in QM9's formats: whole ones, damaged ones, and everything in between."""

import os

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("rdkit")

from molecule_files import (
    METHANE,
    WATER,
    coordinates_close,
    qm9_folder,
    qm9_text,
    sdf_text,
    small,
    tar,
    uncharacterized_text,
)
from rdkit import Chem

from unite_fast.data.molecules.molecule_set import Molecule, assemble, write_npz
from unite_fast.data.molecules.perception import failed
from unite_fast.data.molecules.reading import load_molecules
from unite_fast.data.molecules.sample import sample_set
from unite_fast.data.molecules.writing import write_sdf, write_xyz
from unite_fast.errors import UserError

HARTREE = 27.211386245988


@pytest.fixture(scope="module")
def molecules():
    return sample_set(12, 5, processes=1)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_qm9_folder(tmp_path, molecules, end):
    found = load_molecules(qm9_folder(tmp_path, molecules, end))
    coordinates_close(found, molecules, 1e-6)
    assert found.names == tuple(f"gdb_{3 * row + 1}" for row in range(len(molecules)))
    assert_allclose(found.gap, (0.1 + np.arange(len(molecules)) / 100) * HARTREE, rtol=1e-6)
    assert found.skipped == {}


def test_a_gap_that_is_missing_leaves_the_others(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text("".join(f"1\n{gap}\nH 0 0 0\n" for gap in ("gap=1.5", "", "gap=nan", "gap=2")))
    found = load_molecules(path, cache=tmp_path / "cache")
    assert_array_equal(found.gap, np.float32([1.5, np.nan, np.nan, 2]))
    assert_array_equal(load_molecules(path, cache=tmp_path / "cache").gap, found.gap)
    write_xyz(found, tmp_path / "b.xyz")
    assert "nan" not in (tmp_path / "b.xyz").read_text()
    assert_array_equal(load_molecules(tmp_path / "b.xyz").gap, found.gap)
    path.write_text("1\n\nH 0 0 0\n1\ngap=nan\nC 0 0 0\n")
    assert load_molecules(path).gap is None
    (tmp_path / "c.sdf").write_text("".join(sdf_text(small(WATER), 0, name) for name in "ab"))
    (tmp_path / "c.sdf.csv").write_text("mol_id,gap\na,\nb,0.5\n")
    assert_allclose(load_molecules(tmp_path / "c.sdf").gap, [np.nan, 13.6057], rtol=1e-5)


def test_mathematica_exponents(tmp_path):
    (tmp_path / "a.xyz").write_text("2\n\nH 1.5*^-6 0 7.5*^-1\nH -2.5*^-5\t0.0 -.1*^1\n")
    positions = load_molecules(tmp_path / "a.xyz").positions[0, :2]
    assert_allclose(positions[0] - positions[1], [2.65e-5, 0, 1.75], rtol=1e-5)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    """Windows' editors begin UTF-8 with one, and so does Excel a table."""
    water = small(WATER)
    texts = {"a.xyz": "1\nname=a\nH 0 0 0\n", "b.sdf": sdf_text(water, 0, ""), "c": "1\nname=c\nH 0 0 0\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    found = [load_molecules(tmp_path / name).names for name in texts]
    assert found == [("a",), ("b_1",), ("c",)]
    archive = tar(tmp_path / "d.tar", [("a.xyz", "\ufeff" + texts["a.xyz"])])
    assert load_molecules(archive).names == ("a",)
    (tmp_path / "gdb9.sdf").write_text(sdf_text(water, 0, "gdb_1"))
    (tmp_path / "gdb9.sdf.csv").write_text("mol_id,gap\ngdb_1,0.5\n", encoding="utf-8-sig")
    assert_allclose(load_molecules(tmp_path / "gdb9.sdf").gap, [0.5 * HARTREE], rtol=1e-6)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_as_powershell_writes_it(tmp_path, encoding):
    texts = {"a.xyz": "1\nname=a\nH 0 0 0\n", "b.sdf": sdf_text(small(WATER), 0, "b"), "c": "1\nname=c\nH 0 0 0\n"}
    contents = {name: f"\ufeff{text}".encode(encoding) for name, text in texts.items()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert load_molecules(tmp_path / name).names == (name[0],)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.xyz").write_bytes(contents["a.xyz"])
    assert load_molecules(folder).names == ("a",)
    for table in ("mol_id,gap\r\nb,0.5\r\n", "mol_id\tgap\r\nb\t0.5\r\n"):  # the latter as Excel's "Unicode text"
        (tmp_path / "b.sdf.csv").write_bytes(f"\ufeff{table}".encode(encoding))
        assert_allclose(load_molecules(tmp_path / "b.sdf").gap, [0.5 * HARTREE], rtol=1e-6)


def test_elements_in_small_letters_and_as_atomic_numbers(tmp_path):
    (tmp_path / "a.xyz").write_text("6\n\nH 0 0 0\nc 0 0 1\n7 0 0 2\no 0 0 3\n9 0 0 4\n001 0 0 5\n")
    assert load_molecules(tmp_path / "a.xyz").elements[0, :6].tolist() == [1, 2, 3, 4, 5, 1]
    others = ("Cl", "he", "17", "0", "-6", "6.0", "X", "9" * 5000)
    (tmp_path / "b.xyz").write_text("1\n\nH 0 0 0\n" + "".join(f"1\n\n{other} 0 0 0\n" for other in others))
    found = load_molecules(tmp_path / "b.xyz")
    assert len(found) == 1 and list(found.skipped.values()) == [len(others)]


def test_blanks_behind_the_end_of_an_sdf_record(tmp_path):
    (tmp_path / "a.sdf").write_text(sdf_text(small(WATER), 0, "a").replace("M  END", "M  END  "))
    assert load_molecules(tmp_path / "a.sdf").names == ("a",)


def test_sdf_takes_elements_and_coordinates_only(tmp_path, molecules):
    path = tmp_path / "gdb9.sdf"
    path.write_bytes(
        "".join(sdf_text(molecules, row, f"gdb_{row + 1}", "\r\n") for row in range(12)).encode() + b"\r\n"
    )
    found = load_molecules(path)
    coordinates_close(found, molecules, 1e-4)
    assert found.names[3] == "gdb_4" and found.gap is None
    (tmp_path / "gdb9.sdf.csv").write_text("mol_id,A,gap\n" + "".join(f"gdb_{i},1,0.{i:02d}\n" for i in range(1, 13)))
    assert_allclose(load_molecules(path).gap, np.arange(1, 13) / 100 * HARTREE, rtol=1e-6)
    (tmp_path / "gdb9.sdf.csv").write_text("mol_id,A,gap\ngdb_1,1\n")
    with pytest.raises(UserError, match="gdb9.sdf.csv lacks a column"):
        load_molecules(path)


def test_uncharacterized_molecules_are_left_out_even_under_strict(tmp_path, molecules):
    folder = qm9_folder(tmp_path, molecules)
    (folder / "uncharacterized.txt").write_text(uncharacterized_text([4, 10, 3054, 2014]))
    found = load_molecules(folder, strict=True)
    assert len(found) == 10 and not {"gdb_4", "gdb_10"} & set(found.names)
    assert found.skipped == {"listed in uncharacterized.txt": 2}
    (folder / "uncharacterized.txt").write_text("404: not found\n")
    with pytest.raises(UserError, match="no row of an index and a SMILES"):
        load_molecules(folder)


CUTS = {
    "count": (lambda lines: ["five", *lines[1:]], "line 1: expected the number of atoms, found 'five'"),
    "digits": (lambda lines: ["9" * 5000, *lines[1:]], "line 1: expected the number of atoms, found '999"),
    "empty": (lambda lines: ["", " "], "line 1: the file is empty"),
    "no tail": (lambda lines: lines[:-1], "cut off: line 1 announces 3 atoms, and QM9 three lines"),
    "no atoms": (lambda lines: lines[:3], "line 3: cut off"),
    "short atom": (lambda lines: [*lines[:3], "H\t0.1\t0.2", *lines[4:]], "line 4: an element and three coordinates"),
    "no number": (lambda lines: [*lines[:2], "O\t0.1\t0.x\t1\t0", *lines[3:]], "line 3: '0.x' is not a number"),
    "properties": (
        lambda lines: [lines[0], lines[1].rsplit("\t", 2)[0], *lines[2:]],
        "line 2: a QM9 property line has 17",
    ),
    "underscore": (
        lambda lines: [*lines[:2], "O\t1_5\t0\t1\t0", *lines[3:]],
        "line 3: '1_5' is not a number",
    ),
    "second frame": (lambda lines: [*lines, "3", "water"], "line 10: cut off: line 9 announces 3 atoms, so"),
    "nan": (
        lambda lines: [*lines[:2], "O\tnan\t0\t1\t0", *lines[3:]],
        "line 1: a coordinate is not a number or farther",
    ),
}


@pytest.mark.parametrize("case", CUTS)
def test_broken_xyz_names_file_and_line(tmp_path, case):
    water = small(WATER)
    change, message = CUTS[case]
    lines = change(qm9_text(water, 0, 7).splitlines())
    (tmp_path / "good.xyz").write_text(qm9_text(water, 0, 1))
    (tmp_path / "odd.xyz").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=f"odd.xyz, {message}" if message.startswith("line") else f"odd.xyz, .*{message}"
    ):
        load_molecules(tmp_path)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda lines: lines[:-1], r"line 21: cut off: the last record ends without \$\$\$\$"),
        (lambda lines: lines[:14], "line 14: cut off: the last record ends without"),
        (lambda lines: lines[:6], "line 6: cut off: line 4 announces 3 atoms"),
        (lambda lines: lines[:3], "line 3: cut off: an SDF record has four lines of header"),
        (lambda lines: [*lines[:4], "    0.0000   broken", *lines[5:]], "line 5: three coordinates and an element"),
        (
            lambda lines: [*lines[:4], lines[4].replace("0.3910", "0.39x0"), *lines[5:]],
            r"line 5: '0.39x0' is not a number \(record 1, titled 'a', lines 1 to 11\)",
        ),
        (
            lambda lines: [*lines[:14], "", *lines[15:]],
            r"line 15: .* found nothing \(record 2, titled 'b', lines 12 to 22\)",
        ),
        (lambda lines: [*lines[:3], " xx  2  0", *lines[4:]], r"line 4: expected the number of atoms"),
        (lambda lines: [*lines[:3], lines[3].replace("V2000", "V3000"), *lines[4:]], "line 4: a V3000 record"),
    ],
)
def test_broken_sdf_names_file_and_line(tmp_path, cut, message):
    water = small(WATER)
    lines = cut((sdf_text(water, 0, "a") + sdf_text(water, 0, "b")).splitlines())
    path = tmp_path / "a.sdf"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"a.sdf, {message}"):
        load_molecules(path)


def test_a_drawing_is_told_from_a_molecule_that_is_flat(tmp_path):
    formaldehyde = ("OCHH", [[0, 1.2, 0], [0, 0, 0], [0.94, -0.54, 0], [-0.94, -0.54, 0]])
    text = sdf_text(small(formaldehyde), 0, "flat")
    (tmp_path / "a.sdf").write_text(text)
    assert len(load_molecules(tmp_path / "a.sdf")) == 1
    (tmp_path / "a.sdf").write_text(text + text.replace("3D", "2D"))
    found = load_molecules(tmp_path / "a.sdf")
    assert found.names == ("flat",) and found.skipped == {"a drawing in 2D, without coordinates in space": 1}
    with pytest.raises(UserError, match="a.sdf, line 14: a drawing in 2D"):
        load_molecules(tmp_path / "a.sdf", strict=True)
    (tmp_path / "a.sdf").write_text(text.replace("3D", "2D"))
    with pytest.raises(UserError, match="no molecule to use .1 × a drawing in 2D, without coordinates in space"):
        load_molecules(tmp_path / "a.sdf")


def test_unknown_elements_large_molecules_and_repetitions(tmp_path):
    water = small(WATER)
    text = qm9_text(water, 0, 7)
    (tmp_path / "a.xyz").write_text(text)
    (tmp_path / "b.xyz").write_text(text)  # the same molecule twice
    (tmp_path / "c.xyz").write_text(text.replace("0.3910", "0.3930"))  # its index twice
    (tmp_path / "d.xyz").write_text("2\nsalt\nNa 0 0 0\nCl 0 0 2.4\n")
    (tmp_path / "e.xyz").write_text("30\n\n" + "".join(f"C 0 0 {i}\n" for i in range(30)))
    found = load_molecules(tmp_path)
    assert found.names == ("gdb_7", "gdb_7#2")
    assert found.skipped == {"an exact repetition": 1, "an element other than H C N O F": 1, "more than 29 atoms": 1}
    with pytest.raises(UserError, match="b.xyz, line 1: an exact repetition"):
        load_molecules(tmp_path, strict=True)
    for name in "abc":
        (tmp_path / f"{name}.xyz").unlink()
    with pytest.raises(UserError, match="d.xyz, line 1: an element other"):
        load_molecules(tmp_path, strict=True)
    with pytest.raises(UserError, match="no molecule to use"):
        load_molecules(tmp_path)


def test_extended_xyz_columns(tmp_path):
    (tmp_path / "a.extxyz").write_text(
        '3\nLattice="9 0 0 0 9 0 0 0 9" Properties=id:I:1:pos:R:3:species:S:1 name="my water" gap=8.5\n'
        "1 0 0 0.1 O\n2 0 0.7 -0.4 H\n3 0 -0.7 -0.4 H\n\n"
    )
    found = load_molecules(tmp_path / "a.extxyz")
    assert (found.names, found.gap.tolist()) == (("my water",), [8.5])
    assert_array_equal(found.atoms(0)[0], [4, 1, 1])
    # As ASE writes it, if asked for.
    (tmp_path / "a.extxyz").write_text("2\nProperties=pos:R:3:numbers:I:1\n0 0 0 1\n0 0 0.92 9\n")
    assert load_molecules(tmp_path / "a.extxyz").atoms(0)[0].tolist() == [1, 5]
    (tmp_path / "a.extxyz").write_text("1\nhomo-lumo-gap=0.3 info='gap=2' note=\"a gap=3 b\"\nH 0 0 0\n")
    assert load_molecules(tmp_path / "a.extxyz").gap is None
    (tmp_path / "a.extxyz").write_text("1\nProperties=species:S:1:momentum:R:3\nH 0 0 0\n")
    with pytest.raises(UserError, match="a.extxyz, line 2: .* no pos:R:3"):
        load_molecules(tmp_path / "a.extxyz")


def test_files_joined_with_empty_lines_between_them(tmp_path):
    (tmp_path / "a.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n\n \n2\n\nH 0 0 0\nF 0 0 0.92\n\n")
    found = load_molecules(tmp_path / "a.xyz")
    assert found.names == ("a_1", "a_2") and found.elements[:, :2].tolist() == [[1, 1], [1, 5]]


def test_names_that_no_other_program_takes(tmp_path):
    """Names of files that are no UTF-8, as an archive from Windows leaves them, and numbers in place of names."""
    with open(os.fsencode(tmp_path) + b"/caf\xe9.xyz", "w") as file:
        file.write("1\n\nH 0 0 0\n")
    found = load_molecules(tmp_path)
    assert found.names == (r"caf\udce9",)
    write_xyz(found, tmp_path / "out" / "a.xyz")
    write_sdf(found, tmp_path / "out" / "a.sdf", [failed("")])
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    columns = {"atomic_numbers": [[1]] * 2, "positions": [[0.0] * 3] * 2, "name": [0, 7]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "out" / "a.parquet")
    assert load_molecules(tmp_path / "out" / "a.parquet").names == ("0", "7")


def test_parquet(tmp_path, molecules):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    atoms = [molecules.atoms(row) for row in range(12)]
    numbers = [[[0, 1, 6, 7, 8, 9][code] for code in elements] for elements, _ in atoms]
    columns = {"atomic_numbers": numbers, "positions": [points.reshape(-1).tolist() for _, points in atoms]}
    parquet.write_table(pyarrow.table(columns | {"name": list(molecules.names), "gap": np.arange(12.0)}), path)
    found = load_molecules(path)
    coordinates_close(found, molecules, 1e-6)
    assert found.names == molecules.names and found.gap[5] == 5
    nested = columns | {"positions": [points.tolist() for _, points in atoms]}
    parquet.write_table(pyarrow.table(nested), path)
    found = load_molecules(path)
    coordinates_close(found, molecules, 1e-6)
    parquet.write_table(pyarrow.table(columns | {"positions": [[0.0] * 7] * 12}), path)
    with pytest.raises(UserError, match="a.parquet, row 1: .* coordinates, found 7"):
        load_molecules(path)
    wrong = [[float(number) for number in row] for row in numbers]
    parquet.write_table(pyarrow.table(columns | {"atomic_numbers": wrong}), path)
    assert np.array_equal(load_molecules(path).elements, molecules.elements)
    for value in (6.7, float("inf"), float("nan")):
        wrong[1][0] = value
        parquet.write_table(pyarrow.table(columns | {"atomic_numbers": wrong}), path)
        says = "a.parquet, row 2: atomic_numbers must be integers" + ", found 6.7" * (value == 6.7)
        with pytest.raises(UserError, match=says):
            load_molecules(path)
    texts = [[str(number) for number in row] for row in numbers]
    parquet.write_table(pyarrow.table(columns | {"atomic_numbers": texts}), path)
    with pytest.raises(UserError, match=r"a.parquet, row 1: atomic_numbers must be integers, found '\d'"):
        load_molecules(path)
    parquet.write_table(pyarrow.table({"positions": [[0.0]]}), path)
    with pytest.raises(UserError, match="no column atomic_numbers"):
        load_molecules(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cut off or no Parquet"):
        load_molecules(path)


def test_what_we_write_we_read(tmp_path, molecules):
    write_xyz(molecules, tmp_path / "a.xyz")
    found = load_molecules(tmp_path / "a.xyz")
    coordinates_close(found, molecules, 2e-6)
    assert found.names == molecules.names
    broken = small(METHANE, ("CCC", [[0, 0, 0], [0.3, 0, 0], [0, 0.3, 0]]))
    write_sdf(broken, tmp_path / "b.sdf")
    coordinates_close(load_molecules(tmp_path / "b.sdf"), broken, 1e-4)
    whole, damaged = Chem.SDMolSupplier(str(tmp_path / "b.sdf"), sanitize=False)
    assert (whole.GetNumBonds(), whole.GetProp("valid"), whole.GetProp("smiles")) == (4, "1", "C")
    assert (damaged.GetNumBonds(), damaged.GetProp("valid"), damaged.GetProp("fragments")) == (0, "0", "0")
    for molecule in Chem.SDMolSupplier(str(tmp_path / "b.sdf"), removeHs=False):  # as others read it
        assert sum(atom.GetNumImplicitHs() + atom.GetNumExplicitHs() for atom in molecule.GetAtoms()) == 0


def test_canonical_order_does_not_depend_on_the_files(tmp_path, molecules):
    shuffle = np.random.default_rng(0)
    mixed = []
    for row in range(12):
        elements, positions = molecules.atoms(row)
        order = shuffle.permutation(len(elements))
        mixed.append(Molecule(molecules.names[row], elements[order], positions[order]))
    write_npz(assemble(mixed, "mixed"), tmp_path / "a.npz")
    found = load_molecules(tmp_path / "a.npz", order="canonical")
    assert_array_equal(found.elements, molecules.elements)
    # Symmetric atoms may have changed places: their sorted distances to the centre have not.
    radii = [np.sort(np.linalg.norm(part.positions, axis=-1)) for part in (found, molecules)]
    assert_allclose(radii[0], radii[1], atol=1e-5)
