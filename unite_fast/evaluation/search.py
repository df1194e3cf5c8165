"""Search for the guidance (strength w and interval of t) that scores best on a small sample.

Every point is measured on the same noise and labels, so the curve is smooth although few images are drawn, and the
bias of few images shifts all points alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Published sweeps run over w from 1 to 4; six points bracket the one valley that FID has there.
COARSE = (1.0, 1.6, 2.2, 2.8, 3.4, 4.0)
RISES = 2  # points in a row that lie higher end the coarse sweep
DECIMALS = 2  # of a w: FID moves by less than 1e-3 over 0.01
TOLERANCE, REFINEMENTS = 0.04, 6  # of Brent's method between the neighbours of the best point
STEP = 0.1  # of an end of the interval

Settings = dict[str, Any]  # of sampling: guidance, interval, solver, …


@dataclass
class GuidanceSearch:
    """Finds settings that minimise a score.

    Args:
        score: settings -> number, lower is better.
        base: settings to vary.
        told: called with each new row.

    Attributes:
        rows: every point measured, in order: guidance, low, high, score.
    """

    score: Callable[[Settings], float]
    base: Settings
    told: Callable[[dict[str, float]], None] = lambda row: None
    rows: list[dict[str, float]] = field(default_factory=list)
    _known: dict[tuple[float, float, float], float] = field(default_factory=dict)

    def sweep(self, strengths: list[float]) -> Settings:
        """The best of given strengths, in the interval as configured."""
        for w in strengths:
            self._at(w, *self.base["interval"])
        return self.best()

    def adapt(self) -> Settings:
        """Coarse sweep and refinement over w, then each end of the interval in steps, then w again if one moved."""
        low, high = self.base["interval"]
        w = self._refine(*self._bracket(low, high), low, high)
        started = (low, high)
        low = self._walk(low, lambda end: self._at(w, end, high), 0.0, high - STEP)
        high = self._walk(high, lambda end: self._at(w, low, end), low + STEP, 1.0)
        if (low, high) != started:
            reach = COARSE[1] - COARSE[0]
            self._refine(max(COARSE[0], w - reach), min(COARSE[-1], w + reach), low, high)
        return self.best()

    def best(self) -> Settings:
        """Settings of the lowest score so far."""
        row = min(self.rows, key=lambda row: row["score"])
        return self.base | {"guidance": row["guidance"], "interval": (row["low"], row["high"])}

    def _bracket(self, low: float, high: float) -> tuple[float, float]:
        """Neighbours of the best coarse strength."""
        scores: list[float] = []
        for w in COARSE:
            scores.append(self._at(w, low, high))
            tail = scores[-RISES - 1 :]
            if len(tail) > RISES and all(a < b for a, b in zip(tail, tail[1:])):
                break
        best = scores.index(min(scores))
        return COARSE[max(0, best - 1)], COARSE[min(len(scores), best + 1, len(COARSE) - 1)]

    def _refine(self, left: float, right: float, low: float, high: float) -> float:
        """Brent's method (golden section with parabolas) between two strengths; the best strength of this interval."""
        from scipy.optimize import minimize_scalar

        minimize_scalar(
            lambda w: self._at(float(w), low, high), bounds=(left, right), method="bounded",
            options={"xatol": TOLERANCE, "maxiter": REFINEMENTS},
        )  # fmt: skip
        here = {w: score for (w, *interval), score in self._known.items() if interval == [low, high] or w == 1.0}
        return min(here, key=here.__getitem__)

    def _walk(self, end: float, at: Callable[[float], float], least: float, most: float) -> float:
        """Move an end of the interval by STEP while that lowers the score, to either side."""
        best, lowest = end, at(end)
        for direction in (STEP, -STEP):
            following = round(best + direction, DECIMALS)
            while least <= following <= most and (score := at(following)) < lowest:
                best, lowest = following, score
                following = round(best + direction, DECIMALS)
        return best

    def _at(self, w: float, low: float, high: float) -> float:
        w = round(w, DECIMALS)
        # Without guidance the interval means nothing.
        key = (w, low, high) if w != 1.0 else (w, *self.base["interval"])
        if key not in self._known:
            w, low, high = key
            score = self.score(self.base | {"guidance": w, "interval": (low, high)})
            self._known[key] = score
            self.rows.append({"guidance": w, "low": low, "high": high, "score": score})
            self.told(self.rows[-1])
        return self._known[key]


def search_curve(rows: list[dict[str, float]], name: str, path: str | Path) -> None:
    """Draw score against w, a line an interval, the best point ringed.

    Args:
        rows: as `GuidanceSearch.rows`.
        name: of the score, for the axis.
        path: the PNG file.

    Raises:
        UserError: a path that cannot be written.
    """
    from matplotlib.figure import Figure

    from unite_fast.pictures import COLOURS, save_figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    intervals = list(dict.fromkeys((row["low"], row["high"]) for row in rows))
    markers = "osD^v<>P*X"
    for index, (low, high) in enumerate(intervals):
        line = sorted((row["guidance"], row["score"]) for row in rows if (row["low"], row["high"]) == (low, high))
        label = f"t in ({low:g}, {high:g})"
        style = {"marker": markers[index % len(markers)], "color": COLOURS[index % len(COLOURS)]}
        axes.plot(*zip(*line), markersize=4, linewidth=1.4, label=label, **style)
    best = min(rows, key=lambda row: row["score"])
    axes.plot(best["guidance"], best["score"], "o", markersize=12, fillstyle="none", color="#222222")
    strengths = [row["guidance"] for row in rows]
    right = 2 * best["guidance"] > min(strengths) + max(strengths)  # the text then stands to the left, inside the page
    axes.annotate(
        f"w = {best['guidance']:g}: {best['score']:.4g}", (best["guidance"], best["score"]),
        xytext=(-10 if right else 10, 12), textcoords="offset points", ha="right" if right else "left", fontsize=9,
    )  # fmt: skip
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("guidance w")
    axes.set_ylabel(name)
    axes.grid(True, color="#e5e7eb", linewidth=0.7)
    if len(intervals) > 1:
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
