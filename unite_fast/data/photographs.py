"""Real photographs as JPEG files in class folders: `python -m unite_fast.data.photographs FOLDER --count 256`.

The two that scikit-learn ships (a temple, a flower; 640×427, public licence), cut, scaled and mirrored differently for
every file, at the sizes and quality that ImageNet's usually have. For tests and benchmarks of the input: such files
take a decoder as long as the real ones, and need no network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from unite_fast.data.sampler import counter_hash
from unite_fast.errors import UserError

# (width, height), by how often each stands here.
SIZES = ((500, 375),) * 5 + ((500, 333), (375, 500), (400, 300))
QUALITY = 90
_PHOTOGRAPH = 4  # first word of the hash, apart from the sampler's own


def write_photographs(folder: str | Path, count: int) -> Path:
    """Write FOLDER/china/*.jpg and FOLDER/flower/*.jpg, `count` files in total, the same ones every time.

    Returns:
        The folder.

    Raises:
        UserError: scikit-learn is missing, or the folder cannot be written.
    """
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise UserError(
            "the photographs come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    folder = Path(folder)
    originals = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    try:
        for number in range(count):
            name = sorted(originals)[number % 2]
            path = folder / name / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            _version(originals[name], number).save(path, quality=QUALITY)
    except OSError as error:
        raise UserError(f"cannot write photographs to {folder}: {error.strerror or error}") from None
    return folder


def _version(original: Image.Image, number: int) -> Image.Image:
    """A cut of the photograph, which no other number has."""
    width, height = SIZES[number % len(SIZES)]
    if width < height:
        original = original.transpose(Image.Transpose.ROTATE_90)
    draws = [int(counter_hash(_PHOTOGRAPH, number, word)[0] % 2**20) / 2**20 for word in range(4)]
    room = min(original.width / width, original.height / height)  # above 1: nothing is enlarged
    scale = 1 + draws[0] * (room - 1)
    left, top = draws[1] * (original.width - scale * width), draws[2] * (original.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    cut = original.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[3] < 0.5 else cut


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m unite_fast.data.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="output folder; china/ and flower/ are created in it")
    parser.add_argument("--count", type=int, default=256, help="total number of files")
    options = parser.parse_args(arguments)
    try:
        write_photographs(options.folder, options.count)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.count} photographs in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
