"""How alike two sets of features of the same n images are: CKA and CKNNA.

Both compare kernels [n, n], in float64: entry (i, j) says how alike images i and j are to these features. Each measure
is the cosine of the angle between the two kernels, after a step of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.errors import UserError

NEIGHBOURS = 10  # k that Huh et al. 2024 report


def cka_kernel(features: Tensor) -> Tensor:
    """Linear kernel of features [n, d], centred without bias: [n, n], zero on its diagonal, rows that sum to 0.

    The inner product of two such kernels over n(n − 3) is the unbiased HSIC (Song et al. 2012, equation 5).

    Raises:
        UserError: fewer than 4 images.
    """
    count = len(features)
    _at_least(count, 4, "CKA")
    x = features.double()
    x = x - x.mean(0)
    kernel = (x @ x.T).fill_diagonal_(0)
    rows = kernel.sum(1) / (count - 2)
    kernel = kernel - rows[:, None] - rows + kernel.sum() / ((count - 1) * (count - 2))
    return kernel.fill_diagonal_(0)


def cknna_kernel(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Cosine kernel of features [n, d] less its rows' means, zero outside of each row's nearest neighbours: [n, n].

    The neighbours of an image are the `neighbours` others of the largest cosine.

    Raises:
        UserError: not more images than neighbours.
    """
    _at_least(len(features), neighbours + 1, f"CKNNA of {neighbours} neighbours")
    x = F.normalize(features.double(), dim=1)
    kernel = x @ x.T
    others = kernel.clone().fill_diagonal_(-torch.inf)
    nearest = others.topk(neighbours, dim=1).indices
    near = torch.zeros_like(kernel).scatter_(1, nearest, 1)
    return near * (kernel - kernel.mean(1, keepdim=True))


def alignment(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of every kernel of [L, n, n] with every one of [R, n, n]: [L, R], NaN where one is zero.

    It is zero where nothing differs between the images.
    """
    a, b = left.flatten(1), right.flatten(1)
    return (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1))


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features [n, d] and [n, e] (Kornblith et al. 2019), unbiased.

    CKA = HSIC(x, y) / √(HSIC(x, x) · HSIC(y, y)): 1 for features equal up to rotation, shift and one factor, about 0
    for independent ones, also where features are as wide as images are many: Kornblith's own estimate of HSIC gives
    d / (n + d) there. That of Song et al. 2012 stands in its place, as in Nguyen, Raghu & Kornblith 2021.

    Raises:
        UserError: fewer than 4 images.
    """
    return float(alignment(cka_kernel(x)[None], cka_kernel(y)[None]))


def cknna(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Mutual-nearest-neighbour alignment of features [n, d] and [n, e] (Huh et al. 2024, The Platonic Representation
    Hypothesis, by the formula of its appendix).

    CKNNA = A(x, y) / √(A(x, x) · A(y, y)), where A(x, y) sums
    (⟨x_i, x_j⟩ − mean_l ⟨x_i, x_l⟩) · (⟨y_i, y_j⟩ − mean_l ⟨y_i, y_l⟩) over the pairs in which j is one of the nearest
    `neighbours` of i in x and in y, of features of unit length. 1 for equal features, about neighbours / (n − 1) for
    independent ones: it looks at what lies near alone.

    Raises:
        UserError: not more images than neighbours.
    """
    return float(alignment(cknna_kernel(x, neighbours)[None], cknna_kernel(y, neighbours)[None]))


def _at_least(count: int, least: int, what: str) -> None:
    if count < least:
        raise UserError(
            f"{what} needs at least {least} readable images, got {count}: raise --count, or give a larger --data"
        )
