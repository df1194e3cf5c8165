"""Molecules from Parquet: one row a molecule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unite_fast.data.molecules.molecule_set import CODE_OF_NUMBER, Molecule, MoleculeSet, assemble
from unite_fast.errors import UserError


def read_parquet(path: str | Path, *, strict: bool = False) -> MoleculeSet:
    """Read one molecule a row.

    Columns: atomic_numbers (list of n integers) and positions (list of 3n numbers, or n lists of three, in Å); name and
    gap (eV) may be missing. Names may be numbers.

    Raises:
        UserError: pyarrow missing, a file that is no whole Parquet file, a column missing or of another kind, and as
            `assemble`.
    """
    parquet = _pyarrow().parquet
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
        raise UserError(f"{path} is cut off or no Parquet file: {str(error).splitlines()[0]}") from None
    for name in ("atomic_numbers", "positions"):
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name}; it has {', '.join(table.column_names) or 'none'}")
    rows = zip(
        table["atomic_numbers"].to_pylist(),
        table["positions"].to_pylist(),
        *(_optional(table, name) for name in ("name", "gap")),
        strict=True,
    )
    return assemble((_molecule(path, number, *row) for number, row in enumerate(rows, 1)), str(path), strict=strict)


def _molecule(path: str | Path, row: int, numbers: Any, positions: Any, name: Any, gap: Any) -> Molecule:
    where = f"{path}, row {row}"
    try:
        points = np.array(positions, np.float64).reshape(-1)
        broken = [number for number in numbers if isinstance(number, bool) or int(number) != number]
        codes = [CODE_OF_NUMBER.get(int(number), 0) for number in numbers]
        gap = None if gap is None else float(gap)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: atomic_numbers must be integers, positions and gap numbers") from None
    if broken:
        raise UserError(f"{where}: atomic_numbers must be integers, found {broken[0]!r}")
    if len(points) != 3 * len(codes):
        raise UserError(f"{where}: {len(codes)} atoms need {3 * len(codes)} coordinates, found {len(points)}")
    name = f"{Path(path).stem}_{row}" if name in (None, "") else str(name)
    return Molecule(name, codes, points.reshape(-1, 3), gap, where)


def _optional(table: Any, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [None] * len(table)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'unite_fast[parquet]'") from None
    return pyarrow
