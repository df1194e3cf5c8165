"""One trainer per run folder: two that write the same records and checkpoints would corrupt both."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.records import LOCK

# Of file systems without locks, some network and parallel ones: there the folder is not guarded.
UNGUARDED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def sole_trainer(folder: Path, world: World) -> Iterator[None]:
    """Hold a run folder while training. Collective: rank 0 holds it, and all ranks fail together.

    The kernel frees it when the process ends, however that happens; worker processes do not inherit it. A folder that
    was made for it is removed again if nothing was written.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    held = refusal = None
    if world.is_main:
        try:
            held = _hold(folder)
        except UserError as error:
            refusal = str(error)
    refusal = world.share(refusal)
    if refusal is not None:
        raise UserError(refusal)
    try:
        yield
    finally:
        if held is not None:
            file, made = held
            with suppress(OSError):
                os.ftruncate(file, 0)  # for who watches the run: nobody trains in it any more
                if os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                    for empty in made:
                        empty.rmdir()
            os.close(file)


def _hold(folder: Path) -> tuple[int, list[Path]]:
    """The open, locked file, and the folders that were made for it, innermost first."""
    path = folder / LOCK
    try:
        made = [new for new in (folder, *folder.parents) if not new.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    try:
        # Not flock: forked workers would share it and hold it for seconds after a trainer that was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNGUARDED:
            return file, made
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{folder} is in use by a trainer, {holder or 'another process'}: wait for its end or stop it "
                f"(Ctrl-C saves), or choose another name (--set name=…)"
            ) from None
        raise UserError(f"cannot lock {path}: {error.strerror or error}") from None
    with suppress(OSError):  # a full disk: it is held all the same
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    return file, made
