"""scikit-learn's 1,797 handwritten digits as class-folder image trees: `python -m unite_fast.data.digits FOLDER`.

The images are real (UCI "Optical Recognition of Handwritten Digits", Alpaydin and Kaynak 1998), come with
scikit-learn, and need no network. A fixed fifth of every class is held out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from unite_fast.data.sampler import permutation
from unite_fast.errors import UserError

COUNT = 1797
SIZE = 32  # pixels a side, from 8
SPLIT_SEED = 0


def write_digits(destination: str | Path) -> Path:
    """Write FOLDER/train/<digit>/*.png and FOLDER/val/<digit>/*.png, 32×32 greyscale.

    The 8×8 values 0 … 16 are scaled to 0 … 255 and enlarged with Pillow's bicubic filter. Files are named after the
    position in scikit-learn's set. A complete tree is left as it is; a new one appears whole or not at all.

    Args:
        destination: folder to make; its parents are made too.

    Returns:
        The folder.

    Raises:
        UserError: scikit-learn is missing, the folder holds something else, or cannot be written.
    """
    destination = Path(destination)
    if _complete(destination):
        return destination
    try:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise UserError(
                f"{destination} exists and is not a complete digits tree: remove it or choose another folder"
            )
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        try:
            _write(temporary)
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            _publish(temporary, destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the digits to {destination}: {error.strerror or error}") from None
    return destination


def _write(root: Path) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn") from None
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        shuffled = members[permutation(len(members), SPLIT_SEED, label)]
        held_out = round(len(members) / 5)
        for split, part in (("val", shuffled[:held_out]), ("train", shuffled[held_out:])):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in part:
                image = Image.fromarray(images[index]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                image.save(folder / f"{index:04d}.png")


def _publish(temporary: Path, destination: Path) -> None:
    try:
        os.rename(temporary, destination)
    except OSError:
        if not _complete(destination):  # else another process was first, with the same files
            raise


def _complete(root: Path) -> bool:
    names = {path.name for split in ("train", "val") for path in root.glob(f"{split}/[0-9]/*.png")}
    return names == {f"{index:04d}.png" for index in range(COUNT)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m unite_fast.data.digits", description="Write the digits tree.")
    parser.add_argument("folder", help="output folder; train/ and val/ are created in it")
    try:
        folder = write_digits(parser.parse_args(arguments).folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{COUNT} digits in {folder}/train and {folder}/val")
    return 0


if __name__ == "__main__":
    sys.exit(main())
