"""Inception Score, KID, precision and recall against direct computations, and too few images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.evaluation.features import inception_score, kernel_distance, precision_recall, score_splits


def normal(count, features=6, seed=0, shift=0.0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) + shift


def test_inception_score_of_known_distributions():
    # Ten sure and equally frequent classes: 10 distinguishable kinds of image. Alike images: 1.
    sure = 60 * torch.eye(10).repeat(200, 1)
    found = inception_score(sure, seed=0)
    assert found["is"] == pytest.approx(10, rel=0.05) and found["is_std"] < 0.5
    assert inception_score(torch.ones(50, 10), seed=0) == {"is": pytest.approx(1), "is_std": pytest.approx(0)}
    assert inception_score(sure, seed=1) != found == inception_score(sure, seed=0)
    with pytest.raises(UserError, match="at least 10 images.*got 9"):
        inception_score(torch.ones(9, 10), seed=0)


@pytest.mark.filterwarnings("ignore:std")  # one split has no deviation
def test_inception_score_of_one_split_by_hand(monkeypatch):
    monkeypatch.setattr("unite_fast.evaluation.features.SPLITS", 1)  # no shuffle matters
    logits = 3 * normal(30)
    p = logits.double().softmax(1)
    expected = float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())
    assert inception_score(logits, seed=0)["is"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (50_000, "10 shuffled splits"), (12, "6 shuffled splits of at most 2 images"),
        (19, "10 shuffled splits of at most 2 images"),
    ],
)  # fmt: skip
def test_splits_of_the_inception_score_are_as_said(count, says, monkeypatch):
    pieces = []
    chunk = torch.Tensor.chunk
    monkeypatch.setattr(torch.Tensor, "chunk", lambda *a, **k: pieces.append(chunk(*a, **k)) or pieces[-1])
    inception_score(torch.ones(count, 2), seed=0)
    sizes = {len(piece) for piece in pieces[0]}
    assert says == score_splits(count) == f"{len(pieces[0])} shuffled splits" + (
        f" of at most {max(sizes)} images" if count % 10 else ""
    )


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    inception_score(normal(20), seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_kid_is_the_unbiased_polynomial_mmd():
    real, generated = normal(40, seed=1), normal(30, seed=2, shift=0.5)
    x, y = real[:30].double().numpy(), generated.double().numpy()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    # All 30 real images in place of 30 of 40: one subset is then the whole set, whatever the shuffle.
    expected = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()
    found = kernel_distance(real[:30], generated, seed=0)
    assert found["kid"] == pytest.approx(expected, rel=1e-9) and found["kid_std"] == pytest.approx(0, abs=1e-9)
    assert found["kid_subset_size"] == 30
    assert abs(kernel_distance(normal(200, seed=3), normal(200, seed=4), seed=0)["kid"]) < 0.05 < found["kid"]
    with pytest.raises(UserError, match="at least 2 real and 2 generated images, got 1 and 30"):
        kernel_distance(real[:1], generated, seed=0)


def test_kid_is_of_a_hundred_subsets_of_a_thousand(monkeypatch):
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: drawn.append(a[0]) or randperm(*a, **k))
    kernel_distance(normal(5), normal(4), seed=0)
    assert drawn == [5, 4] * 100
    monkeypatch.setattr("unite_fast.evaluation.features.SUBSETS", 1)
    assert kernel_distance(normal(1001, 2), normal(1002, 2, seed=1), seed=0)["kid_subset_size"] == 1000


def straightforward(queries, points, k=3):
    """Share of queries inside a ball that reaches to a point's k-th nearest other point."""
    among = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    radii = among.sort(1).values[:, k]
    distances = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return float((distances <= radii).any(1).double().mean())


def test_precision_and_recall():
    real, generated = normal(60, seed=5), normal(50, seed=6, shift=1.0)
    found = precision_recall(real, generated)
    assert found == {
        "precision": pytest.approx(straightforward(generated, real)),
        "recall": pytest.approx(straightforward(real, generated)),
    }
    assert 0.1 < found["precision"] < 0.95 and 0.1 < found["recall"] < 0.95
    # One mode of two, reproduced well: precise, without recall of the other half.
    two = torch.cat([normal(40, seed=7), normal(40, seed=8, shift=20)])
    half = precision_recall(two, normal(40, seed=9))
    assert half["precision"] > 0.8 and half["recall"] < 0.55
    with pytest.raises(UserError, match="more than 3 real and generated images each, got 3 and 50"):
        precision_recall(real[:3], generated)
