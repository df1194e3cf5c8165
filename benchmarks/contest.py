"""Contenders timed in turn, and what their times say of one another.

One run on a shared machine drifts by tens of percent, and so do absolute times from run to run. What stays is the ratio
of two calls made one after the other: a contest alternates its contenders and judges round by round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

OURS = "ours"
OURS_COMPILED = "ours-compiled"  # a rival of OURS like any other: below 1 it is the faster one
NORMAL_MAD = 1.4826  # standard deviation of a normal law over its median absolute deviation
FEWEST_ROUNDS = 5  # whose scatter says something
MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean, √(π/2)
# An error of a ratio's logarithm that is small enough: the gate's band is then 4 × 1.5 = 6 %, where a fifth is 18 %.
ENOUGH = 0.015


class Ratio(NamedTuple):
    """How many times faster ours is than a rival: the median over rounds, and the standard error of its logarithm."""

    value: float
    error: float


def play(contenders: dict[str, Callable[[], float]], times: dict[str, list[float]]) -> None:
    """One more round: each contender's time behind its earlier ones; who goes first alternates."""
    order = list(contenders)
    for name in order if len(times[order[0]]) % 2 == 0 else reversed(order):
        times[name].append(contenders[name]())


def settle(
    contenders: dict[str, Callable[[], float]],
    times: dict[str, list],
    found: Callable[[], dict[str, Ratio]],
    seconds: float,
) -> None:
    """Further rounds until every ratio is known to ENOUGH, or for so many seconds.

    A busy CPU's scatter is independent from round to round, so that the error falls as 1/√rounds: steps whose ratios
    scattered by 10 % a round took 70.

    Args:
        contenders: as for `play`, which has played at least one round.
        times: what the contenders' turns returned so far; grows.
        found: the ratios of all times so far.
        seconds: by the wall clock; the last round begins before.
    """
    end = time.monotonic() + seconds
    while max(ratio.error for ratio in found().values()) > ENOUGH and time.monotonic() < end:
        play(contenders, times)


def ratios(seconds: dict[str, list[float]]) -> dict[str, Ratio]:
    """Rival -> ratio, from times of the same rounds."""
    return {name: paired(times, seconds[OURS]) for name, times in seconds.items() if name != OURS}


def paired(rival: list[float], ours: list[float]) -> Ratio:
    """The ratio of one rival from its times and ours, round by round."""
    logs = [math.log(theirs / own) for theirs, own in zip(rival, ours, strict=True)]
    # Few rounds agree by chance (one always does): an error of an e-fold, which no gate judges.
    error = MEDIAN_ERROR * deviation(logs) / math.sqrt(len(logs)) if len(logs) >= FEWEST_ROUNDS else 1.0
    return Ratio(math.exp(statistics.median(logs)), error)


def deviation(values: list[float]) -> float:
    """Standard deviation of a normal law with these values' median absolute deviation."""
    centre = statistics.median(values)
    return NORMAL_MAD * statistics.median(abs(value - centre) for value in values)
