"""Files that replace former ones, all of a file or all of a call's files at once."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unite_fast.errors import UserError

_ASIDE = re.compile(r"\.\d+\.tmp")


@contextmanager
def replacing_file(path: Path, what: str = "") -> Iterator[Path]:
    """A file to write beside `path`, which is flushed to disk and then takes its place: whole or not at all.

    Where writing fails or is interrupted, what was there stays as it was. Two processes do not share the file.

    Args:
        path: its folder is made if missing.
        what: is written, for the error; nothing for what goes without saying.

    Raises:
        UserError: full disk or unwritable folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes none that is open for reading alone
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {what}{' ' * bool(what)}{path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # renamed away, or its folder could not be made
            temporary.unlink()


@contextmanager
def replacing(
    folder: Path, *, former: Callable[[], Iterable[Path]] = tuple, last: str | None = None
) -> Iterator[Path]:
    """A folder to write into, whose files go into `folder` once all are there.

    Where writing fails or is interrupted, what was in `folder` stays as it was, and a folder made for this is removed.
    What a killed call left there in hiding is removed when the next one begins.

    Args:
        folder: made if missing.
        former: finds the files of a former call in it, which are then deleted.
        last: name of the file that is deleted first and moved last: while it is there, all it speaks of is.

    Raises:
        UserError: a folder that cannot be written. An OSError of the block itself is raised as it is: what writes
            files there explains its own, and others are of something else.
    """
    aside = folder / f".{os.getpid()}.tmp"
    new = not folder.exists()
    inside = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _occupied(folder):
            aside.mkdir(exist_ok=True)
            inside = True
            yield aside
            inside = False
            gone = list(former())
            if last is not None:
                (folder / last).unlink(missing_ok=True)
            for path in gone:
                path.unlink(missing_ok=True)
            for path in sorted(aside.iterdir(), key=lambda path: path.name == last):
                path.replace(folder / path.name)
    except OSError as error:
        if inside:
            raise
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def _occupied(folder: Path) -> Iterator[None]:
    """Share a lock on the folder with other calls that write there; whoever has it alone removes what is left over.

    The kernel frees it when the process ends, however that happens. Where there are no locks, all is left.
    """
    import fcntl  # Windows, where models can be loaded and saved, has none

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in list(folder.iterdir()):
                if _ASIDE.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)
