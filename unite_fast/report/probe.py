"""What a report computes with the trained model: sheets, a denoising trajectory, neighbours, latent statistics.

Each part stands on its own: one whose data is gone leaves a note in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unite_fast.analysis.trajectories import trajectory
from unite_fast.config import Config
from unite_fast.data.loader import load_images
from unite_fast.engine.meter import latent_statistics
from unite_fast.errors import UserError
from unite_fast.evaluation.generation import draw, encode
from unite_fast.evaluation.reconstruction import psnr, unit_images
from unite_fast.importing import Trained
from unite_fast.model.unite import Unite
from unite_fast.pictures import spread
from unite_fast.report.neighbours import Neighbours, find_neighbours

TRAJECTORY_CLASSES = 6
NEIGHBOUR_CLASSES, NEIGHBOUR_SAMPLES = 6, 2
SHOWN_RECONSTRUCTIONS = 24
# From −4 to 4, within which LayerNorm keeps nearly all latents, or where they reach further, this share of them.
HISTOGRAM_RANGE, HISTOGRAM_SHARE, HISTOGRAM_BINS = 4.0, 0.999, 64

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Options:
    """How much the model is asked to do.

    Attributes:
        columns: samples a class.
        held_out: held-out images that latent statistics are measured on.
        seed: of all noise.
        batch: images a forward pass.
    """

    columns: int
    held_out: int = 256
    seed: int = 0
    batch: int = 64


@dataclass
class Row:
    """Images of one class, [n, H, H, 3] uint8."""

    name: str
    images: np.ndarray


@dataclass
class Latents:
    """Latents z0 of held-out images over images and registers.

    Attributes:
        count: images.
        mean, std: [D] per channel.
        deviation: standard deviation across images, averaged over registers and channels.
        rank: effective rank, 1 … D.
        spectrum: [D] eigenvalues of the channel covariance as shares, falling.
        histogram: [bins] density of all values over −range … range; reference: the same of N(0, 1).
    """

    count: int
    mean: np.ndarray
    std: np.ndarray
    deviation: float
    rank: float
    spectrum: np.ndarray
    histogram: np.ndarray
    reference: np.ndarray
    range: float


@dataclass
class Probe:
    """Everything that was computed; a missing part has a sentence in `notes` under its name."""

    origin: str
    step: int | None
    sampling: dict[str, Any]
    samples: list[Row] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    trajectory: list[Row] = field(default_factory=list)
    originals: np.ndarray | None = None
    reconstructions: np.ndarray | None = None
    psnr: list[float] = field(default_factory=list)
    neighbours: Neighbours | None = None
    latents: Latents | None = None
    notes: dict[str, str] = field(default_factory=dict)


def silent(_what: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that nobody watches."""
    return nullcontext(lambda _done: None)


@torch.no_grad()
def probe(trained: Trained, model: Unite, config: Config, options: Options, progress: Progress = silent) -> Probe:
    """Run the model for every part of the report.

    Args:
        trained: what is known about the weights.
        model: the same weights on the device to use, in evaluation mode.
        config: of the run, for its data.
        progress: (what, total) -> context that yields a function to call with the images done since the last call.
    """
    settings = trained.sampling.model_dump() | {"time_shift": trained.time_shift}
    result = Probe(trained.origin, trained.made_by.get("step"), settings)
    names = trained.class_names or [str(label) for label in range(trained.config.num_classes)]
    classes = spread(len(names), config.evaluation.sheet_classes)
    labels = torch.tensor(classes).repeat_interleave(options.columns)
    with progress("samples", len(labels)) as advance:
        samples = _draw(model, labels, settings, options, advance)
    by_class = samples.split(options.columns)
    result.samples = [Row(names[label], _pixels(images)) for label, images in zip(classes, by_class, strict=True)]
    chosen = [classes[k] for k in spread(len(classes), TRAJECTORY_CLASSES)]
    with progress("trajectory", len(chosen)) as advance:
        found = trajectory(model, torch.tensor(chosen), settings, options.seed)
        advance(len(chosen))
    result.times, by_label = found.times, found.images.unbind(1)
    result.trajectory = [Row(names[label], _pixels(row)) for label, row in zip(chosen, by_label, strict=True)]
    held_out = _held_out(config, trained, options.held_out, result.notes)
    if held_out is not None:
        with progress("reconstructions and latents", len(held_out[0])) as advance:
            _tokenize(model, held_out[0], options, result, advance)
    compared = [position for position in spread(len(classes), NEIGHBOUR_CLASSES)]
    with _explained(result.notes, "neighbours"):
        result.neighbours = find_neighbours(
            {classes[k]: by_class[k][:NEIGHBOUR_SAMPLES] for k in compared}, trained.class_names, config, held_out,
            progress,
        )  # fmt: skip
    return result


def _draw(
    model: Unite, labels: Tensor, settings: dict[str, Any], options: Options, advance: Callable[[int], None]
) -> Tensor:
    """One image a label [N, 3, H, H] in [0, 1] on the CPU; image i's noise depends on (seed, i) alone."""
    pieces = []
    for first in range(0, len(labels), options.batch):
        piece = labels[first : first + options.batch]
        pieces.append(draw(model, piece, settings, seed=options.seed, first=first).cpu())
        advance(len(piece))
    return torch.cat(pieces)


def _held_out(
    config: Config, trained: Trained, count: int, notes: dict[str, str]
) -> tuple[Tensor, Tensor] | None:
    """(images uint8, labels), or None with a note where no held-out images can be read."""
    if config.data.val_path is None:
        missing = "The configuration names no held-out images (data.val_path)."
    else:
        try:
            return load_images(
                config.data.val_path, config.data, image_size=trained.config.image_size,
                num_classes=trained.config.num_classes, limit=count, classes=trained.class_names,
            )  # fmt: skip
        except UserError as error:
            missing = f"The held-out images cannot be read: {error}."
    notes["reconstructions"] = notes["latents"] = missing
    return None


def _tokenize(
    model: Unite, images: Tensor, options: Options, result: Probe, advance: Callable[[int], None]
) -> None:
    """Latents of the images, their statistics, and reconstructions of some."""
    device = model.device
    shown = torch.tensor(spread(len(images), SHOWN_RECONSTRUCTIONS))
    pieces, decoded = [], []
    for first in range(0, len(images), options.batch):
        piece = images[first : first + options.batch]
        z0 = encode(model, piece, seed=options.seed, first=first)
        inside = shown[(shown >= first) & (shown < first + len(piece))] - first
        if len(inside):
            decoded.append(model.decode(z0[inside.to(device)]).clamp(0, 1).cpu())
        pieces.append(z0.cpu())
        advance(len(piece))
    originals, reconstructions = images[shown], torch.cat(decoded)
    result.originals, result.reconstructions = _pixels(originals), _pixels(reconstructions)
    result.psnr = psnr(originals, reconstructions).tolist()
    if len(images) < 2:
        result.notes["latents"] = "Statistics need at least two held-out images."
        return
    result.latents = _statistics(torch.cat(pieces))


def _statistics(z0: Tensor) -> Latents:
    """Statistics of latents [B, K, D]."""
    deviation, rank = latent_statistics(z0).tolist()
    flat = (z0 - z0.mean(0, keepdim=True)).flatten(0, 1).double()
    eigenvalues = torch.linalg.eigvalsh(flat.T @ flat).clamp_min(0).flip(0)
    reach = max(HISTOGRAM_RANGE, float(np.quantile(z0.abs().numpy(), HISTOGRAM_SHARE)))
    edges = np.linspace(-reach, reach, HISTOGRAM_BINS + 1)
    density = np.histogram(z0.numpy(), bins=edges)[0] / z0.numel() / np.diff(edges)
    centres = (edges[1:] + edges[:-1]) / 2
    return Latents(
        count=len(z0),
        mean=z0.mean((0, 1)).numpy(),
        std=z0.std((0, 1)).numpy(),
        deviation=deviation,
        rank=rank,
        spectrum=(eigenvalues / eigenvalues.sum().clamp_min(1e-12)).numpy(),
        histogram=density,
        reference=np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi),
        range=reach,
    )




def _pixels(images: Tensor) -> np.ndarray:
    """[N, 3, H, H] -> [N, H, H, 3] uint8."""
    return unit_images(images).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def _explained(notes: dict[str, str], part: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        notes[part] = f"{error}."
