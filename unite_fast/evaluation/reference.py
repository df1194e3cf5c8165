"""Mean and covariance of a data set's features as a file: `mu` and `sigma` in an `.npz`, the common form.

A file written here also says how it was made: number of images, crop, image size, weights of the extractor. Files from
elsewhere hold `mu` and `sigma` alone and are taken at their word.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unite_fast.data.reader import FileReader
from unite_fast.data.source import open_images
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.evaluation.held_out import read_images
from unite_fast.evaluation.inception import FEATURES, Inception
from unite_fast.evaluation.work import Patience, progress
from unite_fast.weights import file_hash, write_arrays


class Moments:
    """Running mean and covariance in float64 (Chan, Golub and LeVeque 1983): no cancellation, any order of pieces."""

    def __init__(self, features: int = FEATURES):
        self.count = 0
        self.mean = np.zeros(features)
        self.scatter = np.zeros((features, features))  # Σ (x − mean)(x − mean)ᵀ

    def add(self, features: np.ndarray) -> None:
        """Take rows [n, k] in."""
        rows = np.asarray(features, dtype=np.float64)
        if len(rows):
            piece = Moments(len(self.mean))
            piece.count, piece.mean = len(rows), rows.mean(0)
            centred = rows - piece.mean
            piece.scatter = centred.T @ centred
            self.merge(piece)

    def merge(self, other: Moments) -> None:
        """Take the rows of another in."""
        total = self.count + other.count
        if not other.count:
            return
        offset = other.mean - self.mean
        self.scatter += other.scatter + np.outer(offset, offset) * (self.count * other.count / total)
        self.mean += offset * (other.count / total)
        self.count = total

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean [k], unbiased covariance [k, k]).

        Raises:
            UserError: fewer than two rows.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}: give more images")
        return self.mean, self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Attributes:
        mu, sigma: [k] and [k, k] float64.
        about: file name, sha256, and where the file says so count, crop, image_size and inception (its sha256).
    """

    mu: np.ndarray
    sigma: np.ndarray
    about: dict[str, Any]


def write_reference(moments: Moments, path: Path, about: dict[str, Any]) -> None:
    """Write `mu`, `sigma`, `count` and what made them.

    Raises:
        UserError: fewer than two images, a name that does not end in .npz, an unwritable path.
    """
    if path.suffix != ".npz":
        raise UserError(f"--out {path}: the name must end in .npz")
    mu, sigma = moments.statistics()
    extra = {name: np.asarray(value) for name, value in about.items()}
    write_arrays({"mu": mu, "sigma": sigma, "count": np.asarray(moments.count), **extra}, path)


def absent_reference(path: str | Path | None) -> str | None:
    """What to do about statistics that are not given or not there; None where they are."""
    if path is None:
        return "gfid needs reference statistics: give --reference FILE.npz (evaluation.reference)"
    if Path(path).is_file():
        return None
    return (
        f"no reference statistics at {path}: `unite-fast reference IMAGES --out {path}` makes them from a folder "
        f"(--reference, or evaluation.reference, names the file)"
    )


def read_reference(path: str | Path, *, image_size: int, inception: str, features: int = FEATURES) -> Reference:
    """Read a file of `mu` and `sigma`.

    Args:
        image_size: side of the images that will be compared with it.
        inception: sha256 of the extractor's weights.
        features: k.

    Raises:
        UserError: missing, truncated, other arrays, another number of features, values that are not finite, a sigma
            that is no covariance, or statistics recorded for another image size or other extractor weights.
    """
    path = Path(path)
    if absent := absent_reference(path):
        raise UserError(absent)
    try:
        with path.open("rb") as file:
            if file.read(4) not in (b"PK\x03\x04", b"\x93NUM", b""):
                raise ValueError("its first bytes are those of another format")  # numpy would advise to unpickle it
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is one bare array, a .npy")
        with loaded as file:
            found = {name: file[name] for name in ("mu", "sigma", "count", "crop", "image_size", "inception")
                     if name in file.files}  # fmt: skip
            names = file.files
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise UserError(f"{path} is truncated or not an .npz of plain arrays: {str(error) or 'it is empty'}") from None
    if "mu" not in found or "sigma" not in found:
        raise UserError(f"{path} must hold mu and sigma, it holds {', '.join(names) or 'nothing'}")
    mu, sigma = found["mu"], found["sigma"]
    if mu.shape != (features,) or sigma.shape != (features, features):
        raise UserError(
            f"{path} is of another extractor: mu is {list(mu.shape)} and sigma {list(sigma.shape)}, the features here "
            f"need [{features}] and [{features}, {features}]"
        )
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds NaN or infinite values: make it again")
    slack = 1e-3 * np.abs(sigma).max()  # far above the rounding of float16
    if np.abs(sigma - sigma.T).max() > slack or sigma.diagonal().min() < -slack:
        raise UserError(f"{path}: sigma is not a covariance: it is not symmetric or has negative variances")
    about = {"file": path.name, "sha256": file_hash(path)}
    about |= {
        name: found[name].item() for name in ("count", "crop", "image_size", "inception")
        if name in found and found[name].size == 1
    }  # fmt: skip
    if about.get("image_size", image_size) != image_size:
        raise UserError(
            f"{path} was made from images of {about['image_size']}×{about['image_size']} pixels, the model makes "
            f"{image_size}×{image_size}: `unite-fast reference IMAGES --size {image_size}` makes the right one"
        )
    if about.get("inception", inception) != inception:
        raise UserError(
            f"{path} was made with other Inception weights (sha256 {about['inception'][:8]}…, here "
            f"{inception[:8]}…): use the same file for both"
        )
    return Reference(np.asarray(mu, np.float64), np.asarray(sigma, np.float64), about)


def folder_statistics(
    folder: Path, inception: Path | None, *, image_size: int, crop: Literal["adm", "none"], batch: int, world: World
) -> tuple[Moments, dict[str, Any]]:
    """Statistics of every readable image below a folder, all ranks sharing the work. Collective.

    Returns:
        (moments over all ranks, what made them: crop, image_size, inception, skipped).

    Raises:
        UserError: no images, wrong weights, a wrong size under crop "none", memory that ends at one image.
    """
    network = Inception.open(inception).to(world.device)
    images = open_images(folder, image_size=image_size, remark=world.is_main)
    reader = FileReader(images, image_size, crop)
    total = len(reader.folder)
    mine, skipped = Moments(), 0

    def features(first: int, stop: int) -> dict[str, Tensor]:
        pixels, readable = read_images(reader, range(first, stop))
        chosen = pixels[readable]
        return {"features": network(chosen.to(world.device))[0].cpu() if len(chosen) else torch.empty(0, FEATURES)}

    patient = Patience()
    spans = [(first, min(first + batch, total)) for first in range(0, total, batch)]
    with progress("reading", total, 0, shown=world.is_main) as advance:
        for first, stop in spans[world.rank :: world.size]:
            rows = patient.make(features, first, stop)["features"]
            mine.add(rows.numpy())
            skipped += stop - first - len(rows)
            advance((stop - first) * world.size)
    merged = Moments()
    parts = world.collect((mine, skipped))
    for moments, _ in parts:
        merged.merge(moments)
    missed = sum(count for _, count in parts)
    about = {"crop": crop, "image_size": image_size, "inception": network.sha256, "skipped": missed}
    return merged, about
