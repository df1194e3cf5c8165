"""The paper's analyses of a trained image model, every number with what made it (UNITE, arXiv 2603.22283).

Shapes: n images, K registers, D latent channels, L blocks, T times.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.analysis.activations import Images, Tokenized, denoise, noised, tokenize
from unite_fast.analysis.entropy import BINS, TensorEntropy, weight_entropies
from unite_fast.analysis.probing import PENALTIES, linear_probe
from unite_fast.analysis.similarity import NEIGHBOURS, alignment, cka_kernel, cknna_kernel
from unite_fast.analysis.trajectories import Trajectory, trajectory
from unite_fast.importing import Trained
from unite_fast.model.unite import Unite
from unite_fast.pictures import spread

TRAJECTORY_ROWS = 8
DEFINITIONS = {
    "compared": "of block l the mean of its register tokens, one vector per image, residual stream behind the closing "
    "norm; tokenization and denoising both without a label",
    "cka": "linear CKA by image, unbiased HSIC: 1 equal up to rotation, shift and factor, about 0 independent",
    "cknna": f"CKNNA of unit-length features, k = {NEIGHBOURS}: 1 equal neighbourhoods, about k/(n − 1) independent",
    "cosine": "mean over images and registers of the cosine of ẑ0 or z_t with z0, over the latent channels",
    "mean_latent": "the same of z0's mean over the images in place of ẑ0: what is reached without reading z_t",
    "bits": f"entropy of a tensor's histogram, {BINS} equal bins from its smallest to its largest value",
    "probing": "ridge classifier in closed form on standardised features, leave-one-out choice of the penalty; latents "
    "as K·D numbers, blocks by their mean register token in tokenization, pixels averaged to at most 16×16",
}

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Options:
    """How the model is run.

    Attributes:
        times: at which latents are noised, 0 (noise) … 1 (clean), rising.
        seed: of all noise.
        batch: images a forward pass.
    """

    times: tuple[float, ...]
    seed: int
    batch: int


@dataclass
class Alignment:
    """Tokenization against denoising, [T, L, L] each: entry (t, i, j) compares block i there with block j here."""

    cka: np.ndarray
    cknna: np.ndarray


@dataclass
class Cosine:
    """Mean cosine with z0, [T] each.

    Attributes:
        unlabelled: of ẑ0 without a label.
        labelled: of ẑ0 under the image's class, None where that is not known.
        noised: of z_t itself.
        mean_latent: of the mean z0, at any time.
    """

    unlabelled: list[float]
    labelled: list[float] | None
    noised: list[float]
    mean_latent: float


@dataclass
class Probing:
    """Accuracy on held-out images.

    Attributes:
        pixels, latents: of these features.
        blocks: [L], of each block's mean register token.
        chance: share of the most frequent held-out class.
        train: training images.
        penalties: of pixels, latents, and the blocks, over the number of training images.
    """

    pixels: float
    latents: float
    blocks: list[float]
    chance: float
    train: int
    penalties: list[float]


@dataclass
class Study:
    """All results.

    Attributes:
        count: images compared.
        rows: names of the trajectory's images.
        final_cosine: of x̂0 with the sample's latents, at each of the trajectory's times.
        notes: under a part's name what is missing of it, and why.
    """

    options: Options
    count: int
    alignment: Alignment
    cosine: Cosine
    entropy: list[TensorEntropy]
    trajectory: Trajectory
    rows: list[str]
    final_cosine: list[float]
    probing: Probing | None
    notes: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Every number, as JSON values; a measure that is undefined (features without variation) is null."""
        blocks = {
            name: {"same_block": _numbers(np.diagonal(found, axis1=1, axis2=2)), "matrix": _numbers(found)}
            for name, found in vars(self.alignment).items()
        }
        return {
            "images": self.count,
            "times": list(self.options.times),
            "alignment": blocks,
            "cosine": _numbers(vars(self.cosine)),
            "entropy": [vars(one) for one in self.entropy],
            "trajectories": {
                "rows": self.rows, "times": self.trajectory.times, "cosine_with_sample": _numbers(self.final_cosine),
            },
            "probing": None if self.probing is None else vars(self.probing),
            "notes": self.notes,
        }  # fmt: skip


@torch.no_grad()
def study(
    trained: Trained, model: Unite, images: Images, train: Images | str, options: Options, progress: Progress
) -> Study:
    """Run every analysis.

    Args:
        trained: what is known about the weights.
        model: the same weights on the device to use, in evaluation mode.
        images: to compare both passes on, and to measure the probes on.
        train: images that probes are fitted to, or why there are none.
        progress: (what, total) -> context that yields a function to call with the images done since the last call.

    Raises:
        UserError: no readable image, too few for a measure, weights with NaN.
    """
    entropy = weight_entropies(trained.state)
    work = dict(seed=options.seed, batch=options.batch)
    with progress("tokenization", len(images)) as advance:
        found = tokenize(model, images, advance=advance, **work)
    notes: dict[str, str] = {}
    _note_unreadable(found, "images", notes)
    compared, cosine = _compare(model, found, options, progress)
    settings = trained.sampling.model_dump() | {"time_shift": trained.time_shift}
    names = trained.class_names or [str(label) for label in range(trained.config.num_classes)]
    chosen = spread(len(names), TRAJECTORY_ROWS)
    with progress("trajectories", len(chosen)) as advance:
        path = trajectory(model, torch.tensor(chosen), settings, options.seed)
        advance(len(chosen))
    return Study(
        options, len(found.z0), compared, cosine, entropy, path, [names[label] for label in chosen],
        [latent_cosine(clean, path.clean[-1]) for clean in path.clean],
        _probe(model, images, found, train, work, progress, notes), notes,
    )  # fmt: skip


def latent_cosine(a: Tensor, b: Tensor) -> float:
    """Mean over images and registers of the cosine of latents [n, K, D], over D."""
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def _compare(model: Unite, found: Tokenized, options: Options, progress: Progress) -> tuple[Alignment, Cosine]:
    """Both passes at every time."""
    z0, work = found.z0, dict(seed=options.seed, batch=options.batch)
    kernels = {"cknna": cknna_kernel, "cka": cka_kernel}  # the more demanding first
    ours = {name: _each(kernel, found.blocks) for name, kernel in kernels.items()}
    matrices: dict[str, list[np.ndarray]] = {name: [] for name in kernels}
    unlabelled, labelled, of_noised = [], [], []
    null = torch.full((len(z0),), model.null_label)
    passes = 1 if found.labels is None else 2
    with progress("denoising", passes * len(options.times) * len(z0)) as advance:
        for t in options.times:
            denoised = denoise(model, z0, t, null, advance=advance, **work)
            for name, kernel in kernels.items():
                matrices[name].append(alignment(ours[name], _each(kernel, denoised.blocks)).numpy())
            unlabelled.append(latent_cosine(denoised.clean, z0))
            of_noised.append(latent_cosine(noised(model, z0, t, seed=options.seed, first=0).cpu(), z0))
            if found.labels is not None:
                clean = denoise(model, z0, t, found.labels, advance=advance, **work).clean
                labelled.append(latent_cosine(clean, z0))
    mean = latent_cosine(z0.mean(0, keepdim=True).expand_as(z0), z0)
    cosine = Cosine(unlabelled, labelled or None, of_noised, mean)
    return Alignment(**{name: np.stack(found) for name, found in matrices.items()}), cosine


def _each(kernel: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    """Kernels [L, n, n] of the features of every block [L, n, C]."""
    return torch.stack([kernel(block) for block in blocks])


def _probe(
    model: Unite, images: Images, found: Tokenized, train: Images | str, work: dict[str, int], progress: Progress,
    notes: dict[str, str],
) -> Probing | None:  # fmt: skip
    """Probes, or None with a note of why there are none."""
    missing = train if isinstance(train, str) else train.unlabelled
    missing = images.unlabelled or missing
    if missing is not None:
        notes["probing"] = missing
        return None
    with progress("training images", len(train)) as advance:
        fitted = tokenize(model, train, advance=advance, **work)
    _note_unreadable(fitted, "training images", notes)
    pairs = [(fitted.pixels, found.pixels), (fitted.z0.flatten(1), found.z0.flatten(1))]
    pairs += zip(fitted.blocks, found.blocks, strict=True)
    probes = []
    with progress("probing", len(pairs)) as advance:
        for ours, theirs in pairs:
            probes.append(linear_probe(ours, fitted.labels, theirs, found.labels))
            advance(1)
    pixels, latents, *blocks = (probe.accuracy for probe in probes)
    chance = float(found.labels.bincount().max() / len(found.labels))
    return Probing(pixels, latents, blocks, chance, len(fitted.z0), [probe.penalty for probe in probes])


def _note_unreadable(found: Tokenized, what: str, notes: dict[str, str]) -> None:
    if found.unreadable:
        notes[what] = f"{len(found.unreadable)} unreadable files were left out, the first {found.unreadable[0]}"


def protocol(trained: Trained, model: Unite, images: Images, train: Images | str, options: Options) -> dict[str, Any]:
    """What made the numbers, beside the model and the environment."""
    fitted = None if isinstance(train, str) else train.about
    return {
        "seed": options.seed, "batch": options.batch, "precision": "fp32", "tokenize_time": model.tokenize_time,
        "neighbours": NEIGHBOURS, "penalties": list(PENALTIES), "bins": BINS, "data": images.about, "train": fitted,
        "sampling": trained.sampling.model_dump(mode="json") | {"time_shift": trained.time_shift},
        "definitions": DEFINITIONS,
    }  # fmt: skip


def _numbers(value: Any) -> Any:
    """Arrays as lists, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return _numbers(value.tolist())
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return value if value is None or np.isfinite(value) else None
