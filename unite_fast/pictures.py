"""Pictures of a run: reconstruction and sample sheets, comparisons, training curves; PNG, written atomically."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.evaluation.reconstruction import unit_images
from unite_fast.records import losses, read_metrics
from unite_fast.replacing import replacing_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE = 96  # images smaller than this are enlarged by a whole factor: 32×32 is shown at 96×96
GAP = 2  # pixels between neighbouring images
MARGIN = 16
FONT_SIZE = 15
LONGEST_LABEL = 18  # characters of a class name on a sheet
PAPER, INK = (255, 255, 255), (75, 75, 80)


def spread(length: int, count: int) -> list[int]:
    """At most `count` positions of `length`, evenly spread, the first and the last among them."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture as PNG.

    Raises:
        UserError: a path that cannot be written.
    """
    with replacing_file(Path(path), "picture") as temporary:
        image.save(temporary, format="PNG")


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one image [3, H, W], uint8 or floating point in [0, 1], pixel for pixel.

    Raises:
        UserError: wrong shape, NaN values, or a path that cannot be written.
    """
    save_image(Image.fromarray(_pixels(image[None], "image")[0]), path)


def comparison(original: Tensor, reconstruction: Tensor, path: str | Path) -> None:
    """Write an original and its reconstruction, each [3, H, W], side by side under their captions.

    Raises:
        UserError: shapes that differ, NaN values, or a path that cannot be written.
    """
    _same_shape(original, reconstruction)
    captions = ("original", "reconstruction")
    pair = [
        _enlarge(_pixels(image[None], name)[0])
        for image, name in zip((original, reconstruction), captions, strict=True)
    ]
    height, width = pair[0].shape[:2]
    font = label_font()
    # A caption may be wider than a tiny image; the column is as wide as the wider of the two.
    column = max(width, *(math.ceil(font.getlength(caption)) for caption in captions))
    gap = 4 * GAP
    top = MARGIN + FONT_SIZE + MARGIN // 2
    sheet = Image.new("RGB", (2 * MARGIN + 2 * column + gap, top + height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (tile, caption) in enumerate(zip(pair, captions, strict=True)):
        centre = MARGIN + index * (column + gap) + column / 2
        draw.text((centre, MARGIN + FONT_SIZE / 2), caption, INK, font, anchor="mm")
        sheet.paste(Image.fromarray(tile), (round(centre - width / 2), top))
    save_image(sheet, path)


def reconstruction_sheet(
    originals: Tensor, reconstructions: Tensor, path: str | Path, *, columns: int = 8, label: str = "original"
) -> None:
    """Write originals above their reconstructions, each [N, 3, H, W], columns pairs in a row; label says of what.

    Raises:
        UserError: shapes that differ, NaN images (says how many), or a path that cannot be written.
    """
    _same_shape(originals, reconstructions)
    above, below = _pixels(originals, "originals"), _pixels(reconstructions, "reconstructions")
    rows: list[tuple[str, list[np.ndarray], int]] = []
    for first in range(0, len(above), columns):
        last_row = first + columns >= len(above)
        rows.append((label, list(above[first : first + columns]), GAP))
        rows.append(("reconstruction", list(below[first : first + columns]), 0 if last_row else 6 * GAP))
    save_image(_sheet(rows), path)


def sample_sheet(
    images: Tensor, classes: Sequence[int], class_names: Sequence[str] | None, columns: int, path: str | Path
) -> None:
    """Write generated images class by class, one row a class, its name at the left.

    Args:
        images: [len(classes)·columns, 3, H, W], the first class's images first.
        classes: class index of each row.
        class_names: name of every class of the data set, by class index; where it is None, or no font of this machine
            has all their letters, the index labels the rows.
        columns: images a row.
        path: the PNG file; missing folders are made.

    Raises:
        UserError: an image count other than len(classes)·columns, a class without a name, NaN images, or a path that
            cannot be written.
    """
    if len(images) != len(classes) * columns:
        raise UserError(
            f"a sample sheet of {len(classes)} classes by {columns} columns needs {len(classes) * columns} images, "
            f"got {len(images)}"
        )
    unnamed = [c for c in classes if class_names is not None and not 0 <= c < len(class_names)]
    if unnamed:
        raise UserError(f"class {unnamed[0]} has no name: the data set names {len(class_names)} classes, from 0 on")
    pixels = _pixels(images, "samples")
    names = [str(c) for c in classes] if class_names is None else [str(class_names[c]) for c in classes]
    if _font_of(names) is None:
        names = [str(c) for c in classes]
    rows = [(name, list(pixels[row * columns : (row + 1) * columns]), GAP) for row, name in enumerate(names)]
    save_image(_sheet(rows), path)


def trajectory_sheet(images: Tensor, names: Sequence[str], times: Sequence[float], path: str | Path) -> None:
    """Write images along time, one row an image, its name at the left, the times above.

    Args:
        images: [T, B, 3, H, W]. names: B. times: T.
        path: the PNG file; missing folders are made.

    Raises:
        UserError: NaN images, or a path that cannot be written.
    """
    rows = [(name, list(_pixels(row, "trajectories")), GAP) for name, row in zip(names, images.unbind(1), strict=True)]
    save_image(_sheet(rows, [f"t = {t:.2f}" for t in times]), path)


# Panel title, axis scale and key of what is drawn beside the losses.
PANELS = (
    ("Gradient norm", "log", "grad_norm"),
    ("Learning rate", "linear", "lr"),
    ("Latents: standard deviation across the batch", "linear", "z0_std"),
    ("Latents: effective rank", "linear", "z0_rank"),
    ("Images per second", "linear", "images_per_second"),
    ("Molecules per second", "linear", "molecules_per_second"),
)
SMOOTH = ("lr", "z0_std", "z0_rank", "data_wait")  # drawn as they are, without a running mean
MOSTLY = 0.9  # share of positive values from which a logarithmic axis leaves out the rest
COLOURS = ("#1f2937", "#2563eb", "#059669", "#d97706", "#9333ea", "#dc2626")


def curve_panels(records: Sequence[dict[str, Any]]) -> list[tuple[str, str, dict[str, str]]]:
    """Title, axis scale, and the keys drawn with their legend, of every panel: whatever losses the records hold, then
    `PANELS`."""
    names = losses({key: None for record in records for key in record})
    return [("Losses", "log", names), *((title, scale, {key: ""}) for title, scale, key in PANELS)]


def loss_curves(metrics_path: str | Path, path: str | Path) -> None:
    """Draw the curves of a `metrics.jsonl`: losses, gradient norm, learning rate, latent statistics, images/s.

    A panel whose keys no record has is left out, and so are the few values that a logarithmic axis cannot show; a curve
    of many points is drawn faintly with its running mean on top.

    Raises:
        UserError: a metrics file without records, or a path that cannot be written.
    """
    # Matplotlib takes half a second to import: only those who draw curves pay. Figure without pyplot keeps no global
    # state and draws with Agg, with or without a display.
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    panels = []
    for title, scale, keys in curve_panels(records):
        curves = [(key, legend, *_series(records, key)) for key, legend in keys.items()]
        curves = [curve for curve in curves if len(curve[2])]
        if curves:
            panels.append((title, scale, curves))
    if not panels:
        raise UserError(f"{metrics_path} has records but none of the keys that curves are drawn from")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    for index, (title, scale, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, title, scale, curves)
        if index + columns >= len(panels):
            axes.set_xlabel("optimizer step", color="#555555", fontsize=9)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a Matplotlib figure as PNG.

    Raises:
        UserError: a path that cannot be written.
    """
    with replacing_file(Path(path), "picture") as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes: Any, title: str, scale: str, curves: list[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for (key, legend, steps, values), colour in zip(curves, itertools.cycle(COLOURS), strict=False):
        marker = "o" if len(steps) == 1 else None  # a line through one point is invisible
        window = 1 if key in SMOOTH else len(values) // 40
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            steps, values = _running_mean(steps, window), _running_mean(values, window)
        axes.plot(steps, values, color=colour, linewidth=1.6, label=legend, marker=marker)
    # As on the page of the report: the flow loss of the first step is 0.
    if scale == "log" and all((values > 0).mean() >= MOSTLY for *_, values in curves):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # one decade or less still gets three marks
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0, *(values.min() for *_, values in curves)))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    style_axes(axes, title)


def style_axes(axes: Any, title: str) -> None:
    """Title at the left, a light grid, the axis below alone."""
    axes.set_title(title, loc="left", fontsize=10, color="#222222")
    axes.grid(True, color="#e5e7eb", linewidth=0.7)
    axes.tick_params(labelsize=8, colors="#555555", length=0, which="both")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color("#9ca3af")


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that hold a finite number under key."""
    points = [
        (record["step"], value)
        for record in records
        if isinstance(value := record.get(key), int | float) and math.isfinite(value)
    ]
    return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points], dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _sheet(rows: list[tuple[str, list[np.ndarray], int]], captions: Sequence[str] = ()) -> Image.Image:
    """Rows of (label, images [H, W, 3] uint8, gap below) on one page, labels in a column of their own, captions above
    the columns."""
    labels = [_shorten(label) for label, _, _ in rows]
    font = _font_of(labels) or label_font()
    label_width = max(math.ceil(font.getlength(label)) for label in labels)
    height, width = _enlarge(rows[0][1][0]).shape[:2]
    columns = max(len(images) for _, images, _ in rows)
    left = MARGIN + label_width + 10
    top = MARGIN + (FONT_SIZE + MARGIN // 2 if captions else 0)
    page = (
        left + columns * (width + GAP) - GAP + MARGIN,
        top + sum(height + gap for _, _, gap in rows) + MARGIN,
    )
    sheet = Image.new("RGB", page, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.text((left + column * (width + GAP) + width / 2, MARGIN + FONT_SIZE / 2), caption, INK, font, anchor="mm")
    for label, (_, images, gap) in zip(labels, rows, strict=True):
        draw.text((left - 10, top + height / 2), label, INK, font, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(_enlarge(image)), (left + column * (width + GAP), top))
        top += height + gap
    return sheet


def _shorten(label: str) -> str:
    """One line of at most LONGEST_LABEL characters; folder names may hold line breaks and undecodable bytes."""
    label = " ".join(label.encode("utf-8", "replace").decode().split())
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


@functools.cache
def label_font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Matplotlib's own font: Pillow's has English letters alone, no Å and no Cyrillic or Greek.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _font_of(labels: Sequence[str]) -> ImageFont.FreeTypeFont | None:
    """The font of labels, or where it lacks their letters, such as Chinese ones, any of this machine; None without."""
    return _font_with(frozenset("".join(map(_shorten, labels))))


@functools.cache  # hundreds of fonts may be looked at
def _font_with(letters: frozenset[str]) -> ImageFont.FreeTypeFont | None:
    from matplotlib.ft2font import FT2Font

    wanted, own = set(map(ord, letters)), label_font()
    if wanted <= FT2Font(own.path).get_charmap().keys():
        return own
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):
        try:
            if wanted <= FT2Font(path).get_charmap().keys():
                return ImageFont.truetype(path, FONT_SIZE)
        except (OSError, RuntimeError):  # damaged, or of pictures in one size
            continue
    return None


def _enlarge(image: np.ndarray) -> np.ndarray:
    """[H, W, 3], every pixel repeated a whole number of times until the smaller side reaches TILE."""
    factor = max(1, math.ceil(TILE / min(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _pixels(images: Tensor, what: str) -> np.ndarray:
    """[N, 3, H, W] -> [N, H, W, 3] uint8, rounded to the nearest level."""
    return unit_images(images, what).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _same_shape(originals: Tensor, reconstructions: Tensor) -> None:
    if originals.shape != reconstructions.shape:
        raise UserError(
            f"originals {list(originals.shape)} and reconstructions {list(reconstructions.shape)} must have one shape"
        )
