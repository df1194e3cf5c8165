"""Molecules as padded arrays: what every reader returns, every cache holds and every metric takes."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unite_fast.errors import UserError
from unite_fast.replacing import replacing_file

SYMBOLS = ("H", "C", "N", "O", "F")  # element codes 1 … 5; 0 is padding
ATOMIC_NUMBERS = np.array([0, 1, 6, 7, 8, 9], np.uint8)  # by element code
MAX_ATOMS = 29  # C9H20, the largest saturated molecule of nine heavy atoms
# Coordinates beyond this are broken, not large: C9H20 stretched out is 12 Å long.
FARTHEST = 1000.0
CODE_OF_NUMBER = {int(number): code for code, number in enumerate(ATOMIC_NUMBERS) if code}
CODE_OF_SYMBOL = {symbol: code for code, symbol in enumerate(SYMBOLS, 1)}


def element_code(written: str) -> int:
    """Code of an element as files write it, a symbol in capitals or not, or an atomic number; 0 for other elements."""
    if written.isdecimal():
        return CODE_OF_NUMBER.get(int(written[:9]), 0)  # int() refuses thousands of digits
    return CODE_OF_SYMBOL.get(written.upper(), 0)  # of one letter, all five


class Molecule(NamedTuple):
    """One molecule as a reader found it."""

    name: str
    elements: Sequence[int]  # [n] codes 1 … 5; 0 where the element is not one of H C N O F
    positions: ArrayLike  # [n, 3] Å
    gap: float | None = None  # eV
    where: str = ""  # file and line, for messages
    flaw: str | None = None  # why it cannot be used, where its source says so


@dataclass(frozen=True)
class MoleculeSet:
    """n molecules of at most 29 atoms, hydrogens explicit.

    Attributes:
        elements: [n, 29] uint8, 0 = padding, 1 … 5 = H C N O F; the atoms of a molecule come first.
        positions: [n, 29, 3] float32 in Å. The unweighted mean over a molecule's atoms is zero (as in EDM, Hoogeboom
            et al. 2022; not the centre of mass of physics). Padding is zero.
        counts: [n] int64, atoms a molecule.
        names: of the molecules, each once.
        source: one line on where they come from, for records and captions.
        gap: [n] float32, HOMO-LUMO gap in eV, NaN where the source states none; None where it states none at all.
        skipped: reason -> number of molecules that were left out.
    """

    elements: NDArray[np.uint8]
    positions: NDArray[np.float32]
    counts: NDArray[np.int64]
    names: tuple[str, ...]
    source: str
    gap: NDArray[np.float32] | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[n, 29], true at real atoms."""
        return self.elements > 0

    def select(self, indices: ArrayLike) -> MoleculeSet:
        """The molecules at indices [m], in that order."""
        chosen = np.asarray(indices, np.int64)
        return replace(
            self,
            elements=self.elements[chosen],
            positions=self.positions[chosen],
            counts=self.counts[chosen],
            names=tuple(self.names[i] for i in chosen),
            gap=None if self.gap is None else self.gap[chosen],
        )

    def atoms(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Element codes [count] and positions [count, 3] of one molecule, without padding."""
        count = self.counts[index]
        return self.elements[index, :count], self.positions[index, :count]


def content_hash(molecules: MoleculeSet) -> str:
    """SHA-256 of a set's elements and positions."""
    found = hashlib.sha256()
    for array in (molecules.elements, molecules.positions):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def from_arrays(
    elements: ArrayLike, positions: ArrayLike, *, source: str, names: Sequence[str] | None = None
) -> MoleculeSet:
    """A set of what a model made.

    Args:
        elements: [n, N] codes, N at most 29, 0 = padding behind the atoms of a molecule.
        positions: [n, N, 3] Å; they are centred here, and what stands at padding is ignored.
        source: one line on where they come from.
        names: by default molecule_1, molecule_2, …

    Raises:
        UserError: no molecule, arrays of another shape, padding between atoms, a molecule without atoms, coordinates
            that are not finite (says how many).
    """
    codes, points = np.asarray(elements), np.asarray(positions)
    if codes.ndim != 2 or not 0 < codes.shape[1] <= MAX_ATOMS or points.shape != (*codes.shape, 3) or not len(codes):
        raise UserError(
            f"{source}: elements must be [n, N ≤ {MAX_ATOMS}] and positions [n, N, 3] with at least one molecule, "
            f"got {list(codes.shape)} and {list(points.shape)}"
        )
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() > len(SYMBOLS):
        raise UserError(f"{source}: element codes must be integers 0 … {len(SYMBOLS)}")
    mask = codes > 0
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise UserError(f"{source}: every molecule needs its atoms first and its padding last, and at least one atom")
    bad = int((~np.isfinite(points).all(2) & mask).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(codes)} molecules of {source} have NaN or infinite coordinates: the network diverged"
        )
    padded = _pad([(row[real], at[real].astype(np.float64)) for row, at, real in zip(codes, points, mask, strict=True)])
    chosen = tuple(names) if names is not None else tuple(f"molecule_{row + 1}" for row in range(len(codes)))
    if len(chosen) != len(codes):
        raise UserError(f"{source}: {len(chosen)} names for {len(codes)} molecules")
    return MoleculeSet(*padded, chosen, source)


class Split(NamedTuple):
    """Indices of the parts of a set."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]  # empty but for QM9


QM9_KEPT = 130_831  # 133,885 less the 3,054 of uncharacterized.txt
QM9_TRAIN, QM9_VALIDATION = 100_000, 17_748  # and 13,083 to test


def split(count: int, seed: int = 0) -> Split:
    """Divide `count` molecules by NumPy's seeded permutation.

    130,831 molecules are QM9's and divide into 100,000 / 17,748 / 13,083, with seed 0 the split of Cormorant and EDM.
    Of any other number a fifth is held out as validation.
    """
    # RandomState is the legacy generator, whose numbers NumPy has promised never to change.
    order = np.random.RandomState(seed).permutation(count)
    if count == QM9_KEPT:
        return Split(*np.split(order, [QM9_TRAIN, QM9_TRAIN + QM9_VALIDATION]))
    held_out = round(count / 5)
    return Split(order[held_out:], order[:held_out], order[:0])


def assemble(
    molecules: Iterable[Molecule], source: str, *, strict: bool = False, skipped: dict[str, int] | None = None
) -> MoleculeSet:
    """Collect molecules into a set and centre them.

    A molecule with an unknown element, more than 29 atoms, two atoms in one place or a flaw of its source is left out
    and counted, and so is one that repeats another of the same name exactly; one that only shares a name becomes
    name#2.

    Args:
        molecules: in the order of the set.
        source: see `MoleculeSet`.
        strict: refuse in place of leaving out.
        skipped: what was left out before.

    Raises:
        UserError: no molecule is left; coordinates that are not finite or farther than 1000 Å; under `strict` what
            would be left out.
    """
    kept: dict[str, tuple[NDArray[np.uint8], NDArray[np.float64]]] = {}
    # Of the molecules that share a name: their atoms' digests and the last number given. Comparing each with all would
    # take days where 100,000 share one.
    known: set[tuple[str, bytes]] = set()
    numbers: Counter[str] = Counter()
    gaps: list[float] = []
    left_out = Counter(skipped or {})
    for molecule in molecules:
        codes = np.asarray(molecule.elements, np.uint8)
        positions = np.asarray(molecule.positions, np.float64).reshape(-1, 3)
        # Names of files stand in for names, and need be no UTF-8, which RDKit and text files want.
        stated = molecule.name.encode("utf-8", "backslashreplace").decode()
        where = molecule.where or stated
        if not (np.abs(positions) < FARTHEST).all():  # false for NaN as well
            raise UserError(f"{where}: a coordinate is not a number or farther than {FARTHEST:g} Å: repair the file")
        content = codes.tobytes() + (positions + 0.0).tobytes()  # + 0.0 turns -0.0, which equals 0.0, into its bits
        same = stated, hashlib.blake2b(content, digest_size=16).digest()
        repeated = "an exact repetition" if same in known else None
        reason = molecule.flaw or repeated or _unusable(codes, positions)
        if reason is not None:
            if strict:
                raise UserError(f"{where}: {reason}; with data.strict=false such molecules are left out and counted")
            left_out[reason] += 1
            continue
        known.add(same)
        name = stated
        while name in kept:
            numbers[stated] += 1
            name = f"{stated}#{numbers[stated] + 1}"
        kept[name] = codes, positions
        gaps.append(np.nan if molecule.gap is None else molecule.gap)
    if not kept:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in left_out.items()) or "there are none"
        raise UserError(f"{source}: no molecule to use ({reasons})")
    elements, all_positions, counts = _pad(list(kept.values()))
    return MoleculeSet(
        elements=elements,
        positions=all_positions,
        counts=counts,
        names=tuple(kept),
        source=source,
        gap=None if np.isnan(gaps).all() else np.array(gaps, np.float32),
        skipped=dict(left_out),
    )


def _unusable(codes: NDArray[np.uint8], positions: NDArray[np.float64]) -> str | None:
    """Why a molecule of these elements [n] and positions [n, 3] is left out, if it is."""
    if len(codes) == 0:
        return "no atoms"
    if len(codes) > MAX_ATOMS:
        return f"more than {MAX_ATOMS} atoms"
    if not codes.all():
        return f"an element other than {' '.join(SYMBOLS)}"
    # Programs that have no coordinates write zeros.
    if len({tuple(point) for point in positions.tolist()}) < len(codes):
        return "two atoms in one place"
    return None


def _pad(
    molecules: Sequence[tuple[NDArray[np.uint8], NDArray[np.float64]]],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """Padded elements, positions with zero mean, and counts."""
    elements = np.zeros((len(molecules), MAX_ATOMS), np.uint8)
    positions = np.zeros((len(molecules), MAX_ATOMS, 3), np.float32)
    for row, (codes, points) in enumerate(molecules):
        elements[row, : len(codes)] = codes
        mean = points.mean(0)
        # What was centred and rounded to float32 before stays as it is, so that a cache gives back its input's bits.
        centred = np.abs(mean).max() <= np.finfo(np.float32).eps * np.abs(points).max()
        positions[row, : len(codes)] = points if centred else points - mean
    return elements, positions, (elements > 0).sum(1, dtype=np.int64)


def write_npz(molecules: MoleculeSet, path: str | Path) -> None:
    """Write a set as NPZ, aside and renamed; `read_npz` gives it back, bit for bit.

    Arrays: atomic_numbers [n, 29] uint8 with 0 as padding, positions [n, 29, 3] float32 in Å, names [n],
    gap [n] in eV where known, and about, a JSON text of source and skipped. No pickles.

    Raises:
        UserError: a path that cannot be written.
    """
    arrays: dict[str, NDArray] = {
        "atomic_numbers": ATOMIC_NUMBERS[molecules.elements],
        "positions": molecules.positions,
        "names": np.array(molecules.names),
        "about": np.array(json.dumps({"source": molecules.source, "skipped": molecules.skipped})),
    }
    if molecules.gap is not None:
        arrays["gap"] = molecules.gap
    with replacing_file(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_npz(path: str | Path, *, strict: bool = False) -> MoleculeSet:
    """Read an NPZ file as `write_npz` writes it, or another's.

    Arrays: atomic_numbers [n, N] (0 = padding) and positions [n, N, 3] in Å, any N; names, gap (eV) and about may be
    missing.

    Raises:
        UserError: missing or cut off, arrays of another shape or kind, and as `assemble`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is cut off or not an NPZ file without pickles: {error}") from None
    about = _about(arrays, path)
    numbers, positions = _shapes(arrays, path)
    names = arrays["names"] if "names" in arrays else [f"{Path(path).stem}_{row + 1}" for row in range(len(numbers))]
    lookup = np.zeros(256, np.uint8)
    lookup[ATOMIC_NUMBERS[1:]] = np.arange(1, len(ATOMIC_NUMBERS))
    gap = arrays.get("gap")
    molecules = (
        Molecule(
            name=str(names[row]),
            elements=lookup[numbers[row, real]],
            positions=positions[row, real],
            gap=None if gap is None else float(gap[row]),
            where=f"{path}, molecule {row + 1}",
        )
        for row, real in enumerate(numbers > 0)
    )
    return assemble(molecules, about["source"], strict=strict, skipped=about["skipped"])


def _about(arrays: dict[str, NDArray], path: str | Path) -> dict:
    if "about" not in arrays:
        return {"source": str(path), "skipped": {}}
    try:
        about = json.loads(str(arrays["about"]))
        return {"source": str(about["source"]), "skipped": {str(k): int(v) for k, v in about["skipped"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path}: its array "about" is not the JSON that unite_fast writes: remove it') from None


def _shapes(arrays: dict[str, NDArray], path: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    others = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if others:
        raise UserError(f"{path} is a ZIP archive of files such as {others[0]}, and no NPZ file: unpack it first")
    for name in ("atomic_numbers", "positions"):
        if name not in arrays:
            raise UserError(f"{path} has no array {name}; it has {', '.join(arrays) or 'none'}")
    numbers, positions = arrays["atomic_numbers"], arrays["positions"]
    if numbers.ndim != 2 or numbers.dtype.kind not in "iu" or positions.shape != (*numbers.shape, 3):
        raise UserError(
            f"{path}: atomic_numbers must be integers [n, N] and positions [n, N, 3], "
            f"got {numbers.dtype} {list(numbers.shape)} and {list(positions.shape)}"
        )
    if positions.dtype.kind != "f":
        raise UserError(f"{path}: positions must be floating-point numbers in Å, got {positions.dtype}")
    for name, kind in (("names", "U"), ("gap", "f")):
        if name in arrays and (arrays[name].shape != (len(numbers),) or arrays[name].dtype.kind != kind):
            raise UserError(
                f"{path}: {name} must be one {'text' if kind == 'U' else 'number'} a molecule ({len(numbers)}), "
                f"got {arrays[name].dtype} {list(arrays[name].shape)}"
            )
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= 255:
        raise UserError(f"{path}: atomic numbers must lie in 0 … 255, got {numbers.min()} … {numbers.max()}")
    return numbers, positions
