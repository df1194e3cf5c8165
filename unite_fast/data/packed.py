"""Images that lie inside larger files, read at random by offset."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.crop import MAX_FILE_BYTES
from unite_fast.data.folder import Names

# Half of the usual limit of 1,024 open files; containers beyond that are opened for every read.
MAX_OPEN = 512


class PackedImages:
    """Images at known offsets of container files.

    A container is opened at the first read from it and stays open. Descriptors belong to the process that opened them:
    a pickled copy starts without any. Reads name their offset, so threads and forked processes may share them.

    Attributes: see `unite_fast.data.source.ImageSource`.
    """

    prepared_size: int | None = None

    def __init__(
        self,
        root: Path,
        classes: tuple[str, ...],
        labels: NDArray[np.int64],
        names: Names,
        containers: tuple[str, ...],
        container: NDArray[np.int32],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ):
        """Take a table of n images, ordered by class and then by name.

        Args:
            root: the folder or file that the user named.
            classes: class names; the position of a name is its label.
            labels: [n].
            names: [n] class/file.
            containers: paths of the files that hold images.
            container: [n] index into containers.
            offsets: [n] first byte inside the container.
            sizes: [n] bytes.
        """
        self.root, self.classes, self.labels = root, classes, labels
        self.skipped: dict[str, str] = {}
        self._names, self._containers = names, containers
        self._container, self._offsets, self._sizes = container, offsets, sizes
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Path of one image inside the data set it came from."""
        return self._names[index]

    def path(self, index: int) -> str:
        """Where one image lies: container and name."""
        return f"{self._containers[self._container[index]]}:{self.name(index)}"

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Raises:
            OSError: the container has gone or cannot be read.
            ValueError: the container ends early, or the image is larger than any that `crop.decode` accepts.
        """
        size = int(self._sizes[index])
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes, more than the {MAX_FILE_BYTES} accepted")
        data = self._read(int(self._container[index]), int(self._offsets[index]), size)
        if len(data) < size:
            raise ValueError(
                f"{Path(self._containers[self._container[index]]).name} is cut short: "
                f"{len(data)} of this image's {size} bytes are left"
            )
        return data

    def _read(self, container: int, offset: int, size: int) -> bytes:
        descriptor = self._descriptors.get(container)
        if descriptor is not None:
            return _read_at(descriptor, offset, size)
        descriptor = os.open(self._containers[container], os.O_RDONLY)
        # Another thread may have opened it meanwhile; setdefault is atomic, and one descriptor of two is kept.
        keep = len(self._descriptors) < MAX_OPEN and self._descriptors.setdefault(container, descriptor) == descriptor
        try:
            return _read_at(descriptor, offset, size)
        finally:
            if not keep:
                os.close(descriptor)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:  # a signal or a network file system may deliver less at a time
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
