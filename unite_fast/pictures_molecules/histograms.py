"""Histograms of generated molecules against the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.molecules.molecule_set import SYMBOLS, MoleculeSet
from unite_fast.evaluation.molecules import atom_histogram, bond_lengths, element_histogram
from unite_fast.pictures import save_figure

DATA, MADE = "#9ca3af", "#2563eb"
PAIRS = 6  # panels of bond lengths, the data's most frequent pairs
BIN = 0.01  # Å


def histograms(generated: MoleculeSet, data: MoleculeSet, path: str | Path) -> None:
    """Draw atoms a molecule, elements, and the lengths of the most frequent bonds, each over the data's.

    Bonds are those of `evaluation.molecules.bond_lengths`; their titles give the Wasserstein-1 distance W₁ in Å.

    Args:
        generated: molecules of a model.
        data: held-out or training molecules.
        path: the PNG file; missing folders are made.

    Raises:
        UserError: a path that cannot be written.
    """
    # Matplotlib takes half a second to import: only those who draw pay.
    from matplotlib.figure import Figure

    made, real = bond_lengths(generated), bond_lengths(data)
    pairs = sorted(real, key=lambda pair: -len(real[pair]))[:PAIRS]
    rows = 1 + math.ceil(len(pairs) / 3)
    figure = Figure(figsize=(13, 3.1 * rows), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.add_gridspec(rows, 3)
    _bars(figure.add_subplot(grid[0, :2]), "Atoms in a molecule", atom_histogram(generated), atom_histogram(data))
    elements = element_histogram(generated), element_histogram(data)
    _bars(figure.add_subplot(grid[0, 2]), "Elements", *elements, names=SYMBOLS)
    for place, pair in enumerate(pairs):
        axes = figure.add_subplot(grid[1 + place // 3, place % 3])
        _lengths(axes, pair, made.get(pair, np.empty(0)), real[pair])
    save_figure(figure, path)


def _bars(
    axes: Any, title: str, made: NDArray[np.int64], real: NDArray[np.int64], names: tuple[str, ...] | None = None
) -> None:
    shown = np.arange(len(real)) if names else np.arange(*_occupied(made + real))
    axes.bar(shown, real[shown] / real.sum(), 0.86, color=DATA, alpha=0.55, label="data")
    axes.bar(shown, made[shown] / made.sum(), 0.46, color=MADE, label="generated")
    if names:
        axes.set_xticks(shown, names)
    axes.set_ylabel("share", color="#555555", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    _style(axes, title)


def _occupied(histogram: NDArray[np.int64]) -> tuple[int, int]:
    places = np.flatnonzero(histogram)
    return int(places[0]), int(places[-1]) + 1


def _lengths(axes: Any, pair: str, made: NDArray[np.float64], real: NDArray[np.float64]) -> None:
    low, high = np.quantile(real, (0.001, 0.999)) + (-0.08, 0.08)
    bins = np.arange(low, high + BIN, BIN)
    axes.hist(real, bins, weights=np.full(len(real), 1 / len(real)), color=DATA, alpha=0.55, label="data")
    title = f"{pair} bonds, Å: none generated"
    if len(made):
        weights = np.full(len(made), 1 / len(made))
        axes.hist(made, bins, weights=weights, color=MADE, histtype="step", linewidth=1.5, label="generated")
        outside = np.mean((made < bins[0]) | (made > bins[-1]))
        from scipy.stats import wasserstein_distance

        title = f"{pair} bonds, Å: W₁ = {wasserstein_distance(made, real):.3f}"
        if outside >= 0.005:
            title += f", {outside:.0%} outside the picture"
    axes.set_ylabel("share", color="#555555", fontsize=9)
    _style(axes, title)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color="#222222")
    axes.grid(True, axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors="#555555", length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color("#9ca3af")
