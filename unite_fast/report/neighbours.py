"""Nearest training images of generated ones: has the model learned the data, or by heart?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.config import Config
from unite_fast.data.reader import FileReader
from unite_fast.data.source import open_source
from unite_fast.errors import UserError
from unite_fast.evaluation.reconstruction import unit_images

# Pixels are compared after averaging to this side: a shift of a pixel or a grain of noise should not hide a copy.
SIDE = 32
NEAREST = 3
# ImageNet's largest class has 1,300 images; reading one costs about 5 ms.
MOST_PER_CLASS = 1500
# A sample is called a near copy if it lies closer to a training image than 99 % of held-out images do.
NEAR_COPY_QUANTILE = 0.01


@dataclass
class Match:
    """A generated image and its nearest training images, all [.., H, H, 3] uint8.

    Attributes:
        distances: RMS pixel differences in [0, 1] of the nearest, rising.
        share: of held-out images of the compared classes that lie closer to a training image, None without any.
    """

    name: str
    sample: np.ndarray
    nearest: np.ndarray
    distances: list[float]
    share: float | None


@dataclass
class Neighbours:
    """Matches with what they were searched in.

    Attributes:
        searched: training images read; classes: of how many classes.
        whole: whether all training images of those classes were searched.
        held_out: held-out images that give the scale; median: of their distances, None without any.
        near_copies: matches closer than 99 % of held-out images, None without any.
        mirrored: whether mirror images counted too, as training flips.
    """

    matches: list[Match]
    searched: int
    classes: int
    whole: bool
    held_out: int
    median: float | None
    near_copies: int | None
    mirrored: bool
    side: int


def find_neighbours(
    samples: dict[int, Tensor],
    classes: Sequence[str] | None,
    config: Config,
    held_out: tuple[Tensor, Tensor] | None,
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
) -> Neighbours:
    """Search each sample's own class, in pixels.

    Args:
        samples: label -> images [n, 3, H, H] in [0, 1].
        classes: the names that class folders must have; None where the run left no record of them.
        config: of the run, for its training data.
        held_out: images [M, 3, H, H] uint8 and labels [M], whose distances give the scale.

    Raises:
        UserError: the training images cannot be read, or are of other classes.
    """
    size = config.model.image_size
    folder = open_source(config.data.path, config.model.num_classes, image_size=size, expected=classes)
    reader = FileReader(folder, size, config.data.crop)
    own = {label: np.flatnonzero(folder.labels == label) for label in samples}
    draw = np.random.default_rng(0)
    searched = {
        label: np.sort(draw.choice(indices, min(len(indices), MOST_PER_CLASS), replace=False))
        for label, indices in own.items()
    }
    found: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    scale: list[float] = []
    count = 0
    with progress("reading training images", sum(map(len, searched.values()))) as advance:
        for label, indices in searched.items():
            pixels = []
            for index in indices:
                image = reader.pixels(int(index))
                if isinstance(image, np.ndarray):
                    pixels.append(image)
                advance(1)
            if not pixels:
                raise UserError(f"no training image of class {folder.classes[label]} can be read")
            count += len(pixels)
            train = np.stack(pixels)
            # One class at a time: 1,300 images of 256×256 are 256 MB.
            features = _features(torch.from_numpy(train.transpose(0, 3, 1, 2).copy()))
            mirrored = features.flip(-1) if config.data.flip else None
            for sample in samples[label]:
                distances = _distances(_features(sample[None]), features, mirrored)[0]
                order = np.argsort(distances, kind="stable")[:NEAREST]
                shown = sample.mul(255).round().byte().permute(1, 2, 0).numpy()
                found.append((label, shown, train[order], distances[order]))
            if held_out is not None and bool((held_out[1] == label).any()):
                real = _features(held_out[0][held_out[1] == label])
                scale += _distances(real, features, mirrored).min(1).tolist()
    ranks = np.sort(scale)
    matches = [
        Match(
            folder.classes[label], sample, nearest, distances.tolist(),
            float((ranks < distances[0]).mean()) if len(ranks) else None,
        )
        for label, sample, nearest, distances in found
    ]  # fmt: skip
    limit = np.quantile(ranks, NEAR_COPY_QUANTILE) if len(ranks) else None
    return Neighbours(
        matches=matches,
        searched=count,
        classes=len(samples),
        whole=all(len(indices) <= MOST_PER_CLASS for indices in own.values()),
        held_out=len(ranks),
        median=float(np.median(ranks)) if len(ranks) else None,
        near_copies=None if limit is None else sum(match.distances[0] < float(limit) for match in matches),
        mirrored=config.data.flip,
        side=min(SIDE, size),
    )


def _features(images: Tensor) -> Tensor:
    """[N, 3, s, s] float32, averaged to a side of at most SIDE."""
    pixels = unit_images(images)
    return pixels if pixels.shape[-1] <= SIDE else F.interpolate(pixels, size=(SIDE, SIDE), mode="area")


def _distances(images: Tensor, train: Tensor, mirrored: Tensor | None) -> np.ndarray:
    """[n, N] RMS differences, the smaller of the two where mirror images count."""
    flat = images.flatten(1)
    result = torch.cdist(flat, train.flatten(1))
    if mirrored is not None:
        result = torch.minimum(result, torch.cdist(flat, mirrored.flatten(1)))
    return (result / flat.shape[1] ** 0.5).numpy()
