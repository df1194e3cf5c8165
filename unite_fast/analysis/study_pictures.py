"""The pictures of a study: alignment by block and block by block, cosines, entropies, probes, trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from unite_fast.analysis.entropy import BINS, GROUPS, KINDS
from unite_fast.analysis.study import Study
from unite_fast.pictures import COLOURS, save_figure, spread, style_axes, trajectory_sheet

MATRICES = 4  # times whose block-by-block matrices are drawn
MEASURES = {"cka": "CKA", "cknna": "CKNNA"}
GREY = "#9ca3af"
PALETTE = ("#2563eb", "#059669", "#d97706", "#db2777", "#7c3aed", "#1f2937")
BY_TIME = LinearSegmentedColormap.from_list("noise to clean", ["#d1d5db", "#60a5fa", "#1e3a8a"])
SMALL = dict(fontsize=9, color="#555555")


def draw_all(result: Study, folder: Path) -> None:
    """Write every picture of a study into a folder.

    Raises:
        UserError: a folder that cannot be written, images with NaN.
    """
    alignment_curves(result, folder / "alignment.png")
    alignment_matrices(result, folder / "alignment_matrix.png")
    cosine_curves(result, folder / "cosine.png")
    entropy_by_depth(result, folder / "entropy.png")
    trajectory_sheet(result.trajectory.images, result.rows, result.trajectory.times, folder / "trajectories.png")
    if result.probing is not None:
        probe_accuracies(result, folder / "probing.png")


def alignment_curves(result: Study, path: Path) -> None:
    """CKA and CKNNA of each block with itself, a line a time."""
    figure = _figure(9.6, 3.8)
    times = result.options.times
    for place, (name, label) in enumerate(MEASURES.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        same = np.diagonal(getattr(result.alignment, name), axis1=1, axis2=2)  # [T, L]
        depths = np.arange(same.shape[1])
        for t, line in zip(times, same, strict=True):
            axes.plot(depths, line, color=BY_TIME(t), marker="o", markersize=3.5, linewidth=1.5)
        axes.set_ylim(min(0.0, 1.05 * float(np.nan_to_num(same).min())), 1.02)
        _blocks(axes, len(depths))
        style_axes(axes, f"{label} of tokenization and denoising")
    scale = ScalarMappable(Normalize(0, 1), BY_TIME)
    bar = figure.colorbar(scale, ax=figure.axes, pad=0.01, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("t of the noised latents (1: clean)", **SMALL)
    bar.ax.tick_params(labelsize=8, colors="#555555", length=0)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def alignment_matrices(result: Study, path: Path) -> None:
    """CKA (above) and CKNNA (below) of every block with every other, at some of the times."""
    times = result.options.times
    shown = spread(len(times), MATRICES)
    figure = _figure(2.6 * len(shown) + 0.9, 5.4)
    grid = figure.subplots(2, len(shown), squeeze=False)
    for row, (name, label) in zip(grid, MEASURES.items(), strict=True):
        for axes, place in zip(row, shown, strict=True):
            image = axes.imshow(getattr(result.alignment, name)[place], vmin=0, vmax=1, cmap="viridis", origin="lower")
            style_axes(axes, f"{label}, t = {times[place]:g}")
            axes.grid(False)
            _values(axes, getattr(result.alignment, name)[place])
            _blocks(axes, image.get_array().shape[1], "denoising block")
            axes.set_yticks(axes.get_xticks())
        row[0].set_ylabel("tokenization block", **SMALL)
    bar = figure.colorbar(image, ax=grid, pad=0.01, shrink=0.7)
    bar.ax.tick_params(labelsize=8, colors="#555555", length=0)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def cosine_curves(result: Study, path: Path) -> None:
    """Cosine with z0 of what denoising predicts, against t."""
    figure = _figure(5.6, 3.8)
    axes = figure.add_subplot()
    times, found = result.options.times, result.cosine
    style = dict(marker="o", markersize=3.5, linewidth=1.6)
    if found.labelled is not None:
        axes.plot(times, found.labelled, color=COLOURS[2], label="prediction ẑ0, under the class", **style)
    axes.plot(times, found.unlabelled, color=COLOURS[1], label="prediction ẑ0, without a label", **style)
    axes.plot(times, found.noised, color=GREY, linestyle="--", linewidth=1.4, label="z_t, from which it is predicted")
    axes.axhline(found.mean_latent, color=COLOURS[3], linestyle=":", linewidth=1.4, label="mean latent of all images")
    axes.set_ylim(top=1.02)
    axes.set_xlabel("t (0: noise, 1: clean)", **SMALL)
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes, "Cosine similarity with z0")
    save_figure(figure, path)


def entropy_by_depth(result: Study, path: Path) -> None:
    """Bits of every tensor by the block that reads it, one panel a group; an encoder of its own has open marks."""
    figure = _figure(9.6, 3.8)
    depth = 1 + max(one.depth for one in result.entropy)
    first = None
    for place, group in enumerate(GROUPS, start=1):
        axes = first = figure.add_subplot(1, 2, place, sharex=first, sharey=first)
        members = [one for one in result.entropy if one.group == group]
        kinds = [kind for kind in KINDS if any(one.kind == kind for one in members)]
        for kind, colour in zip(kinds, PALETTE, strict=False):
            for encoder in dict.fromkeys(one.encoder for one in members):
                line = [(one.depth, one.bits) for one in members if (one.kind, one.encoder) == (kind, encoder)]
                own = encoder == "denoiser"
                axes.plot(
                    *zip(*line, strict=True), color=colour, marker="o", markersize=4, linewidth=1.4,
                    fillstyle="none" if own else "full", linestyle="--" if own else "-",
                    label=f"{kind}, denoiser" if own else kind,
                )  # fmt: skip
        _blocks(axes, depth, "block", last="final")
        axes.set_ylim(0, np.log2(BINS) * 1.02)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
        style_axes(axes, f"Entropy of weights in bits, {group}")
    save_figure(figure, path)


def probe_accuracies(result: Study, path: Path) -> None:
    """Held-out accuracy by block, beside that of the latents, the pixels and chance."""
    figure = _figure(5.6, 3.8)
    axes = figure.add_subplot()
    found = result.probing
    axes.plot(range(len(found.blocks)), found.blocks, color=COLOURS[1], marker="o", markersize=4, linewidth=1.6,
              label="mean register token of a block")  # fmt: skip
    for value, name, colour in (
        (found.latents, "latents z0", COLOURS[2]), (found.pixels, "pixels", COLOURS[3]), (found.chance, "chance", GREY),
    ):  # fmt: skip
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.4, label=f"{name}: {value:.1%}")
    axes.set_ylim(0, 1.02)
    _blocks(axes, len(found.blocks))
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes, "Linear probes in tokenization, held-out accuracy")
    save_figure(figure, path)


def _values(axes: Any, matrix: np.ndarray) -> None:
    """Numbers on a matrix of few blocks."""
    if len(matrix) > 6:
        return
    for (row, column), value in np.ndenumerate(matrix):
        ink = "white" if value < 0.6 else "#222222"
        axes.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=7, color=ink)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _blocks(axes: Any, count: int, label: str = "block", last: str | None = None) -> None:
    """Ticks of whole blocks; the place behind the last one has a name where it is given."""
    step = max(1, count // 8)
    ticks = list(range(0, count, step))
    names = [str(tick) for tick in ticks]
    if last is not None:
        ticks = [tick for tick in ticks if tick <= count - 1 - step] + [count - 1]
        names = [str(tick) for tick in ticks[:-1]] + [last]
    axes.set_xticks(ticks, names)
    axes.set_xlabel(label, **SMALL)
