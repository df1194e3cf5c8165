"""Fréchet distance between two Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import numpy as np

from unite_fast.errors import UserError

FIELD_IMAGES = 50_000
FEWEST_ROWS = 2  # that have a covariance


def gaussian_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance (division by N-1) of features [N, k], in float64.

    Returns:
        (mean [k], covariance [k, k]).

    Raises:
        UserError: fewer than two rows, for which no covariance exists.
    """
    features = np.asarray(features, dtype=np.float64)
    if len(features) < FEWEST_ROWS:
        raise UserError(f"a covariance needs at least {FEWEST_ROWS} images, got {len(features)}: evaluate more images")
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|m_a - m_b|² + tr(A) + tr(B) - 2 tr((A B)^½), in float64.

    tr((A B)^½) is computed as the sum of the singular values of R_aᵀ R_b, where A = R_a R_aᵀ and B = R_b R_bᵀ: real
    and non-negative for every pair of covariances, singular ones included, where the square root of the product A B
    turns complex. A root has as many columns as its covariance has rank: few images cost little.

    Args:
        mean_a, mean_b: [k].
        covariance_a, covariance_b: [k, k], symmetric, positive semi-definite up to rounding.

    Returns:
        The squared distance, at least 0; NaN where an argument holds one.
    """
    offset = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    root_a, trace_a = _root(covariance_a)
    root_b, trace_b = _root(covariance_b)
    overlap = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum() if root_a.size and root_b.size else 0.0
    # Python's max(0, NaN) would be 0, the best distance there is.
    return float(np.maximum(0.0, offset @ offset + trace_a + trace_b - 2.0 * overlap))


def frechet_caveat(images: int, features: int) -> str | None:
    """What a Fréchet distance of so few images is worth, None where nothing has to be said.

    The covariance of N images has rank N − 1 at most, and the distance is biased upwards by about 1/N (Chong and
    Forsyth 2020, arXiv 1911.07023); the field reports 50,000.
    """
    if images <= features:
        return (
            f"{images} images determine {images - 1} of the {features} directions of a covariance: this Fréchet "
            f"distance is dominated by that, compare it only with one of as many images"
        )
    if images < FIELD_IMAGES:
        return (
            f"a Fréchet distance of {images} images is higher than one of the {FIELD_IMAGES} that the field reports: "
            f"compare it only with one of as many images"
        )
    return None


def _root(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """R with R Rᵀ = covariance, [k, rank], and the trace of a positive semi-definite matrix [k, k]."""
    covariance = np.asarray(covariance, dtype=np.float64)
    if not np.isfinite(covariance).all():  # LAPACK may do anything with it
        return np.empty((len(covariance), 0)), float("nan")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # eigh is exact to about k·2.2e-16 of the largest eigenvalue. What lies below is rounding of a zero, and its root
    # (1e-8 from 1e-16) would be an error eight orders larger.
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept]), float(values[kept].sum())
