"""What evaluation spends beside sampling: Inception features, and each metric made of them.

The Fréchet distance has an honest rival, SciPy's root of the product of the covariances; the others stand alone.
"""

from __future__ import annotations

from collections.abc import Callable

import measure
import numpy as np
import pytest
import scipy.linalg
import torch

from unite_fast.evaluation.features import inception_score, kernel_distance, precision_recall
from unite_fast.evaluation.frechet import frechet_distance, gaussian_statistics
from unite_fast.evaluation.inception import Inception

ON_GPU = measure.DEVICE == "cuda"
IMAGES = 64 if ON_GPU else 2
FEATURES, ROWS = (2048, 10_000) if ON_GPU else (256, 500)
ROUNDS = 5 if ON_GPU else 3


def features(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed))


def extract() -> tuple[int, dict[str, Callable]]:
    network = Inception().to(measure.DEVICE)
    images = torch.randint(0, 256, (IMAGES, 3, 256, 256), dtype=torch.uint8, device=measure.DEVICE)
    return IMAGES, {"ours": lambda: network(images)}


def frechet() -> tuple[int, dict[str, Callable]]:
    a, b = (gaussian_statistics(features(seed).numpy()) for seed in (0, 1))

    def with_sqrtm():
        root = np.real(scipy.linalg.sqrtm(a[1] @ b[1]))
        return float(np.sum((a[0] - b[0]) ** 2) + np.trace(a[1] + b[1] - 2 * root))

    return ROWS, {"ours": lambda: frechet_distance(*a, *b), "sqrtm": with_sqrtm}


CASES = {
    f"Inception features, {IMAGES} images of 256x256": extract,
    f"Fréchet distance, {FEATURES} features": frechet,
    f"Inception Score, {ROWS} x {FEATURES}": lambda: (ROWS, {"ours": lambda: inception_score(features(0), seed=0)}),
    f"KID, {ROWS} x {FEATURES}": lambda: (ROWS, {"ours": lambda: kernel_distance(features(0), features(1), seed=0)}),
    f"precision, recall, {ROWS} x {FEATURES}": lambda: (
        ROWS, {"ours": lambda: precision_recall(features(0), features(1))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=measure.CLOCK)
def test_metric(case, benchmark, results):
    images, contenders = CASES[case]()
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def one_round():
        for name, run in contenders.items():
            times[name].append((measure.CLOCK.advance if name == "ours" else measure.CLOCK.seconds)(run))

    one_round()
    for samples in times.values():
        samples.clear()
    benchmark.pedantic(one_round, rounds=ROUNDS)
    seconds = {name: measure.spread(samples) for name, samples in times.items()}
    median = seconds["ours"]["median"]
    result = {
        "work": case,
        "images": images,
        "rounds": ROUNDS,
        "seconds": seconds,
        "images_per_second": images / median,
        "times_faster_than": {name: found["median"] / median for name, found in seconds.items() if name != "ours"},
    }
    benchmark.extra_info.update(result)
    results.append(result)
