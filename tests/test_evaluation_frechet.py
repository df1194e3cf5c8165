"""Fréchet distance against a float64 reference of SciPy's matrix square root, where covariances are hard as well."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from unite_fast.evaluation.frechet import frechet_caveat, frechet_distance, gaussian_statistics


def reference(mean_a, a, mean_b, b) -> float:
    """|m_a − m_b|² + tr(A + B − 2 (A^½ B A^½)^½) with scipy.linalg.sqrtm, in float64."""
    root = scipy.linalg.sqrtm(a)
    cross = np.real(scipy.linalg.sqrtm(root @ b @ root))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * cross))


def gaussian(features=24, images=400, seed=0, scale=None):
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(features, features)) * (1 if scale is None else scale)
    return gaussian_statistics(draw.normal(size=(images, features)) @ mixing + draw.normal(size=features))


def test_regular_covariances():
    a, b = gaussian(seed=1), gaussian(seed=2)
    assert frechet_distance(*a, *b) == pytest.approx(reference(*a, *b), rel=1e-10)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-9 * np.trace(a[1]))


@pytest.mark.parametrize("condition", [1e6, 1e10, 1e14])
def test_near_singular_covariances(condition):
    """Features over many orders of magnitude, as dead Inception channels have them."""
    scale = np.logspace(0, -np.log10(condition) / 2, 24)
    a, b = gaussian(seed=3, scale=scale), gaussian(seed=4, scale=scale)
    assert np.linalg.cond(a[1]) > condition / 10
    # SciPy's own root of a product loses half of the digits: 1e-8 of the trace at a condition of 1e16.
    assert frechet_distance(*a, *b) == pytest.approx(reference(*a, *b), rel=1e-7)


def test_fewer_images_than_features():
    """Rank-deficient on one side and on both; the reference gets the 1e-12 that keeps sqrtm off the singular point."""
    few, many, other = gaussian(images=9, seed=5), gaussian(seed=6), gaussian(images=13, seed=7)
    eye = 1e-12 * np.eye(24)
    for a, b in ((few, many), (many, few), (few, other)):
        expected = reference(a[0], a[1] + eye, b[0], b[1] + eye)
        assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(*few, *few) == pytest.approx(0, abs=1e-10 * np.trace(few[1]))


def test_known_values():
    eye = np.eye(5)
    assert frechet_distance(np.zeros(5), eye, np.full(5, 2.0), eye) == pytest.approx(20)
    assert frechet_distance(np.zeros(5), 4 * eye, np.zeros(5), 9 * eye) == pytest.approx(5 * (3 - 2) ** 2)
    zero = np.zeros((5, 5))
    assert frechet_distance(np.zeros(5), zero, np.zeros(5), eye) == pytest.approx(5)
    assert frechet_distance(np.zeros(5), zero, np.zeros(5), zero) == 0


def test_nan_is_no_distance_of_zero():
    mean, covariance = gaussian()
    holed = covariance.copy()
    holed[3, 4] = np.nan
    assert np.isnan(frechet_distance(mean, holed, mean, covariance))
    assert np.isnan(frechet_distance(mean, covariance, mean, holed))
    assert np.isnan(frechet_distance(mean * np.nan, covariance, mean, covariance))


def test_a_number_of_few_images_comes_with_its_worth():
    assert "determine 9 of the 2048 directions" in frechet_caveat(10, 2048)
    assert "of 10000 images is higher than one of the 50000" in frechet_caveat(10_000, 2048)
    assert frechet_caveat(50_000, 2048) is None
