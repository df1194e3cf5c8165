"""Image trees for the data tests, where a picture's pixels say which picture it is; permissions and processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
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


def photographs(root: Path) -> Path:
    """Six JPEG pictures of different sizes in three classes."""
    for number in range(6):
        folder = root / f"c{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(40 + 9 * number, 90 - 7 * number, number).save(folder / f"{number}.JPEG", quality=90)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between opening and reading
        return False


def wait_until(condition, seconds: int = 60) -> bool:
    """Whether it becomes true; a minute is for a busy machine, not a requirement."""
    for _ in range(10 * seconds):
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def unprivileged():
    """A world-readable folder, and permissions that count even where the tests run as root."""
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    root.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield root
    os.seteuid(user)
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o755)
    shutil.rmtree(root)
