"""Fréchet distance between two Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import numpy as np

from unite_fast.errors import UserError


def gaussian_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance (division by N-1) of features [N, k], in float64.

    Returns:
        (mean [k], covariance [k, k]).

    Raises:
        UserError: fewer than two rows, for which no covariance exists.
    """
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise UserError(f"a covariance needs at least 2 images, got {len(features)}: evaluate more images")
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|m_a - m_b|² + tr(A) + tr(B) - 2 tr((A B)^½), in float64.

    tr((A B)^½) is computed as the sum of the singular values of A^½ B^½: real and non-negative for every pair of
    covariances, singular ones included, where the square root of the product A B turns complex.

    Args:
        mean_a, mean_b: [k].
        covariance_a, covariance_b: [k, k], symmetric, positive semi-definite up to rounding.

    Returns:
        The squared distance, at least 0.
    """
    offset = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    root_a, trace_a = _root(covariance_a)
    root_b, trace_b = _root(covariance_b)
    overlap = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    return max(0.0, float(offset @ offset + trace_a + trace_b - 2.0 * overlap))


def _root(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """Symmetric square root and trace of a positive semi-definite matrix [k, k]."""
    covariance = np.asarray(covariance, dtype=np.float64)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # eigh is exact to about k·2.2e-16 of the largest eigenvalue. What lies below is rounding of a zero, and its root
    # (1e-8 from 1e-16) would be an error eight orders larger.
    floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    values = np.where(values > floor, values, 0.0)
    return (vectors * np.sqrt(values)) @ vectors.T, float(values.sum())
