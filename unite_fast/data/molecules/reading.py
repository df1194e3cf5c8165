"""`load_molecules`: QM9's own files and general formats, recognised by their content, cached as NPZ."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unite_fast.data.molecules.arrangement import Order, canonical
from unite_fast.data.molecules.compressed import DAMAGE, SUFFIXES, content_name, explained, is_compressed, opened
from unite_fast.data.molecules.formats import HARTREE, read_sdf, read_xyz
from unite_fast.data.molecules.molecule_set import QM9_KEPT, Molecule, MoleculeSet, assemble, read_npz, write_npz
from unite_fast.data.molecules.parquet import read_parquet
from unite_fast.errors import UserError
from unite_fast.progress import track

log = logging.getLogger("unite_fast.data")

# Raised with every change of what the readers give, so that an old cache is made again.
VERSION = 6
XYZ_NAMES = (".xyz", ".extxyz")
SDF_NAMES = (".sdf", ".mol")
LARGEST_MEMBER = 64 << 20  # bytes of one XYZ file in an archive; QM9's largest has 3 kB
QM9_NAME = re.compile(r"gdb_(\d+)$")
QM9_ALL, QM9_EXCLUDED = 133_885, 3_054
UNCHARACTERIZED = "uncharacterized.txt"
EXCLUDED_REASON = f"listed in {UNCHARACTERIZED}"
# A row of uncharacterized.txt: an index and a SMILES of H C N O F, followed by three numbers; no English word of the
# header is one.
EXCLUDED_ROW = re.compile(r"\s*(\d+)\s+(?=\S*[CNOF])[\[\]()CNOFHcno0-9#=+\-@/\\.]+\s")


def load_molecules(
    path: str | Path, *, order: Order = "file", strict: bool = False, cache: str | Path | None = None
) -> MoleculeSet:
    """Read molecules of H, C, N, O, F from whatever stands at a path.

    What is recognised, whatever it is called: a folder of .xyz or .extxyz files (`dsgdb9nsd_*.xyz` among them), a
    tar archive of such files, one such file, an SDF or MOL file (V2000; elements and coordinates only), NPZ (see
    `read_npz`), Parquet (see `read_parquet`). Archives and text files may be compressed by gzip, bzip2 or xz, as
    `a.sdf.gz` in a folder of SDF files. Of a folder with XYZ files these alone are read, and a warning names the
    others; without them it stands for its SDF and MOL files, or for exactly one other.

    QM9's molecules, which are those named gdb_<index>, are put in the order of their indices, and those listed in an
    `uncharacterized.txt` in the same folder are left out. Their gaps come from the XYZ files, or for `gdb9.sdf` from
    `gdb9.sdf.csv` beside it.

    Args:
        path: file or folder.
        order: of the atoms; "file", or "canonical" for RDKit's canonical one, see `arrangement.canonical`.
        strict: refuse molecules with an unknown element, more than 29 atoms or two atoms in one place, and repetitions,
            in place of leaving them out.
        cache: folder that keeps the result as NPZ for the next time; it is made again when the files change.

    Raises:
        UserError: nothing there, nothing recognised, a file that is broken or cut off (with its line), no molecule
            left, and under `strict` one that would be left out.
    """
    path = _one_file(Path(path))
    stored = None if cache is None else Path(cache) / f"molecules_{_fingerprint(path, order, strict)}.npz"
    if stored is not None and stored.exists():
        try:
            return read_npz(stored)
        except UserError as error:
            log.warning("%s; reading %s again", error, path)
    molecules = _without_uncharacterized(_read(path, strict), path)
    if order == "canonical":
        molecules, _ = canonical(molecules)
    if stored is not None:
        write_npz(molecules, stored)
    return molecules


def _one_file(path: Path) -> Path:
    """The path itself, or the only molecule file of a folder."""
    try:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"no file or folder {path}: docs/molecules.md says what can be read")
            return path
        xyz = set(_named(path, XYZ_NAMES))
        found = [e for e in sorted(path.iterdir()) if e.is_file() and _suffix(e) not in (".txt", ".csv")]
        known = [e for e in found if e not in xyz and not e.name.startswith(".") and _kind(e)]
        if xyz:
            if known:
                log.warning("of %s only the XYZ files are read, not %s", path, _listed(known))
            return path
        if known and known == _named(path, SDF_NAMES):
            return path if len(known) > 1 else known[0]
    except OSError as error:
        where = error.filename or path  # of a folder's files maybe one, which is opened to see what it is
        raise UserError(f"cannot read {where}: {error.strerror or error}; check its permissions") from None
    if not known:
        raise UserError(f"{path} holds no XYZ, SDF, MOL, tar, NPZ or Parquet file: give a folder or file of molecules")
    if len(known) != 1:
        raise UserError(f"{path} holds several sets of molecules ({_listed(known)}): name one file")
    return known[0]


def _listed(files: list[Path]) -> str:
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return ", ".join(entry.name for entry in files[:5]) + more


def _named(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = (entry for entry in folder.iterdir() if _suffix(entry) in suffixes and not entry.name.startswith("."))
    # A compressed archive of XYZ files may go without .tar in its name.
    return sorted(entry for entry in found if entry.suffix.lower() in suffixes or _kind(entry) != "tar")


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in SUFFIXES else suffix


def _members(folder: Path) -> list[Path]:
    """The files that a folder of molecule files stands for."""
    return _named(folder, XYZ_NAMES) or _named(folder, SDF_NAMES)


def _kind(path: Path) -> str | None:
    """Format of a file, from its first bytes."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    if head.startswith(b"PAR1"):
        return "parquet"
    if is_compressed(head):
        try:
            with opened(path) as file:
                head = file.read(4096)
        except DAMAGE:  # its reader says so
            return _text_kind(b"", _suffix(path)) or "tar"
        # A tar's first block, the name of a file, is padded with zeros; of texts UTF-16 alone holds them.
        if b"\0" in head and _encoding(head) != "utf-16":
            return "tar"
    elif head[257:262] == b"ustar":
        return "tar"
    # A text file that is broken from the start should be told so, and not be no molecule.
    return _text_kind(head, _suffix(path))


def _text_kind(head: bytes, suffix: str) -> str | None:
    """Format of a text file, from its first bytes and its suffix."""
    lines = _text_lines(head)
    if suffix in SDF_NAMES or len(lines) > 3 and ("V2000" in lines[3] or "V3000" in lines[3]):
        return "sdf"
    if suffix in XYZ_NAMES or lines and lines[0].strip().isdecimal():
        return "xyz"
    return None


def _read(path: Path, strict: bool) -> MoleculeSet:
    source = str(path)
    if path.is_dir():
        return assemble(_in_order(_folder(path)), source, strict=strict)
    try:
        kind = _kind(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if kind == "npz":
        return read_npz(path, strict=strict)
    if kind == "parquet":
        return read_parquet(path, strict=strict)
    if kind == "tar":
        return assemble(_in_order(_archive(path)), source, strict=strict)
    if kind == "xyz":
        return assemble(read_xyz(_lines(path), source), source, strict=strict)
    if kind == "sdf":
        with track("reading molecules", QM9_ALL) as advance:
            return assemble(_in_order(_counted(_sdf(path), advance)), source, strict=strict)
    raise UserError(
        f"{path} is no molecule file: its first lines are neither XYZ (a number of atoms) nor SDF, and its first bytes "
        f"not those of a tar archive, NPZ or Parquet. Convert it to an SDF (V2000) in 3D with all hydrogens, for "
        f"example by RDKit or Open Babel"
    )


def _in_order(molecules: Iterable[Molecule]) -> list[Molecule]:
    """QM9's molecules by index, others as they came: archives and folders list files as they please."""
    found = list(molecules)
    matches = [QM9_NAME.match(molecule.name) for molecule in found]
    if not all(matches):
        return found
    by_index = sorted(range(len(found)), key=lambda place: int(matches[place].group(1)))
    return [found[place] for place in by_index]


def _counted(molecules: Iterable[Molecule], advance: Callable[[int], object]) -> Iterator[Molecule]:
    for molecule in molecules:
        yield molecule
        advance(1)


def _folder(folder: Path) -> Iterator[Molecule]:
    files = _members(folder)
    with track("reading molecules", len(files)) as advance:
        for path in files:
            yield from _sdf(path) if _suffix(path) in SDF_NAMES else read_xyz(_lines(path), str(path))
            advance(1)


def _lines(path: Path) -> list[str]:
    with explained(path), opened(path) as file:
        return _text_lines(file.read())


def _text_lines(content: bytes) -> list[str]:
    return content.decode(_encoding(content), "replace").splitlines()


def _encoding(head: bytes) -> str:
    """Of a text file, from its first bytes: UTF-8, or what Windows PowerShell's > writes."""
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _sdf(path: Path) -> Iterator[Molecule]:
    gaps = _csv_gaps(_table(path))
    with explained(path), opened(path) as file:
        lines = io.TextIOWrapper(file, encoding=_encoding(file.peek(2)), errors="replace")
        for molecule in read_sdf(lines, str(path)):
            yield molecule._replace(gap=gaps.get(molecule.name))


def _table(path: Path) -> Path:
    """Where the gaps of an SDF file stand."""
    return path.with_name(content_name(path) + ".csv")


def _csv_gaps(path: Path) -> dict[str, float]:
    """mol_id -> gap in eV from a table of Hartrees as it comes with gdb9.sdf; without those it leaves empty."""
    if not path.exists():
        return {}
    with explained(path):
        content = path.read_bytes()
    try:
        text = content.decode(_encoding(content))
        # Excel's "Unicode text" is UTF-16 with tabs between the columns.
        separator = "\t" if "\t" in text.partition("\n")[0] else ","
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        return {row["mol_id"]: float(row["gap"]) * HARTREE for row in rows if row["gap"] != ""}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} lacks a column mol_id or gap, or a number in it: repair or remove it") from None


def _archive(path: Path) -> Iterator[Molecule]:
    """Molecules of the XYZ files in a tar archive, read once from front to back, nothing unpacked to disk."""
    members = 0
    last = "its beginning"
    try:
        with opened(path) as file:
            stream = _Watched(file)
            with tarfile.open(fileobj=stream, mode="r|") as archive, track("reading molecules", QM9_ALL) as advance:
                for member in archive:
                    name = member.name.rsplit("/", 1)[-1]
                    if not member.isreg() or name.startswith(".") or not name.lower().endswith(XYZ_NAMES):
                        continue
                    if member.size > LARGEST_MEMBER:
                        raise UserError(f"{path}: {member.name} has {member.size} bytes, an XYZ file has thousands")
                    content = archive.extractfile(member)
                    assert content is not None  # regular files have content
                    yield from read_xyz(_text_lines(content.read()), f"{path}: {member.name}")
                    members, last = members + 1, member.name
                    advance(1)
            # An archive cut between two members would pass for a shorter one; a whole one ends in zeros.
            if not stream.ends_in_zeros():
                raise EOFError
        if not members:
            raise UserError(f"{path} holds no .xyz file, and nothing else is read from an archive: unpack it first")
    except (tarfile.TarError, *DAMAGE) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        raise UserError(f"{path} is cut off or damaged after {last}, member {members}: download it again") from None


class _Watched(io.RawIOBase):
    """A stream that remembers its last block."""

    def __init__(self, file: BinaryIO):
        self._file, self._tail = file, b""

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._tail = (self._tail + block)[-2 * tarfile.BLOCKSIZE :]
        return block

    def ends_in_zeros(self) -> bool:
        while self.read(1 << 16):
            pass
        return len(self._tail) == 2 * tarfile.BLOCKSIZE and not any(self._tail)


def _without_uncharacterized(molecules: MoleculeSet, path: Path) -> MoleculeSet:
    matches = [QM9_NAME.match(name) for name in molecules.names]
    if not all(matches) or EXCLUDED_REASON in molecules.skipped:
        return molecules
    indices = np.array([int(match.group(1)) for match in matches])
    table = (path if path.is_dir() else path.parent) / UNCHARACTERIZED
    if not table.exists():
        if len(molecules) == QM9_ALL:
            log.warning("no %s beside QM9: the %d molecules it lists stay in the set", UNCHARACTERIZED, QM9_EXCLUDED)
        return molecules
    rows = [EXCLUDED_ROW.match(line) for line in _lines(table)]
    excluded = np.array([int(row.group(1)) for row in rows if row], np.int64)
    if not len(excluded):
        raise UserError(f"{table} has no row of an index and a SMILES: download it again")
    keep = np.flatnonzero(~np.isin(indices, excluded))
    if not len(keep):
        raise UserError(f"{table} lists every molecule of {path}: nothing is left")
    if len(molecules) == QM9_ALL and len(keep) != QM9_KEPT:
        log.warning("%s leaves %d of %d molecules, not QM9's %d: is it whole?", table, len(keep), QM9_ALL, QM9_KEPT)
    skipped = molecules.skipped | {EXCLUDED_REASON: len(molecules) - len(keep)}
    return replace(molecules.select(keep), skipped=skipped)


def _fingerprint(path: Path, order: Order, strict: bool) -> str:
    """Changes with the files' names, sizes and times, and with the way they are read."""
    files = _members(path) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    text = [f"{VERSION} {order} {strict} {path.resolve()}"]
    tables = [_table(file) for file in files if _suffix(file) not in XYZ_NAMES]
    for file in [*files, folder / UNCHARACTERIZED, *tables]:
        if file.exists():
            status = file.stat()
            text.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(text).encode("utf-8", "replace")).hexdigest()[:16]
