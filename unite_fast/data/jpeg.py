"""Which files are JPEG of the kind that every decoder reads alike."""

from __future__ import annotations

import io
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unite_fast.data.crop import require_croppable
from unite_fast.data.reader import FileReader, Problem
from unite_fast.data.source import reason_of

# The next marker in coded pixels: not a stuffed byte, a restart or a fill byte. 20 µs for 65 kB.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
# Huffman and quantisation tables, restart interval, comments and applications' data.
BETWEEN_SCANS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})


class Jpeg(NamedTuple):
    """A file for DALI to decode."""

    data: NDArray[np.uint8]
    height: int
    width: int


class JpegReader:
    """Reads files, keeps plain JPEG for DALI and decodes everything else.

    Attributes:
        refused: indices of JPEG files that only Pillow shall decode.
    """

    def __init__(self, files: FileReader):
        self.files, self.folder, self.image_size = files, files.folder, files.image_size
        self.refused: set[int] = set()

    def pixels(self, index: int) -> Jpeg | NDArray[np.uint8] | Problem:
        """A JPEG, [H, H, 3] uint8 pixels, or why there is neither; raises as `FileReader.pixels`."""
        if index not in self.refused:
            try:
                data = self.folder.read(index)
            except Exception as error:  # as FileReader: one file must cost no more than itself
                return Problem(index, reason_of(error))
            size = self._plain(data)
            if size is not None:
                return Jpeg(np.frombuffer(data, np.uint8), *size)
        return self.files.pixels(index)

    def _plain(self, data: bytes) -> tuple[int, int] | None:
        """(height, width) of a JPEG whose pixels mean the same to all decoders, else None."""
        try:
            if not ends_well(data):
                return None
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                width, height = image.size
                # Adobe's transform 0 stores RGB. Without either mark, decoders guess from the components' names.
                marked = "jfif" in image.info or image.info.get("adobe_transform") == 1
                plain = image.mode == "L" or (image.mode == "RGB" and marked)
            if self.files.crop == "adm":
                require_croppable(height, width, self.image_size)
                return (height, width) if plain else None
        except Exception:  # whatever it is, Pillow says it in FileReader
            return None
        return (height, width) if plain and width == height == self.image_size else None


def ends_well(data: bytes) -> bool:
    """Whether a JPEG's scans are followed by what may follow them, and the last one by the end of the image.

    libjpeg complains of anything else after it has made pixels, which Pillow heeds and DALI does not. What stands
    inside the segments is for Pillow to judge.
    """
    position, in_scan = 2, False
    while True:
        if in_scan:
            found = MARKER.search(data, position)
            if found is None:
                return False
            position = found.start()
        if position + 2 > len(data) or data[position] != 0xFF:
            return False
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == END_OF_IMAGE:
            return in_scan
        if in_scan and marker not in BETWEEN_SCANS and marker != START_OF_SCAN:
            return False
        in_scan = in_scan or marker == START_OF_SCAN
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
