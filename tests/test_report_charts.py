"""The report's charts and tiles: where lines go, awkward values, ticks, and how large a page of pictures becomes."""

import re

import numpy as np
import pytest

from unite_fast.report.charts import Axis, Curve, bar_chart, line_chart, short
from unite_fast.report.tiles import BUDGET, Tiles


def _points(chart, kind):
    return [
        np.array([[float(v) for v in pair.split(",")] for pair in points.split()])
        for points in re.findall(rf'<polyline class="{kind}" points="([^"]*)"', chart)
    ]


def test_a_line_goes_where_its_values_are():
    x, y = np.arange(1.0, 11), np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512.0])
    (line,) = _points(line_chart([Curve("", x, y)], log=True, x_name="step"), "line c0")
    assert np.allclose(np.diff(line[:, 0]), np.diff(line[:, 0])[0], atol=0.11)
    assert np.allclose(np.diff(line[:, 1]), np.diff(line[:, 1])[0], atol=0.11)  # a power is straight on log paper
    assert line[-1, 1] < line[0, 1]  # up is smaller in SVG
    (line,) = _points(line_chart([Curve("", x, y)], log=False, x_name="step"), "line c0")
    rise = -np.diff(line[:, 1])
    assert np.allclose(rise[1:] / rise[:-1], 2, rtol=0.2)


def test_charts_of_awkward_values():
    single = line_chart([Curve("one", np.array([5.0]), np.array([0.0]))], log=True, x_name="step")
    assert "<circle" in single and "nan" not in single
    flat = line_chart([Curve("", np.arange(9.0), np.full(9, -3.0))], log=True, x_name="step")
    assert "nan" not in flat and "inf" not in flat
    many = np.random.default_rng(0).lognormal(size=200_000)
    chart = line_chart([Curve("", np.arange(200_000.0), many, noisy=True)], log=True, x_name="step")
    assert len(chart) < 40_000
    assert "nan" not in bar_chart(np.zeros(3), name="channel")
    assert [short(v) for v in (0, 0.004, 9.5e-4, 250, 1000, 25_000, 1.5e6)] == [
        "0", "0.004", "9.5e-4", "250", "1000", "25k", "1.5M",
    ]  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("low,high", [(0.01, 0.013), (1, 9.5), (1e-5, 4e4), (3, 3.3e9)])
def test_ticks_lie_on_the_axis(low, high, log):
    ticks = Axis(low, high, 0, 100, log).ticks(4)
    assert 1 <= len(ticks) <= 8 and all(low * 0.999 - 1e-4 <= tick <= high * 1.001 for tick in ticks)


def test_hundreds_of_large_pictures_stay_within_five_megabytes():
    images = [np.random.default_rng(k).integers(0, 256, (256, 256, 3), np.uint8) for k in range(8)] * 30
    tiles = Tiles(images)
    total = sum(len(tiles(image)) for image in images[:8]) * 30
    assert total < BUDGET * 4 / 3 * 1.1 < 5e6
    assert tiles(images[0]).startswith("data:image/jpeg") and tiles.side < 256
