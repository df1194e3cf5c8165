"""Micro-batches of pixels: reads what a draw asks for, and puts a readable image where a broken one stood."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unite_fast.data.crop import WrongSizeError, decode
from unite_fast.data.folder import AllImages
from unite_fast.data.sampler import Draw, flips, substitute
from unite_fast.data.source import ImageSource, reason_of, warn_once
from unite_fast.errors import UserError

# At half of the files unreadable, 100 misses in a row have probability 1e-30: past that the folder is at fault.
MAX_ATTEMPTS = 100

Pixels = NDArray[np.uint8]  # [H, H, 3]


class Problem(NamedTuple):
    """A file that cannot be used, and why."""

    index: int
    reason: str


class Reader(Protocol):
    """Makes pixels, or something that becomes pixels, of an image by its number."""

    folder: ImageSource
    image_size: int

    def pixels(self, index: int) -> Any | Problem:
        """What was read, or why nothing was.

        Raises:
            WrongSizeError: crop "none" and an image of another size.
        """


class Piece(NamedTuple):
    """A micro-batch as a worker process hands it over; mistakes travel as data, because exceptions lose their type."""

    step: int
    micro_batch: int
    images: Tensor  # [b, 3, H, H] uint8
    labels: Tensor  # [b] int64
    indices: Tensor  # [b] int64, after substitution
    problems: list[Problem]
    fatal: str | None  # what stops the run


class FileReader:
    """Pixels straight from the files."""

    def __init__(self, folder: ImageSource | AllImages, image_size: int, crop: Literal["adm", "none"]):
        self.folder, self.image_size, self.crop = folder, image_size, crop

    def pixels(self, index: int) -> Pixels | Problem:
        """[H, H, 3] uint8 of an image, or why there is none.

        Raises:
            WrongSizeError: crop "none" and an image of another size; the message begins with its path.
        """
        try:
            return decode(self.folder.read(index), self.image_size, self.crop)
        except WrongSizeError as error:
            raise WrongSizeError(f"{self.folder.path(index)} {error}") from None
        except Exception as error:
            # A hostile file can make a decoder raise anything, and it must cost no more than itself.
            return Problem(index, reason_of(error))


class MemoryReader:
    """Pixels of every image decoded once and kept: 3·H² bytes an image.

    Attributes:
        problems: the files that could not be used, by index.
    """

    def __init__(self, files: FileReader, threads: int, *, copies: int = 1):
        """Decode everything.

        Args:
            files: reads an image.
            threads: that decode.
            copies: processes of this machine that keep all images, each for itself.

        Raises:
            UserError: the decoded images exceed this machine's memory.
            WrongSizeError: as `FileReader.pixels`.
        """
        self.folder, self.image_size = files.folder, files.image_size
        need = copies * len(self.folder) * 3 * self.image_size**2
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > memory:
            raise UserError(
                f"data.cache needs {need / 2**30:.1f} GiB for the {len(self.folder)} images of {self.folder.root}"
                + (f" in each of {copies} processes" if copies > 1 else "")
                + f", this machine has {memory / 2**30:.1f} GiB: set data.cache to false"
            )
        self._images = np.empty((len(self.folder), self.image_size, self.image_size, 3), np.uint8)
        self.problems: dict[int, Problem] = {}
        with ThreadPoolExecutor(max(1, threads)) as pool:  # Pillow's decoders and filters release the GIL
            for index, found in enumerate(pool.map(files.pixels, range(len(self.folder)))):
                if isinstance(found, Problem):
                    self.problems[index] = found
                else:
                    self._images[index] = found

    def pixels(self, index: int) -> Pixels | Problem:
        """[H, H, 3] uint8 of an image, or why there is none."""
        return self.problems.get(index) or self._images[index]


class Served(NamedTuple):
    """What stands at one place of a micro-batch."""

    index: int  # of the image, after substitution
    found: Any  # what the reader made of it; None where nothing could be read
    problems: list[Problem]
    fatal: str | None  # what stops the run


def serve(
    reader: Reader, seed: int, epoch: int, wanted: int, holding: Callable[[int], None] = lambda index: None
) -> Served:
    """Read the image that a place asks for, or the first usable one of those that `substitute` puts there.

    Args:
        reader: where pixels come from.
        seed, epoch, wanted: what substitutes depend on, beside the attempt.
        holding: told the index of every file before it is opened.
    """
    index, problems = wanted, []
    try:
        for attempt in range(MAX_ATTEMPTS + 1):
            holding(index)
            found = reader.pixels(index)
            if not isinstance(found, Problem):
                return Served(index, found, problems, None)
            problems.append(found)
            if attempt < MAX_ATTEMPTS:
                index = substitute(len(reader.folder), seed, epoch, wanted, attempt)
    except WrongSizeError as error:
        return Served(index, None, problems, str(error))
    example = f"{reader.folder.path(index)} ({problems[-1].reason})"
    fatal = f"no readable image among {len(problems)} tries in {reader.folder.root}: {example}"
    return Served(index, None, problems, fatal)


def read_piece(
    reader: Reader,
    draw: Draw,
    *,
    seed: int,
    flip: bool,
    holding: Callable[[int], None] = lambda index: None,
) -> Piece:
    """Read a micro-batch.

    An unreadable image is replaced by `substitute`, which depends on nothing but (seed, epoch, index, attempt); label
    and flip are those of the image that is served.

    Args:
        reader: where pixels come from.
        draw: epochs and indices, each [b].
        seed: of flips and substitutes.
        flip: mirror half of the images.
        holding: told the index of every file before it is opened.
    """
    size = reader.image_size
    images = np.empty((len(draw.indices), 3, size, size), np.uint8)
    places: list[Served] = []
    for epoch, wanted in zip(draw.epochs.tolist(), draw.indices.tolist()):
        place = serve(reader, seed, epoch, wanted, holding)
        places.append(place)
        if place.fatal:
            break
        rows = place.found
        if flip and flips(seed, epoch, place.index)[0]:
            rows = rows[:, ::-1]
        images[len(places) - 1] = rows.transpose(2, 0, 1)
    return piece_of(draw, places, torch.from_numpy(images), reader.folder.labels)


def piece_of(draw: Draw, places: list[Served], images: Tensor, labels: NDArray[np.int64]) -> Piece:
    """A micro-batch of what was served, up to the first place that stops the run.

    Args:
        draw: what was asked for.
        places: in order.
        images: [b, 3, H, H].
        labels: of every image of the data set.
    """
    indices = draw.indices.copy()
    indices[: len(places)] = [place.index for place in places]
    fatal = next((number for number, place in enumerate(places) if place.fatal), None)
    reached = places if fatal is None else places[: fatal + 1]
    return Piece(
        draw.step, draw.micro_batch, images, torch.from_numpy(labels[indices]), torch.from_numpy(indices),
        [problem for place in reached for problem in place.problems], None if fatal is None else places[fatal].fatal,
    )  # fmt: skip


class BadFiles:
    """Counts the distinct files that could not be used, names each in the log, and stops a run with too many."""

    def __init__(self, folder: ImageSource, max_share: float):
        self._folder, self._max_share = folder, max_share
        self._seen = 0
        self.reasons: dict[str, str] = {}  # path -> reason

    def add(self, served: int, problems: Iterable[Problem]) -> None:
        """Take note of a micro-batch.

        Args:
            served: images that were read.
            problems: files that were not.

        Raises:
            UserError: the bad files exceed `max_share` of the data set, or of what was read so far by more than chance
                explains: five standard deviations of a Poisson count, and never fewer than six files.
        """
        total = len(self._folder)
        self._seen += served
        for problem in problems:
            self._seen += 1
            path = self._folder.path(problem.index)
            if path not in self.reasons:
                self.reasons[path] = problem.reason
                warn_once(f"skipped unusable image {path}: {problem.reason}")
        self._seen = min(self._seen, total)
        bad = len(self.reasons)
        expected = self._max_share * self._seen
        if bad > self._max_share * total or bad > expected + 5 * math.sqrt(expected) + 5:
            some = "; ".join(f"{path} ({reason})" for path, reason in list(self.reasons.items())[:5])
            raise UserError(
                f"{bad} unusable image{'s' * (bad > 1)} among the first {self._seen} read of {total} in "
                f"{self._folder.root}, more than data.max_bad_share {self._max_share:g} allows: "
                f"{some}{'; …' if bad > 5 else ''}. `unite-fast data check {self._folder.root}` finds them all, and "
                f"runs then leave them out; or repair them, or raise data.max_bad_share"
            )
