"""Long work on numbered images (or molecules): dealt to all ranks, kept piece by piece, resumed after a kill.

A piece is one batch, images first … stop − 1. What it yields (features, distances, …) goes into a file of its own under
a folder named after everything that determines it, so that pieces of different settings never meet and a finished one
is never made again, whatever the number of ranks then and now. Ranks share nothing but that folder.

Processes that need the same pieces, such as held-out images under several guidances, share a lock on their folder;
whoever has it alone deletes them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from unite_fast.engine.batch import is_out_of_memory
from unite_fast.engine.world import SETTLED, World
from unite_fast.errors import UserError
from unite_fast.weights import read_tensors, write_tensors

Make = Callable[[int, int], dict[str, Tensor]]  # first, stop -> tensors whose first dimension counts the images
SECONDS_BETWEEN_LINES = 15.0  # of progress where there is no terminal
LOCK = ".lock"  # in a folder of pieces
ABANDONED_DAYS = 30  # since the last piece: more than a failed evaluation waits for being started again


class Work:
    """Pieces of one evaluation.

    Args:
        folder: where pieces are kept; every rank must see the same one.
        world: the ranks that share the work.
        shown: tell progress on stderr (rank 0 alone does).
        unit: what is numbered, in the plural.
        sole: refuse what another process is making, but for pieces that evaluations have in common. Not for a run that
            measures itself: it must not end because somebody evaluates it.
    """

    def __init__(
        self, folder: Path, world: World, *, shown: bool = True, unit: str = "images", sole: bool = False
    ):
        self.folder, self.world, self._shown = folder, world, shown and world.is_main
        self.patience, self.unit, self._sole = Patience(unit), unit, sole
        self._held: dict[Path, int] = {}  # on rank 0: folders of pieces, and their open lock files

    def gather(
        self,
        what: str,
        key: dict[str, Any],
        count: int,
        batch: int,
        make: Make,
        *,
        kept: Callable[[int, int], bool] = lambda first, stop: True,
        common: bool = False,
    ) -> dict[str, Tensor] | None:
        """What `make` yields of images 0 … count − 1, in order. Collective.

        Args:
            what: for people.
            key: all that determines the result beside the numbers of the images; JSON.
            count: images in all.
            batch: images of one piece. Memory that runs out halves what is made at a time, never the pieces.
            make: called on each rank for its pieces; may leave images out.
            kept: a further condition for a piece to count as finished.
            common: evaluations of other settings need the same pieces, and may make them at the same time.

        Returns:
            On rank 0 tensors joined over the images, elsewhere None.

        Raises:
            UserError: memory ends at one image, a full disk, ranks that do not share the folder, work that another
                process is at, or a damaged piece.
        """
        folder = self.folder / digest(key)
        refusal = self._hold(folder, alone=self._sole and not common) if self.world.is_main else None
        spans = [(first, min(first + batch, count)) for first in range(0, count, batch)]
        missing = [span for span in spans if not (_piece(folder, span).is_file() and kept(*span))]
        refusal, missing = self.world.share((refusal, missing))
        if refusal is not None:
            raise UserError(refusal)
        size, rank = self.world.size, self.world.rank
        finished = count - sum(stop - first for first, stop in missing)
        with progress(what, count, finished, shown=self._shown, unit=self.unit) as advance:
            for first, stop in missing[rank::size]:
                write_tensors(self.patience.make(make, first, stop), _piece(folder, (first, stop)))
                advance((stop - first) * size)
        self.world.barrier()
        if not self.world.is_main:
            return None
        if absent := self._absent(paths := [_piece(folder, span) for span in spans]):
            raise UserError(
                f"{absent} of {len(spans)} pieces did not appear in {folder}: ranks on other machines must see "
                f"the same folder"
            )
        pieces = [self._read(path) for path in paths]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            return read_tensors(path)
        except UserError as error:
            raise UserError(f"{error}; delete it, and the same command makes its {self.unit} again") from None

    def _absent(self, paths: Sequence[Path]) -> int:
        """How many of these files rank 0 does not see, once a network folder had time to show those of other nodes."""
        for _ in range(SETTLED):
            absent = sum(not path.is_file() for path in paths)
            if not absent or self.world.size == 1:
                break
            time.sleep(1)
        return absent

    def _hold(self, folder: Path, *, alone: bool) -> str | None:
        """Keep others from deleting the folder; what to tell the user where it is to be held alone and is not."""
        if folder not in self._held:
            try:
                held = _share(folder, alone=alone)
            except OSError as error:
                return f"cannot write {folder}: {error.strerror or error}"
            if held is None:
                return (
                    f"another process is making the same {self.unit} in {folder}: wait for its end, or stop it and "
                    f"go on with what it has finished"
                )
            self._held[folder] = held
        return None

    def discard(self) -> None:
        """Delete the pieces gathered here: the result is on record. For rank 0.

        Those that another evaluation of the same run needs as well stay for it, and those of others unless no process
        has gone on with them for ABANDONED_DAYS.
        """
        for folder, held in self._held.items():
            _delete(folder, held)
        self._held.clear()
        with contextlib.suppress(OSError):  # nothing was gathered, or another evaluation deletes, too
            for folder in list(self.folder.iterdir()):
                if time.time() - folder.stat().st_mtime > ABANDONED_DAYS * 24 * 3600:
                    _delete(folder, os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644))
        with contextlib.suppress(OSError):  # not empty, or nothing was gathered
            self.folder.rmdir()


class Patience:
    """Makes images in parts as small as memory asks for.

    Attributes:
        limit: images at a time after memory ran out, None before.
    """

    def __init__(self, unit: str = "images") -> None:
        self.limit: int | None = None
        self._unit = unit

    def make(self, make: Make, first: int, stop: int) -> dict[str, Tensor]:
        """What `make` yields of images first … stop − 1, joined.

        Raises:
            UserError: memory ends at one image.
        """
        parts = []
        while first < stop:
            size = min(stop - first, self.limit or stop - first)
            try:
                part = make(first, first + size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                part = None  # handled outside, where the failed call's tensors are no longer referenced
            if part is None:
                if size == 1:
                    raise UserError(
                        f"out of memory even on {self._unit} one at a time: use a larger device or a CPU"
                    )
                self.limit = size // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                Console(stderr=True).print(f"warning: out of memory at {size} {self._unit}, going on with {self.limit}")
                continue
            parts.append(part)
            first += size
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def progress(
    what: str, count: int, finished: int, *, shown: bool, unit: str = "images"
) -> Iterator[Callable[[int], None]]:
    """Progress on stderr: a bar on a terminal, a line every so often elsewhere, with rate and time left.

    Yields:
        A function that is told how many more images all ranks have done, by one rank's own count.
    """
    console = Console(stderr=True)
    if not shown or finished >= count:
        yield lambda images: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=count, completed=finished, rate="")
            began = time.monotonic()

            def advance(images: int) -> None:
                bar.advance(task, images)
                # The bar knows a speed from its second piece on.
                mean = (bar.tasks[0].completed - finished) / (time.monotonic() - began)
                bar.update(task, rate=f"{bar.tasks[0].speed or mean:.1f} {unit}/s")

            yield advance
    else:
        began = printed = time.monotonic()
        done = 0

        def say(images: int) -> None:
            nonlocal printed, done
            done = min(done + images, count - finished)
            now = time.monotonic()
            if now - printed >= SECONDS_BETWEEN_LINES:
                printed, rate = now, done / (now - began)
                left = round((count - finished - done) / rate)
                text = f"{what}: {finished + done}/{count}  {rate:.1f} {unit}/s  left "
                text += f"{left // 60}:{left % 60:02}"
                console.print(text, highlight=False)

        yield say


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _piece(folder: Path, span: tuple[int, int]) -> Path:
    return folder / f"{span[0]:08d}-{span[1]:08d}.safetensors"


def _share(folder: Path, *, alone: bool) -> int | None:
    """The folder's open lock file, under a lock that other processes may share; the folder is made if missing.

    The kernel frees it when the process ends, however that happens. Where there are no locks, nothing is guarded.

    Args:
        alone: give None where another process has the lock at this moment.
    """
    import fcntl  # Windows, where models can be loaded and saved, has none

    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # deleted by another process meanwhile
            continue
        if alone and _is_shared(file):
            os.close(file)
            return None
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_SH)  # waits while another process deletes
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _is_shared(file: int) -> bool:
    """Whether another process has the lock; if none has, it is this one's alone."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def _delete(folder: Path, file: int) -> None:
    """Delete a folder of pieces unless another process has its lock, and close the lock file."""
    alone = not _is_shared(file)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    if alone:
        with contextlib.suppress(OSError):  # a folder that cannot be moved cannot be deleted either
            # All at once: behind a new lock file another process would count on pieces that are about to go.
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    os.close(file)
    if alone:
        with contextlib.suppress(OSError):  # network folders keep a file's name while it is open
            aside.rmdir()
