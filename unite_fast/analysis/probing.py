"""Linear probing: what a linear classifier reads from features."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = tuple(10.0**k for k in range(-4, 5))  # λ over the number of training images


class Probe(NamedTuple):
    """Result of a probe.

    Attributes:
        accuracy: on the held-out images.
        penalty: λ/n that was chosen.
    """

    accuracy: float
    penalty: float


def linear_probe(train: Tensor, train_labels: Tensor, held_out: Tensor, held_out_labels: Tensor) -> Probe:
    """Fit a ridge classifier to training features and measure it on held-out ones. In closed form, nothing is drawn.

    Features are standardised by the training images. W = (XᵀX + λI)⁻¹ XᵀY of one-hot Y less its mean; the largest
    output is the class. Of `PENALTIES` the λ is taken whose leave-one-out error on the training images is the smallest
    (Allen's PRESS: residual over one less leverage, Golub, Heath & Wahba 1979).

    Args:
        train: [n, d]. train_labels: [n] int64. held_out: [m, d]. held_out_labels: [m] int64.
    """
    mean, std = train.double().mean(0), train.double().std(0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # what all images share says nothing
    x, z = ((part.double() - mean) / std for part in (train, held_out))
    classes, targets = train_labels.unique(return_inverse=True)
    y = F.one_hot(targets, len(classes)).double()
    offset = y.mean(0)
    y = y - offset
    count, width = x.shape
    # The eigenvectors of the smaller of both products: with X = U S Vᵀ they are V or U.
    if width <= count:
        squares, right = torch.linalg.eigh(x.T @ x)
        squares = squares.clamp_min(0)
        rotated = x @ right  # U S
        leverage, project = rotated.square(), rotated.T @ y  # of λ = 0 times S², S Uᵀ y
        rotated_held_out = z @ right
    else:
        squares, left = torch.linalg.eigh(x @ x.T)
        squares = squares.clamp_min(0)
        rotated, rotated_held_out = left * squares, z @ (x.T @ left)  # U S², Z V S
        leverage, project = left.square() * squares, left.T @ y
    best: tuple[float, float, Tensor] | None = None
    for penalty in PENALTIES:
        weights = project / (squares + penalty * count)[:, None]
        outputs = rotated @ weights
        # 1/n is the leverage of the mean that was taken off.
        taken = (leverage / (squares + penalty * count)).sum(1) + 1 / count
        error = float(((y - outputs) / (1 - taken).clamp_min(1e-9)[:, None]).square().mean())
        if best is None or error < best[0]:
            best = error, penalty, weights
    _, penalty, weights = best
    guessed = classes[(rotated_held_out @ weights + offset).argmax(1)]
    return Probe(float((guessed == held_out_labels).double().mean()), penalty)
