"""Files as they are or compressed by gzip, bzip2 or xz, told by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

from unite_fast.errors import UserError

SUFFIXES = (".gz", ".bz2", ".xz")
OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError)  # as the three raise it, OSErrors without a number


def is_compressed(head: bytes) -> bool:
    """Whether a file begins so."""
    return head.startswith(tuple(magic for magic, _ in OPENERS))


def opened(path: Path) -> BinaryIO:
    """The content of a file, decompressed as it is read; errors are those of `DAMAGE`."""
    with path.open("rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in OPENERS if head.startswith(magic)), open)
    return opener(path, "rb")


def content_name(path: PurePath) -> str:
    """Name of a file without the suffix of a compression: a.sdf for a.sdf.gz."""
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what reading raises into one sentence.

    Raises:
        UserError: the file cannot be read, or its compressed content is cut off or damaged.
    """
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        raise UserError(f"{path} is a truncated or damaged compressed file: download or pack it again") from None
