"""Which loader a run gets, and the thread that keeps its micro-batches ready on the device."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from typing import Any, Protocol, Self

import torch

from unite_fast.config import DataConfig
from unite_fast.data.dali import INSTALL, DaliStream, dali_version
from unite_fast.data.loader import ImageStream, MicroBatch
from unite_fast.errors import UserError

# Micro-batches on the device beside the one in use; a second one bridges a slow moment of the loader.
READY = 2


class Stream(Protocol):
    """Endless micro-batches of a run.

    Attributes:
        classes: class names; the position of a name is its label.
        steps_per_epoch: optimizer steps in one pass over the data, a fraction in general.
        mode: what the pixels depend on, for the record.
    """

    classes: tuple[str, ...]
    steps_per_epoch: float
    mode: dict[str, str]

    @property
    def bad_files(self) -> dict[str, str]:
        """Path and reason of every file that this rank skipped so far."""

    @property
    def left_out(self) -> dict[str, str]:
        """Name and reason of every image that the skip list keeps out of this run."""

    def samples(self) -> dict[str, int | str]:
        """See `unite_fast.data.source.samples_of`."""

    def __next__(self) -> MicroBatch: ...

    def close(self) -> None:
        """Stop everything that reads ahead; calling it again does nothing."""


def open_stream(config: DataConfig, *, device: torch.device, **numbers: Any) -> Stream:
    """The stream that `data.loader` asks for.

    Args:
        config: where the images are and how they are read.
        device: where they shall lie: on a CPU workers leave them in memory, all others put them there ahead of time.
        numbers: the other arguments of `FolderStream`.

    Raises:
        UserError: as `ImageStream` and `DaliStream`; decode "fast" without DALI.
    """
    loader = config.loader
    if loader == "auto":
        wanted = not config.cache and (device.type == "cuda" or config.decode == "fast")
        loader = "dali" if wanted and dali_version() else "workers"
        if loader == "workers" and config.decode == "fast":
            raise UserError(f"data.decode fast needs NVIDIA DALI, which is not installed: {INSTALL}, or choose exact")
    if loader == "dali":
        return Ahead(DaliStream(config, device=device, **numbers), device)
    stream = ImageStream(config, **numbers)
    return Ahead(stream, device) if device.type == "cuda" else stream


class Ahead:
    """A stream worked by a thread of its own, with `READY` micro-batches waiting on the device.

    On CUDA the thread has a CUDA stream of its own, so that copies and crops run beside the training step; `next`
    makes the caller's stream, not the host, wait for them.
    """

    def __init__(self, stream: Stream, device: torch.device):
        self._stream, self._device = stream, device
        self.classes, self.steps_per_epoch, self.mode = stream.classes, stream.steps_per_epoch, stream.mode
        self._ready: queue.Queue[tuple[MicroBatch, torch.cuda.Event | None] | BaseException] = queue.Queue(READY)
        self._thread: threading.Thread | None = None
        self._closed = False
        _open.add(self)

    @property
    def bad_files(self) -> dict[str, str]:
        """Path and reason of every file that this rank skipped so far."""
        return self._stream.bad_files

    @property
    def left_out(self) -> dict[str, str]:
        """Name and reason of every image that the skip list keeps out of this run."""
        return self._stream.left_out

    def samples(self) -> dict[str, int | str]:
        """See `unite_fast.data.source.samples_of`."""
        return self._stream.samples()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch; raises what the stream raises."""
        if self._closed:
            raise ValueError("this stream is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="data ahead", daemon=True)
            self._thread.start()
        found = self._ready.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        batch, copied = found
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            # Their memory belongs to the thread's stream, which must not reuse it before this one is done with it.
            batch.images.record_stream(current)
            batch.labels.record_stream(current)
        return batch

    def close(self) -> None:
        """Stop the thread and the stream; calling it again does nothing."""
        self._closed = True
        if self._thread is not None and self._thread is not threading.current_thread():
            with contextlib.suppress(queue.Empty):
                while True:  # room for the one micro-batch that the thread may be about to hand over
                    self._ready.get_nowait()
            self._thread.join()
        self._stream.close()
        _open.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            cuda = self._device.type == "cuda"
            with contextlib.ExitStack() as stack:
                if cuda:
                    stack.enter_context(torch.cuda.device(self._device))
                    stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self._device)))
                while not self._closed:
                    batch = next(self._stream)
                    copied = None
                    if cuda:
                        batch = batch._replace(
                            images=batch.images.to(self._device, non_blocking=True),
                            labels=batch.labels.to(self._device, non_blocking=True),
                        )
                        copied = torch.cuda.Event()
                        copied.record()
                    self._ready.put((batch, copied))
        except BaseException as error:
            self._ready.put(error)


# As in loader.py, and registered after it: a thread must not be inside a stream that closes.
_open: weakref.WeakSet[Ahead] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_open):
        stream.close()
