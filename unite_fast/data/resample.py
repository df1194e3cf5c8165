"""ADM's centre crop of an array on a CPU core, bit for bit Pillow's, in fewer operations than Pillow's.

`unite_kernels.resample` says what the passes are and runs them on a GPU. Here each pass is the product of a sparse
matrix of integers with the image's lines: SciPy adds whole lines at a time, which compilers vectorise, and only what
the crop keeps is resampled. On one core a 500×375 photograph takes about half the time of Pillow's functions (measured
by `pytest benchmarks/test_input.py`).
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import PIL
from numpy.typing import NDArray
from scipy.sparse import csr_array

from unite_kernels.resample import HALF, PRECISION, CropPlan, crop_plan

# Pillow's order of passes since pull request 9549; results follow the Pillow that is installed, see crop.py.
TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
# Numbers of a strip: 1 MiB of int32. Four times as many or as few took a tenth longer on a core with 1 MiB of L2.
STRIP = 2**18


def plan_of(height: int, width: int, side: int) -> CropPlan:
    """The passes that the installed Pillow would make."""
    return crop_plan(height, width, side, tall_first=TALL_FIRST)


def resample_crop(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """ADM's centre crop, see `unite_kernels.centre_crop`.

    Args:
        image: [h, w, 3].
        side: S.

    Returns:
        [S, S, 3], in the memory order that is cheapest.
    """
    height, width = image.shape[:2]
    rows, columns, matrices = _matrices(height, width, side)
    # Lines along the axis that is resampled come first: [h, w, 3] -> [w, 3, h] or [h, 3, w].
    lines, down = image[rows, columns].transpose(0, 2, 1), True
    for vertical, matrix in matrices:
        if vertical != down:
            lines, down = lines.transpose(2, 1, 0), vertical
        lines = _product(matrix, lines)
    return lines.transpose(0, 2, 1) if down else lines.transpose(2, 0, 1)


def _product(matrix: csr_array, lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, m] · [m, c, b] in rounded fixed point: [n, c, b] uint8, in strips of b that a core's cache holds."""
    height, channels, breadth = lines.shape
    results = np.empty((matrix.shape[0], channels, breadth), np.uint8)
    step = max(1, STRIP // (height * channels))
    for start in range(0, breadth, step):
        strip = lines[:, :, start : start + step]
        wide = _workspace(strip.size).reshape(strip.shape)
        np.copyto(wide, strip)
        sums = matrix @ wide.reshape(height, -1)
        sums += HALF
        sums >>= PRECISION
        np.clip(sums, 0, 255, out=sums)
        results[:, :, start : start + step] = sums.reshape(len(results), channels, -1)
    return results


_local = threading.local()


def _workspace(size: int) -> NDArray[np.int32]:
    """Memory of this thread, overwritten by the next call: fresh pages cost as much as the arithmetic."""
    kept = getattr(_local, "memory", None)
    if kept is None or len(kept) < size:
        kept = _local.memory = np.empty(size, np.int32)
    return kept[:size]


@functools.lru_cache(maxsize=1024)
def _matrices(height: int, width: int, side: int) -> tuple[slice, slice, list[tuple[bool, csr_array]]]:
    plan = plan_of(height, width, side)
    sizes = {True: plan.rows[1] - plan.rows[0], False: plan.columns[1] - plan.columns[0]}
    matrices = []
    for vertical, first, weights in plan.passes:
        n, taps = weights.shape
        columns = (first[:, None].numpy() + np.arange(taps, dtype=np.int32)).ravel()
        starts = np.arange(0, n * taps + 1, taps, dtype=np.int32)
        matrices.append((vertical, csr_array((weights.numpy().ravel(), columns, starts), (n, sizes[vertical]))))
        sizes[vertical] = n
    return slice(*plan.rows), slice(*plan.columns), matrices
