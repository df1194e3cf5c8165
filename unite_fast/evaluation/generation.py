"""Numbered images: what is drawn or encoded depends on the seed and the image's number, not on batch or rank.

Shapes: n images, K registers, D latent channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.flow import sampling
from unite_fast.model.unite import Unite
from unite_fast.pictures import save_png
from unite_fast.weights import write_text
from unite_kernels import philox_normal, philox_uniform

STAMP = ".evaluation"  # in a folder of pictures: which evaluation they belong to
PICTURE = re.compile(r"\d{6,}_class\d{4,}\.png")
SAMPLE_STREAM, TOKENIZE_STREAM = 0, 1  # of the counter-based generator; 2 is analysis.activations'
LABEL_STREAM = 3


def draw(model: Unite, labels: Tensor, settings: dict[str, Any], *, seed: int, first: int) -> Tensor:
    """Images number `first` … of a seed.

    Args:
        model: on the device to use.
        labels: [n] class of each image.
        settings: options of `generate`.
        seed: of the noise; image i's noise depends on (seed, i) alone.

    Returns:
        [n, 3, H, H] in [0, 1] on the model's device.
    """
    noise = register_noise(model, len(labels), seed=seed, stream=SAMPLE_STREAM, first=first)
    return sampling.generate(model, labels, noise=noise, **settings)


def encode(model: Unite, pixels: Tensor, *, seed: int, first: int) -> Tensor:
    """Latents of images number `first` … of a call.

    The register noise of image i depends on (seed, i) alone, and the tokenization time is `model.tokenize_time`, so
    that an image gives the same latents again whatever the batch size.

    Args:
        model: on the device to use.
        pixels: [n, 3, H, H] uint8.

    Returns:
        z0 [n, K, D] float32 on the model's device.
    """
    noise = register_noise(model, len(pixels), seed=seed, stream=TOKENIZE_STREAM, first=first)
    t = torch.full((len(pixels),), model.tokenize_time, device=noise.device)
    with torch.no_grad():
        return model.tokenize(pixels.to(noise.device).float() / 255, noise=noise, t=t)


def register_noise(model: Unite, count: int, *, seed: int, stream: int, first: int) -> Tensor:
    """Normal numbers [count, K, D]: those of image number first + i depend on (seed, first + i) alone."""
    shape = (model.config.registers, model.config.latent_dim)
    device = model.device
    return philox_normal(shape, seed, 0, stream, draws=count, first_draw=first, device=device)


def labels_of(
    first: int, stop: int, num_classes: int, *, sampling: Literal["balanced", "random"], seed: int
) -> Tensor:
    """Classes of images number first … stop − 1: [stop − first] int64.

    Args:
        sampling: balanced makes image i one of class i mod num_classes, so that a multiple of it is exactly balanced;
            random draws each class with equal probability.
        seed: of that draw, in which the class of image i depends on (seed, i) alone.
    """
    if sampling == "balanced":
        return torch.arange(first, stop) % num_classes
    # On the CPU wherever the model is: rank 0 counts the classes and names the pictures before any is drawn. In
    # float64 the product of a number below 1 stays below num_classes.
    uniform = philox_uniform((), seed, 0, LABEL_STREAM, draws=stop - first, first_draw=first, device="cpu")
    return (uniform.double() * num_classes).long()


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, rounded to the nearest level: the pixels that a PNG would hold."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


class Pictures:
    """A folder that holds the generated images of one evaluation, and no others, as PNG files.

    Args:
        folder: made if missing.
        labels: first, stop -> classes [stop − first] of images number first … stop − 1.
    """

    def __init__(self, folder: Path, labels: Callable[[int, int], Tensor]):
        self.folder, self._labels = folder, labels

    def paths(self, first: int, stop: int) -> list[Path]:
        """Of images number first … stop − 1."""
        labels = self._labels(first, stop).tolist()
        return [self.folder / f"{index:06d}_class{label:04d}.png" for index, label in enumerate(labels, start=first)]

    def begin(self, evaluation: str) -> None:
        """Delete the pictures of another evaluation; those of this one, begun before, stay. For one rank.

        Args:
            evaluation: one line that tells it from all others.

        Raises:
            UserError: a folder that cannot be written.
        """
        try:
            stamp = self.folder / STAMP
            if stamp.is_file() and stamp.read_text() == evaluation:
                return
            for path in self.folder.iterdir() if self.folder.is_dir() else ():
                if PICTURE.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise UserError(f"cannot write images into {self.folder}: {error.strerror or error}") from None
        write_text(evaluation, stamp)

    def save(self, pixels: Tensor, first: int) -> None:
        """Write images number `first` …, [n, 3, H, W] uint8.

        Raises:
            UserError: a path that cannot be written.
        """
        for image, path in zip(pixels.cpu(), self.paths(first, first + len(pixels)), strict=True):
            save_png(image, path)

    def hold(self, first: int, stop: int) -> bool:
        """Whether images first … stop − 1 are there."""
        return all(path.is_file() for path in self.paths(first, stop))
