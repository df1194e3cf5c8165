"""Whether a folder takes files, asked before the long work whose result belongs there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from unite_fast.errors import UserError


def require_writable(folder: Path, what: str, remedy: str) -> None:
    """Refuse a folder that cannot take files; one that is still missing is judged by the folder it would be made in.

    Args:
        folder: where files are to be written.
        what: those files, for people.
        remedy: a sentence on what to do about it.

    Raises:
        UserError: says why, and the remedy.
    """
    try:
        tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())).close()
    except OSError as error:
        raise UserError(f"cannot write {what} into {folder}: {error.strerror or error}. {remedy}") from None
