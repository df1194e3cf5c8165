"""Guidance search on known valleys: it finds the bottom with few measurements, and every measurement is on record."""

from __future__ import annotations

import pytest
from PIL import Image

from unite_fast.evaluation.search import GuidanceSearch, search_curve

BASE = {"guidance": 1.0, "interval": (0.1, 1.0), "solver": "heun"}


def valley(w=2.37, low=0.3, high=1.0):
    """Lowest at the given settings; the less guidance, the less depends on its interval."""

    def score(settings):
        a, b = settings["interval"]
        assert settings["solver"] == "heun"
        away = 6 * (a - low) ** 2 + 4 * (b - high) ** 2
        return 2 + (settings["guidance"] - w) ** 2 + away * (settings["guidance"] - 1) ** 2

    return score


@pytest.mark.parametrize(("w", "low", "high"), [(2.37, 0.3, 1.0), (1.25, 0.1, 0.8), (3.9, 0.0, 1.0)])
def test_the_bottom_is_found(w, low, high):
    search = GuidanceSearch(valley(w, low, high), BASE)
    best = search.adapt()
    assert best["guidance"] == pytest.approx(w, abs=0.06)
    assert best["interval"] == pytest.approx((low, high), abs=0.01) and best["solver"] == "heun"
    assert len(search.rows) <= 26
    points = [(row["guidance"], row["low"], row["high"]) for row in search.rows]
    assert len(set(points)) == len(points), "no point is measured twice"
    assert min(row["score"] for row in search.rows) == search._known[best["guidance"], *best["interval"]]


def test_guidance_that_only_hurts_is_left_out_early():
    search = GuidanceSearch(valley(w=0.5), BASE)
    best = search.adapt()
    assert best["guidance"] == pytest.approx(1.0, abs=0.05)
    assert max(row["guidance"] for row in search.rows) <= 2.2, "two rises in a row end the coarse sweep"


def test_one_rise_is_noise():
    search = GuidanceSearch(lambda s: (s["guidance"] - 3) ** 2 + 4 * (abs(s["guidance"] - 1.6) < 0.3), BASE)
    assert search.adapt()["guidance"] == pytest.approx(3, abs=0.06)


def test_a_sweep_measures_what_it_is_given():
    told = []
    search = GuidanceSearch(valley(), BASE, told=told.append)
    best = search.sweep([1.0, 2.0, 3.0])
    assert best == BASE | {"guidance": 2.0}
    assert [row["guidance"] for row in search.rows] == [1.0, 2.0, 3.0] and told == search.rows


def test_the_curve_is_drawn(tmp_path):
    search = GuidanceSearch(valley(), BASE)
    search.adapt()
    search_curve(search.rows, "gfid of 5000 images", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 20)) > 20
