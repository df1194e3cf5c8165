"""Pictures as data URIs, small enough that a page of hundreds stays one that can be mailed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from unite_fast.data.crop import MAX_PIXELS

# Up to this side PNG is smaller than JPEG, and exact: single pixels of small images are seen.
EXACT_SIDE = 64
SIDES = (256, 192, 144, 112, 80)
JPEG_QUALITY = 86
BUDGET = 2_700_000  # bytes of all tiles; base64 adds a third, sheets and curves about 0.7 MB: under 5 MB in all


def encode(image: np.ndarray | Image.Image, side: int, *, exact: bool) -> str:
    """Data URI of an image [H, W, 3] uint8, scaled down to at most `side` pixels wide."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if picture.width > side:
        size = (side, max(1, round(picture.height * side / picture.width)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if exact:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Tiles:
    """Encodes all tiles of a page at the largest size that fits the budget.

    Args:
        images: every image that will be asked for, [H, W, 3] uint8 of one size.
    """

    def __init__(self, images: Iterable[np.ndarray]):
        self.images = list(images)
        self.exact = not self.images or self.images[0].shape[1] <= EXACT_SIDE
        self.side = SIDES[0]
        if not self.exact:
            # A sample of the tiles tells their mean size; encoding all at every size would take seconds.
            probe = self.images[:: max(1, len(self.images) // 12)]
            for self.side in SIDES:
                mean = sum(len(encode(image, self.side, exact=False)) for image in probe) / len(probe) * 3 / 4
                if mean * len(self.images) <= BUDGET:
                    break

    def __call__(self, image: np.ndarray) -> str:
        """Data URI of one image."""
        return encode(image, self.side, exact=self.exact)


def sheet(path: Path, width: int) -> str | None:
    """Data URI of a sheet on disk, None where there is none that can be read."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            return encode(image.convert("RGB"), width, exact=False)
    except (OSError, ValueError, SyntaxError):
        return None
