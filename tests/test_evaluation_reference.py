"""Reference statistics: accumulated exactly, written and read back, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unite_fast.errors import UserError
from unite_fast.evaluation.frechet import gaussian_statistics
from unite_fast.evaluation.reference import Moments, read_reference, write_reference


def rows(count=50, features=5, seed=0):
    return np.random.default_rng(seed).normal(100, 1e-3, (count, features))


def moments(features=5, **options):
    found = Moments(features)
    found.add(rows(features=features, **options))
    return found


def read(path, **changes):
    return read_reference(path, **({"image_size": 32, "inception": "ab" * 32, "features": 5} | changes))


def test_moments_in_pieces_are_those_of_the_whole():
    """Features of 100 ± 1e-3: sums of squares would lose every digit of the covariance."""
    mean, covariance = gaussian_statistics(rows())
    left, right = Moments(5), Moments(5)
    for piece in (rows()[:7], rows()[7:7], rows()[7:20]):
        left.add(piece)
    right.add(rows()[20:])
    left.merge(right)
    left.merge(Moments(5))
    assert left.count == 50
    np.testing.assert_allclose(left.statistics()[0], mean, rtol=1e-14)
    np.testing.assert_allclose(left.statistics()[1], covariance, rtol=1e-7, atol=1e-14)
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        moments(count=1).statistics()


def test_a_file_says_how_it_was_made(tmp_path):
    path = tmp_path / "deep" / "reference.npz"
    write_reference(moments(), path, {"crop": "adm", "image_size": 32, "inception": "ab" * 32})
    with np.load(path) as file:
        assert set(file.files) == {"mu", "sigma", "count", "crop", "image_size", "inception"}
    found = read(path)
    np.testing.assert_array_equal(found.mu, moments().statistics()[0])
    np.testing.assert_array_equal(found.sigma, moments().statistics()[1])
    assert found.about["count"] == 50 and found.about["crop"] == "adm" and len(found.about["sha256"]) == 64
    assert list(path.parent.iterdir()) == [path]


def test_the_common_form_is_enough(tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.zeros(5, np.float32), sigma=np.eye(5), arr_0=np.zeros(3, np.uint8))
    found = read(tmp_path / "r.npz")
    assert found.mu.dtype == np.float64 and set(found.about) == {"file", "sha256"}


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "reference.npz"

    def refusal(**changes) -> str:
        with pytest.raises(UserError) as caught:
            read(path, **changes)
        return str(caught.value)

    assert "`unite-fast reference IMAGES --out" in refusal()
    write_reference(moments(), path, {"crop": "adm", "image_size": 32, "inception": "ab" * 32})
    assert "made from images of 32×32 pixels, the model makes 64×64" in refusal(image_size=64)
    assert "other Inception weights (sha256 abababab…, here cdcdcdcd…)" in refusal(inception="cd" * 32)
    assert "mu is [5] and sigma [5, 5], the features here need [7] and [7, 7]" in refusal(features=7)
    whole = path.read_bytes()
    for cut in (0, 10, 300, len(whole) - 40):
        path.write_bytes(whole[:cut])
        assert "is truncated or no .npz" in refusal()
    np.savez(path, mean=np.zeros(5))
    assert "must hold mu and sigma, it holds mean" in refusal()
    np.savez(path, mu=np.full(5, np.nan), sigma=np.eye(5))
    assert "no finite numbers" in refusal()
    np.savez(path, mu=np.array([object()] * 5), sigma=np.eye(5))
    assert "no .npz of plain arrays" in refusal()
    with pytest.raises(UserError, match="must end in .npz"):
        write_reference(moments(), Path("x.npy"), {})
