"""Metrics of generated images from extractor features: Inception Score, KID, precision and recall.

N generated and M real images, k features. The libraries' arithmetic, in float64, with every draw from a fixed seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from unite_fast.errors import UserError

SPLITS = 10  # of the Inception Score (Salimans et al. 2016)
SUBSETS, SUBSET_SIZE, DEGREE = 100, 1000, 3  # of KID (Bińkowski et al. 2018, and the field's implementations)
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)


def score_splits(count: int) -> str:
    """The splits of that many images, in words: SPLITS equal ones, else as torchmetrics cuts.

    Raises:
        UserError: fewer images than splits.
    """
    if count < SPLITS:
        raise UserError(
            f"the Inception Score needs at least {SPLITS} images, got {count} (--count, evaluation.count)"
        )
    size = -(-count // SPLITS)
    return f"{-(-count // size)} shuffled splits" + (f" of at most {size} images" if count % SPLITS else "")


def inception_score(logits: Tensor, *, seed: int) -> dict[str, float]:
    """exp of the mean KL divergence between p(class | image) and p(class), mean and deviation over splits.

    Args:
        logits: [N, classes], without the classifier's bias as the original computes it.
        seed: of the shuffle before the split.

    Returns:
        is, is_std.

    Raises:
        UserError: fewer images than splits.
    """
    score_splits(len(logits))
    from torchmetrics.image.inception import InceptionScore

    metric = _on_features(InceptionScore, splits=SPLITS)
    metric.update(logits.double())
    mean, deviation = _computed(metric, seed)
    return {"is": mean, "is_std": deviation}


def check_sides(metrics: Collection[str], real: int, generated: int) -> None:
    """Raise a UserError where so many real and generated images are too few for kid, precision or recall."""
    got = f"got {real} and {generated} (--data, --data-count, evaluation.reconstructions; --count, evaluation.count)"
    if "kid" in metrics and min(real, generated) < 2:
        raise UserError(f"KID needs at least 2 real and 2 generated images, {got}")
    if {"precision", "recall"}.intersection(metrics) and min(real, generated) <= NEIGHBOURS:
        raise UserError(f"precision and recall need more than {NEIGHBOURS} real and generated images each, {got}")


def kernel_distance(real: Tensor, generated: Tensor, *, seed: int) -> dict[str, float]:
    """KID: squared maximum mean discrepancy under a cubic kernel, unbiased, mean and deviation over subsets.

    Args:
        real, generated: [M, k] and [N, k].
        seed: of the subsets.

    Returns:
        kid, kid_std, kid_subset_size (SUBSET_SIZE, or all images of the smaller side where there are fewer).

    Raises:
        UserError: fewer than two images on a side.
    """
    check_sides(("kid",), len(real), len(generated))
    size = min(SUBSET_SIZE, len(real), len(generated))
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = _on_features(KernelInceptionDistance, subsets=SUBSETS, subset_size=size, degree=DEGREE)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    mean, deviation = _computed(metric, seed)
    return {"kid": mean, "kid_std": deviation, "kid_subset_size": size}


def precision_recall(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Share of generated images inside the real manifold, and of real images inside the generated one.

    A manifold is the union of balls around its images, each reaching to its NEIGHBOURS-th nearest other image.

    Args:
        real, generated: [M, k] and [N, k].

    Returns:
        precision, recall.

    Raises:
        UserError: as few images on a side as neighbours.
    """
    check_sides(("precision", "recall"), len(real), len(generated))
    sides = real.double().numpy(), generated.double().numpy()
    return {"precision": _inside(sides[1], sides[0]), "recall": _inside(sides[0], sides[1])}


def _inside(queries: np.ndarray, points: np.ndarray) -> float:
    """Share of queries that lie in the ball of a point."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    # The nearest of a point among all points is the point itself.
    found = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(points).kneighbors(points)[0]
    radii = found[:, -1]
    pieces = pairwise_distances_chunked(queries, points, reduce_func=lambda d, _: (d <= radii).any(axis=1))
    return float(np.concatenate(list(pieces)).mean())


def _on_features(metric, **options):
    """A metric of torchmetrics that takes features as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        # One rank has all features and computes alone: a metric that gathered them would wait for the others for ever.
        return metric(feature=torch.nn.Identity(), sync_on_compute=False, **options)


def _computed(metric, seed: int) -> tuple[float, float]:
    with torch.random.fork_rng(devices=[]):  # it shuffles with the global generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)
