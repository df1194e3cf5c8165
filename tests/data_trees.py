"""Image trees for the data tests: a picture's pixels say which picture it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth coloured picture with some noise, different for every seed."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / generator.uniform(3, 40) + columns / generator.uniform(3, 40)) for _ in range(3)]
    values = 128 + 90 * np.stack(waves, -1) + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def tree(root: Path, per_class: tuple[int, ...] = (5, 4, 6), size: int = 8) -> Path:
    """Class folders c0, c1, …; image i, counted over all classes, is a ramp in channel 0 and i in channel 1."""
    number = 0
    for label, count in enumerate(per_class):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for place in range(count):
            values = np.zeros((size, size, 3), np.uint8)
            values[..., 0] = np.arange(size)
            values[..., 1] = number % 256
            Image.fromarray(values).save(folder / f"{place:03d}.png")
            number += 1
    return root
