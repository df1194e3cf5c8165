"""The stream of training micro-batches, read ahead by worker processes in an order that does not depend on them."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from unite_fast.config import DataConfig
from unite_fast.data.processes import leave_with_parent
from unite_fast.data.reader import BadFiles, FileReader, MemoryReader, Piece, Problem, read_piece
from unite_fast.data.sampler import Draw, Sampler
from unite_fast.data.source import open_source, samples_of
from unite_fast.errors import UserError

SHARED_MEMORY = "/dev/shm"


class MicroBatch(NamedTuple):
    """Images of one rank and backward."""

    images: Tensor  # [b, 3, H, H] uint8, RGB
    labels: Tensor  # [b] int64
    indices: Tensor  # [b] int64, which images of the folder these are, substitutes included
    step: int  # optimizer step, counted from 0
    micro_batch: int  # 0 … accumulation-1 within the step


class FolderStream(ABC):
    """What the loaders share: endless iterators over `MicroBatch`, from a given optimizer step on.

    The images depend on (seed, global batch, step, micro-batch, rank, world size) alone.

    Attributes:
        classes: class names; the position of a name is its label.
        steps_per_epoch: optimizer steps in one pass over the data, a fraction in general.
        mode: what the pixels depend on, for the record.
    """

    mode: dict[str, str]

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        num_classes: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        accumulation: int,
        rank: int = 0,
        world_size: int = 1,
        local_size: int = 1,
        start_step: int = 0,
    ):
        """Scan the folder, or read the index of the shards.

        Args:
            config: where the images are and how they are read.
            image_size: side H of the square images.
            num_classes: how many class folders there must be.
            seed: of order, flips and substitutes.
            global_batch: images an optimizer step over all ranks, micro_batch · accumulation · world_size.
            micro_batch: images b of one rank and backward.
            accumulation: micro-batches an optimizer step.
            rank: of this process, below world_size.
            world_size: processes that share the global batch.
            local_size: those of them that share this machine's memory, each with as much of it.
            start_step: first optimizer step to read.

        Raises:
            UserError: as `open_source`.
            ValueError: as `Sampler`.
        """
        folder = open_source(config.path, num_classes, image_size=image_size, remark=rank == 0)
        self.classes: tuple[str, ...] = folder.classes
        self.steps_per_epoch: float = len(folder) / global_batch
        self._folder, self._config, self._seed, self._start_step = folder, config, seed, start_step
        self._local_size = local_size
        self._files = FileReader(folder, image_size, config.crop)
        self._bad = BadFiles(folder, config.max_bad_share)
        self._sampler = Sampler(len(folder), seed, global_batch, micro_batch, accumulation, rank, world_size)
        self._closed = False

    @property
    def bad_files(self) -> dict[str, str]:
        """Path and reason of every file that this rank skipped so far; those of the skip list are in `left_out`."""
        return dict(self._bad.reasons)

    @property
    def left_out(self) -> dict[str, str]:
        """Name and reason of every image that the skip list keeps out of this run."""
        return dict(self._folder.skipped)

    def samples(self) -> dict[str, int | str]:
        """See `samples_of`."""
        return samples_of(self._folder)

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def __next__(self) -> MicroBatch:
        """The next micro-batch; raises a UserError for what stops the run."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything that reads ahead; calling it again does nothing."""

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError(f"this {type(self).__name__} is closed")

    def _accept(self, piece: Piece) -> MicroBatch:
        """Take note of what could not be read.

        Raises:
            UserError: too many unusable images, or what stops the run.
        """
        self._bad.add(len(piece.indices), piece.problems)
        if piece.fatal:
            raise UserError(piece.fatal)
        return MicroBatch(piece.images, piece.labels, piece.indices, piece.step, piece.micro_batch)


class ImageStream(FolderStream):
    """The stream of worker processes.

    They start with the first `next`, for which the main module needs its `if __name__ == "__main__":`; `data.cache`
    decodes everything at construction instead and needs none.
    """

    def __init__(self, config: DataConfig, **numbers: Any):
        """As `FolderStream`.

        Raises:
            UserError: also too little shared memory for what workers keep ready; with `data.cache` too many unusable
                images, a wrong size under crop "none", too little memory.
        """
        super().__init__(config, **numbers)
        self.mode = {
            "loader": "workers", "decode": "exact", "crop": config.crop, "decoded_on": "cpu", "pillow": PIL.__version__
        }  # fmt: skip
        reader: FileReader | MemoryReader = self._files
        if config.cache:
            reader = MemoryReader(reader, config.workers, copies=self._local_size)
            self._bad.add(len(self._folder) - len(reader.problems), reader.problems.values())
        workers = 0 if config.cache else config.workers
        if workers:
            ready = workers * config.prefetch * self._sampler.micro_batch * self._local_size
            _require_shared_memory(ready * 3 * reader.image_size**2)
        self._dataset = _Pieces(reader, seed=self._seed, flip=config.flip, workers=workers)
        self._loader = DataLoader(
            self._dataset,
            batch_sampler=_Draws(self._sampler, self._start_step),
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            worker_init_fn=_start_worker if workers else None,
            multiprocessing_context=_context() if workers else None,
            pin_memory=torch.cuda.is_available(),
            # DataLoader draws a seed when it starts; from the global generator that would shift the model's numbers.
            generator=torch.Generator().manual_seed(self._seed),
        )
        self._pieces: Iterator[Piece] | None = None
        _open_streams.add(self)

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises:
            UserError: too many unusable images, a wrong size under crop "none", a worker process that died.
        """
        self._require_open()
        piece: Piece | None = None
        try:
            if self._pieces is None:
                self._pieces = iter(self._loader)
            piece = next(self._pieces)
        except RuntimeError:
            dead = self._dataset.dead_workers()
            if not dead:
                self.close()
                raise
        if piece is None:  # outside the handler: the exception's frames would keep the other workers alive
            self.close()
            raise UserError(
                f"a data worker died ({'; '.join(dead)}). If the machine ran out of memory or of shared memory "
                f"({SHARED_MEMORY}), lower data.workers or data.prefetch; if it is one file each time, remove the file"
            )
        try:
            return self._accept(piece)
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers; calling it again does nothing."""
        self._closed = True
        self._pieces = None  # the last reference: DataLoader's iterator joins its workers as it goes
        _open_streams.discard(self)


def load_images(
    path: str | Path,
    config: DataConfig,
    *,
    image_size: int,
    num_classes: int,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """A fixed set of images, unflipped: the first of every class, then the second of every class, and so on.

    Args:
        path: class-folder tree or prepared shards.
        config: its `crop`, `workers` (here threads) and `max_bad_share`.
        image_size: side H.
        num_classes: how many class folders there must be.
        limit: how many images; None reads all.
        classes: the names that the class folders must have, so that labels mean what they meant in training.

    Returns:
        images [N, 3, H, H] uint8 and labels [N] int64, N ≤ limit. Unusable files are left out and logged.

    Raises:
        UserError: as `open_source`; no or too many unusable images; a wrong size under crop "none".
    """
    folder = open_source(path, num_classes, image_size=image_size, expected=classes)
    reader, bad = FileReader(folder, image_size, config.crop), BadFiles(folder, config.max_bad_share)
    starts = np.searchsorted(folder.labels, folder.labels)  # where the class of each image begins
    order = np.argsort(np.arange(len(folder)) - starts, kind="stable").tolist()
    limit = len(order) if limit is None else min(limit, len(order))
    images: list[Tensor] = []
    labels: list[int] = []
    threads = max(1, config.workers)
    remaining = iter(order)
    with ThreadPoolExecutor(threads) as pool:
        while len(images) < limit:
            # A bounded chunk, because map() would read the whole folder where a few images are wanted.
            chunk = list(itertools.islice(remaining, min(limit - len(images), 16 * threads)))
            if not chunk:
                break
            for index, found in zip(chunk, pool.map(reader.pixels, chunk)):
                if isinstance(found, Problem):
                    bad.add(0, [found])
                else:
                    bad.add(1, [])
                    images.append(torch.from_numpy(found.transpose(2, 0, 1).copy()))
                    labels.append(int(folder.labels[index]))
    if not images:
        path_, reason = next(iter(bad.reasons.items()))
        raise UserError(f"no readable image in {folder.root}: {path_} ({reason})")
    return torch.stack(images), torch.tensor(labels)


class _Draws:
    """What workers are to read, in order; DataLoader hands each element to one worker."""

    def __init__(self, sampler: Sampler, start_step: int):
        self._sampler, self._start_step = sampler, start_step

    def __iter__(self) -> Iterator[Draw]:
        return self._sampler.draws(self._start_step)


class _Pieces(Dataset[Piece]):
    """The map from a draw to its pixels, as DataLoader runs it in a worker or in the training process."""

    def __init__(self, reader: FileReader | MemoryReader, *, seed: int, flip: bool, workers: int):
        self.reader = reader
        self._seed, self._flip = seed, flip
        # Shared with the workers: process id and the file in hand, so that a killed worker's last words are known.
        self._workers = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()

    def __getitems__(self, draw: Draw) -> Piece:
        worker = get_worker_info()
        if worker is None:
            return read_piece(self.reader, draw, seed=self._seed, flip=self._flip)
        mine = self._workers.numpy()[worker.id]

        def holding(index: int) -> None:
            mine[1] = index

        piece = read_piece(self.reader, draw, seed=self._seed, flip=self._flip, holding=holding)
        mine[1] = -1
        return piece

    def started(self, worker: int) -> None:
        """Called in a worker: leave its process id."""
        self._workers[worker, 0] = os.getpid()

    def dead_workers(self) -> list[str]:
        """Called in the training process: what is known of every worker that is gone."""
        return [
            f"process {pid}, " + (f"reading {self.reader.folder.path(index)}" if index >= 0 else "between two batches")
            for pid, index in self._workers.tolist()
            if pid >= 0 and not _alive(pid)
        ]


def _as_is(piece: Piece) -> Piece:
    return piece


def _start_worker(worker: int) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole process group. The training process decides what
    # they mean; it could not finish its step and save if its workers left first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # torch's watchdog looks at the parent process, which here is the fork server, and that lives as long as a worker.
    leave_with_parent()
    info = get_worker_info()
    assert info is not None
    info.dataset.started(worker)


def _context() -> multiprocessing.context.BaseContext:
    # Forking the training process would copy its threads' locks and its CUDA state; the fork server has neither and
    # still imports torch, and what crops, only once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, "unite_fast.data.resample"])
    return context


def _require_shared_memory(need: int) -> None:
    if not os.path.isdir(SHARED_MEMORY):
        return
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise UserError(
            f"data workers keep {need / 2**20:.0f} MiB of images ready (data.workers × data.prefetch × micro-batch × "
            f"processes of this machine) but {SHARED_MEMORY} has {free / 2**20:.0f} MiB free: lower data.workers or "
            f"data.prefetch, or give the container more shared memory (docker run --shm-size)"
        )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Workers ignore SIGTERM, with which multiprocessing ends its children at exit, so streams are closed before that:
# exit handlers run last in, first out, and multiprocessing and torch registered theirs when imported above.
_open_streams: weakref.WeakSet[ImageStream] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    for stream in list(_open_streams):
        stream.close()
