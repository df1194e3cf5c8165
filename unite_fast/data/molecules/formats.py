"""Molecules from lines of text: XYZ in QM9's dialect and the extended one, and the atoms of SDF records.

Every error names the file and the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath

from unite_fast.data.molecules.compressed import content_name
from unite_fast.data.molecules.molecule_set import Molecule, element_code
from unite_fast.errors import UserError

HARTREE = 27.211386245988  # eV, CODATA 2018
QM9_COMMENT = re.compile(r"gdb\s+(\d+)\s")
QM9_FIELDS = 17  # tag, index, A, B, C, mu, alpha, homo, lumo, gap, r2, zpve, U0, U, H, G, Cv
QM9_GAP = 9
QM9_TAIL = 3  # frequencies, two SMILES, two InChI
# key=value, where a value with spaces stands in quotes; the gap of homo-lumo-gap=0.2 is none in eV
EXTENDED_PAIR = re.compile(r"""(?<!\S)([A-Za-z_]\w*)=(?:"([^"]*)"|'([^']*)'|(\S+))""")
PLAIN_COLUMNS = "species:S:1:pos:R:3"


def read_xyz(lines: Sequence[str], file: str) -> Iterator[Molecule]:
    """Frames of an XYZ file: QM9's, extended or plain, one after the other, with or without empty lines between them.

    A frame is QM9's if its second line begins with `gdb` and an index; its name is then gdb_<index>, its gap comes from
    the property line (Hartree, given in eV). Of an extended comment, Properties tells where element and coordinates
    stand, and name and gap (eV) are taken.

    Args:
        lines: of the file, with or without line ends.
        file: its name, for messages and for the names of nameless molecules.

    Raises:
        UserError: cut off or broken, with the line.
    """
    end = len(lines)
    while end and not lines[end - 1].strip():
        end -= 1
    start = frame = 0
    if end == 0:
        raise UserError(f"{file}, line 1: the file is empty")
    while start < end:
        if not lines[start].strip():  # files joined by cat keep their last empty lines
            start += 1
            continue
        count = _count(lines[start], file, start + 1)
        qm9 = QM9_COMMENT.match(lines[start + 1].strip()) if start + 1 < end else None
        stop = start + 2 + count + (QM9_TAIL if qm9 else 0)
        if stop > end:
            raise UserError(
                f"{file}, line {end}: cut off: line {start + 1} announces {count} atoms"
                f"{', and QM9 three lines after them' if qm9 else ''}, so line {stop} should be there"
            )
        frame += 1
        where = f"{file}, line {start + 1}"
        comment = lines[start + 1].strip()
        atoms = range(start + 2, start + 2 + count)
        if qm9:
            yield _qm9(lines, atoms, comment, file)._replace(where=where)
        else:
            pairs = {key: a or b or c for key, a, b, c in EXTENDED_PAIR.findall(comment)}
            species, position = _columns(pairs.get("Properties", PLAIN_COLUMNS), file, start + 2)
            elements, positions = _atoms(lines, atoms, species, position, file)
            single = frame == 1 and stop == end
            name = pairs.get("name") or f"{_stem(file)}{'' if single else f'_{frame}'}"
            gap = _number(pairs["gap"], file, start + 2) if "gap" in pairs else None
            yield Molecule(name, elements, positions, gap, where)
        start = stop


def _qm9(lines: Sequence[str], atoms: range, comment: str, file: str) -> Molecule:
    fields = comment.split()
    if len(fields) != QM9_FIELDS:
        raise UserError(
            f"{file}, line {atoms.start}: a QM9 property line has {QM9_FIELDS} fields, this one has {len(fields)}"
        )
    elements, positions = _atoms(lines, atoms, 0, 1, file)
    gap = _number(fields[QM9_GAP], file, atoms.start) * HARTREE
    return Molecule(f"gdb_{int(fields[1])}", elements, positions, gap)


def _count(line: str, file: str, number: int) -> int:
    text = line.strip()
    # isdecimal is true of digits that int() reads and false of signs, dots and superscripts; int() refuses thousands.
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{file}, line {number}: expected the number of atoms, found {_shown(text)}")
    return int(text)


def _columns(properties: str, file: str, number: int) -> tuple[int, int]:
    """Where the element and the first coordinate stand, by an extended XYZ comment's Properties."""
    parts = properties.split(":")
    column = 0
    found: dict[str, int] = {}
    for name, kind, width in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        if not width.isdecimal():
            break
        found[f"{name}:{kind}:{width}"] = column
        column += int(width)
    species = found.get("species:S:1", found.get("numbers:I:1"))
    if species is None or "pos:R:3" not in found:
        raise UserError(
            f"{file}, line {number}: Properties={properties} has neither species:S:1 nor numbers:I:1, or no pos:R:3"
        )
    return species, found["pos:R:3"]


def _atoms(
    lines: Sequence[str], atoms: range, species: int, position: int, file: str
) -> tuple[list[int], list[list[float]]]:
    elements, positions = [], []
    for index in atoms:
        fields = lines[index].split()
        if len(fields) <= max(species, position + 2):
            raise UserError(
                f"{file}, line {index + 1}: an element and three coordinates expected, found {_shown(lines[index])}"
            )
        elements.append(element_code(fields[species]))
        positions.append([_number(text, file, index + 1) for text in fields[position : position + 3]])
    return elements, positions


def _number(text: str, file: str, number: int) -> float:
    try:
        # QM9 was written by Mathematica, where 1.2*^-6 is 1.2e-6. float() would take 1_5 for 15.
        return float(text.replace("*^", "e").replace("_", "?"))
    except ValueError:
        raise UserError(f"{file}, line {number}: {_shown(text)} is not a number") from None


def _stem(file: str) -> str:
    return PurePath(content_name(PurePath(file))).stem


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 40 else text[:39] + "…") if text else "nothing"


def read_sdf(lines: Iterable[str], file: str) -> Iterator[Molecule]:
    """Names, elements and coordinates of the V2000 records of an SDF or MOL file.

    Bonds and charges are passed over: those of gdb9.sdf are known to be wrong.

    Args:
        lines: of the file; they are read one record at a time.
        file: its name, for messages and for the names of nameless molecules.

    Raises:
        UserError: cut off, broken or a V3000 record, with the line and the record.
    """
    record: list[str] = []
    before = count = 0
    for line in lines:
        record.append(line.rstrip("\r\n"))
        if line.startswith("$$$$"):
            count += 1
            try:
                found = _record(record, before, count, file)
            except UserError as error:
                place = f"lines {before + 1} to {before + len(record)}"
                raise UserError(f"{error} (record {count}, titled {_shown(record[0])}, {place})") from None
            yield found
            before += len(record)
            record = []
    if any(line.strip() for line in record):
        if count:
            raise UserError(f"{file}, line {before + len(record)}: cut off: the last record ends without $$$$")
        yield _record(record, before, 1, file)  # a MOL file is one record without the line of dollars
    elif count == 0:
        raise UserError(f"{file}, line 1: the file is empty")


def _record(lines: Sequence[str], before: int, record: int, file: str) -> Molecule:
    """One record, which `before` lines of the file precede."""
    if len(lines) < 4:
        raise UserError(f"{file}, line {before + len(lines)}: cut off: an SDF record has four lines of header")
    if "V3000" in lines[3]:
        raise UserError(f"{file}, line {before + 4}: a V3000 record; only V2000 is read: convert the file")
    count = _count(lines[3][:3], file, before + 4)
    if 4 + count > len(lines) or all(line.rstrip() != "M  END" for line in lines):
        raise UserError(
            f"{file}, line {before + len(lines)}: cut off: line {before + 4} announces {count} atoms, "
            f"and the record ends without them or without M  END"
        )
    elements, positions = [], []
    for index in range(4, 4 + count):
        line, number = lines[index], before + index + 1
        if len(line) < 32:
            raise UserError(f"{file}, line {number}: three coordinates and an element expected, found {_shown(line)}")
        positions.append([_number(line[at : at + 10], file, number) for at in (0, 10, 20)])
        elements.append(element_code(line[31:34].strip()))
    # A flat molecule is flat in 3D as well, so the record's own word counts.
    drawn = lines[1][20:22] == "2D" and not any(z for _, _, z in positions)
    name = lines[0].strip() or f"{_stem(file)}_{record}"
    flaw = "a drawing in 2D, without coordinates in space" if drawn else None
    return Molecule(name, elements, positions, where=f"{file}, line {before + 1}", flaw=flaw)
