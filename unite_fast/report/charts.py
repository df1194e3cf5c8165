"""Charts as inline SVG: drawn once, readable without a script, values under the pointer with one.

A chart is 400 units wide and shown at about that many pixels, so that its labels keep their size on a telephone.
Colours are classes of page.css, which knows light and dark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from unite_fast.pictures import MOSTLY

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 26
MOST_POINTS = 360  # about one a pixel of the plot; more would only make the page heavy
COLOURS = 6  # c0 to c5 of page.css; more curves begin anew
SMOOTHING = 40  # a noisy curve's running mean spans a fortieth of it


@dataclass(frozen=True)
class Curve:
    """Points of one line: x rising, y finite; a noisy one is drawn faintly under its running mean."""

    label: str
    x: np.ndarray
    y: np.ndarray
    noisy: bool = False


@dataclass(frozen=True)
class Axis:
    """Linear or logarithmic map from values to units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        values, low, high = np.asarray(values, float), self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values inside the axis, about `count` of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                marks = [m * 10.0**k for k in decades for m in steps if self.low <= m * 10.0**k <= self.high]
                if len(marks) <= count + 2:
                    break
            # Many decades: every second or third of them.
            return marks[:: math.ceil(len(marks) / (count + 2))] if marks else [self.low, self.high]
        raw = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def as_json(self) -> list[float | bool]:
        """What page.js needs to map both ways."""
        return [self.low, self.high, self.start, self.end, self.log]


def short(value: float) -> str:
    """A tick label of a few characters: 0.003, 25, 12k, 1.5M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * (1 if factor > 1e3 else 10):
            return f"{value / factor:.4g}{suffix}"
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def line_chart(curves: Sequence[Curve], *, log: bool, x_name: str, marks: Sequence[float] = ()) -> Markup:
    """Lines over a shared x.

    Args:
        curves: at least one, none of them empty.
        log: logarithmic y. Values that are not positive are left out, such as a loss that is 0 in the first step; more
            than a few of them, and the axis is linear.
        x_name: of the values under the pointer.
        marks: x at which a thin vertical line stands.
    """
    if log:
        positive = [Curve(c.label, c.x[c.y > 0], c.y[c.y > 0], c.noisy) for c in curves]
        log = all(len(p.x) >= MOSTLY * len(c.x) for p, c in zip(positive, curves, strict=True))
        curves = positive if log else curves
    ys = np.concatenate([curve.y for curve in curves])
    xs = np.concatenate([curve.x for curve in curves])
    x = Axis(*_room(xs.min(), xs.max()), LEFT, WIDTH - RIGHT)
    low, high = float(ys.min()), float(ys.max())
    if log:
        margin = max((high / low) ** 0.06, 1.02)
        y = Axis(low / margin, high * margin, HEIGHT - BOTTOM, TOP, log=True)
    else:
        # From zero unless the curve moves by less than a third of its height, which zero would flatten.
        floor = 0.0 if low >= 0 and high - low > low / 3 else low
        y = Axis(*_room(floor, high + 0.06 * (high - floor)), HEIGHT - BOTTOM, TOP)
    drawn = [_grid(x, y)]
    for at in map(float, map(x, marks)):
        drawn.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    data = []
    for index, curve in enumerate(curves):
        colour = f"c{index % COLOURS}"
        window = len(curve.y) // SMOOTHING if curve.noisy else 1
        shown_x, shown_y = curve.x, curve.y
        if window > 1:
            drawn.append(_path(x, y, *_envelope(curve.x, curve.y), f"line {colour} faint"))
            kernel = np.full(window, 1 / window)
            shown_x, shown_y = (np.convolve(values, kernel, mode="valid") for values in (curve.x, curve.y))
        keep = np.unique(np.linspace(0, len(shown_x) - 1, min(len(shown_x), MOST_POINTS)).round().astype(int))
        shown_x, shown_y = shown_x[keep], shown_y[keep]
        if len(shown_x) == 1:  # a line through one point is invisible
            drawn.append(f'<circle class="dot {colour}" cx="{x(shown_x[0]):.1f}" cy="{y(shown_y[0]):.1f}" r="3"/>')
        else:
            drawn.append(_path(x, y, shown_x, shown_y, f"line {colour}"))
        data.append({"label": curve.label, "x": _rounded(shown_x), "y": _rounded(shown_y)})
    legend = ", ".join(curve.label for curve in curves if curve.label)
    return _svg(drawn, legend or x_name, {"name": x_name, "xAxis": x.as_json(), "yAxis": y.as_json(), "curves": data})


def bar_chart(values: Sequence[float], *, name: str, spans: Sequence[tuple[float, float]] | None = None,
              line: Sequence[float] | None = None, edges: tuple[float, float] | None = None) -> Markup:  # fmt: skip
    """Bars from zero, or upright spans with a dot.

    Args:
        values: one a bar.
        name: of a bar, for the pointer: "channel", "value".
        spans: (low, high) of each bar; the value becomes a dot inside it.
        line: a second set of values, drawn as a line over the bars.
        edges: what the left and the right edge stand for, where the bars tile a range; else they are numbered.
    """
    values = np.asarray(values, float)
    ends = values if spans is None else np.asarray(spans, float).ravel()
    others = np.asarray(line if line is not None else [0.0], float)
    low, high = min(0.0, ends.min(), others.min()), max(0.0, ends.max(), others.max())
    margin = 0.06 * (high - low or 1.0)
    y = Axis(low - margin * (low < 0), high + margin, HEIGHT - BOTTOM, TOP)
    x = Axis(*(edges or (-0.5, len(values) - 0.5)), LEFT, WIDTH - RIGHT)
    slot = (WIDTH - RIGHT - LEFT) / len(values)
    wide = slot if edges else min(slot * 0.72, 14)
    centres = LEFT + slot * (np.arange(len(values)) + 0.5)
    drawn = [_grid(x, y, whole=edges is None)]
    for index, (centre, value) in enumerate(zip(centres, values)):
        bottom, top = (min(0.0, value), max(0.0, value)) if spans is None else spans[index]
        drawn.append(
            f'<rect class="bar" x="{centre - wide / 2:.2f}" width="{max(wide - 0.4 * bool(edges), 0.5):.2f}" '
            f'y="{y(top):.2f}" height="{max(float(y(bottom) - y(top)), 0.3):.2f}"/>'
        )
        if spans is not None:
            drawn.append(f'<circle class="dot c0" cx="{centre:.2f}" cy="{y(value):.2f}" r="{min(2.2, wide / 2):.2f}"/>')
    if line is not None:
        drawn.append(_path(lambda _: centres, y, centres, others, "line c2"))
    if low < 0:
        drawn.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    at = np.linspace(*edges, 2 * len(values) + 1)[1::2] if edges else np.arange(len(values))
    data = {"label": "", "x": _rounded(at), "y": _rounded(values)}
    if spans is not None:
        data["note"] = [f"± {(high - low) / 2:.3g}" for low, high in spans]
    return _svg(drawn, name, {"name": name, "xAxis": x.as_json(), "yAxis": y.as_json(), "curves": [data]})


def _room(low: float, high: float) -> tuple[float, float]:
    """The range, widened where it is a point."""
    pad = 0.0 if high > low else max(abs(high) * 0.1, 1e-6)
    return float(low) - pad, float(high) + pad


def _envelope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points themselves, or of many the lowest and the highest of each bin."""
    if len(x) <= 2 * MOST_POINTS:
        return x, y
    xs, ys = [], []
    for part in np.array_split(np.arange(len(x)), MOST_POINTS):
        for index in sorted((part[y[part].argmin()], part[y[part].argmax()])):
            xs.append(x[index])
            ys.append(y[index])
    return np.array(xs), np.array(ys)


def _path(x, y, xs: np.ndarray, ys: np.ndarray, kind: str) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(xs), y(ys)))
    return f'<polyline class="{kind}" points="{points}"/>'


def _grid(x: Axis, y: Axis, *, whole: bool = False) -> str:
    parts = []
    for tick in y.ticks(4):
        at = float(y(tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x.ticks(5):
        if whole and tick % 1:
            continue
        parts.append(
            f'<text class="tick" x="{float(x(tick)):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(tick)}</text>'
        )
    return "".join(parts)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _svg(drawn: list[str], label: str, data: dict) -> Markup:
    # Every piece is made of numbers and class names; what comes from a run is escaped here.
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-chart="{escape(json.dumps(data, separators=(",", ":")))}">{"".join(drawn)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden/></svg>'
    )
