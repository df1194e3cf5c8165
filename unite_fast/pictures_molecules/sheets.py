"""Sheets of drawn molecules: what was generated, with SMILES; what was reconstructed, beside its original."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rdkit import Chem
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D

from unite_fast.data.molecules.molecule_set import MoleculeSet
from unite_fast.data.molecules.perception import Perceived
from unite_fast.errors import UserError
from unite_fast.evaluation.edm import bond_orders
from unite_fast.evaluation.molecules import Reconstruction, align
from unite_fast.pictures import label_font, save_image

WIDTH, HEIGHT = 220, 160  # of a drawing, pixels
CAPTION = 40  # two lines of text below it
GAP, MARGIN = 12, 20
PAPER, INK, FAINT = (255, 255, 255), (45, 45, 50), (130, 130, 138)
GOOD, ODD, BAD = (21, 128, 61), (180, 83, 9), (185, 28, 28)
SMOOTH = 3  # overlays are drawn three times as large and shrunk: PIL's lines have no smooth edges
ELEMENT_COLOURS = ((0, 0, 0), (165, 165, 172), (55, 60, 68), (53, 87, 214), (216, 51, 42), (38, 150, 82))


def molecule_sheet(
    molecules: MoleculeSet, perceived: Sequence[Perceived], path: str | Path, *, title: str = "", columns: int = 6
) -> None:
    """Write 2-D drawings of the perceived molecules with their SMILES, in order, nothing left out.

    A molecule of several fragments is marked in amber, one without valid bonds in red, drawn as the points it is.

    Args:
        molecules: as many as are to be shown.
        perceived: what perception found for each.
        path: the PNG file; missing folders are made.
        title: a line above the sheet.
        columns: drawings a row.

    Raises:
        UserError: another number of perceptions than of molecules, no molecule, or a path that cannot be written.
    """
    if len(molecules) != len(perceived) or not len(molecules):
        raise UserError(f"a sheet needs molecules and a perception of each, got {len(molecules)} and {len(perceived)}")
    tiles = []
    for index, found in enumerate(perceived):
        if not found.valid:
            tiles.append(_tile(_overlay([molecules.atoms(index)]), "no valid molecule", found.reason, BAD))
        elif not found.connected:
            tiles.append(_tile(_drawing(found), found.smiles, f"{found.fragments} fragments", ODD))
        else:
            tiles.append(_tile(_drawing(found), found.smiles, "", GOOD))
    save_image(_grid(tiles, columns, title), path)


def reconstruction_sheet(
    originals: MoleculeSet,
    original_perceived: Sequence[Perceived],
    reconstructions: MoleculeSet,
    verdict: Reconstruction,
    path: str | Path,
    *,
    count: int = 8,
    title: str = "",
) -> None:
    """Write the first `count` originals beside their reconstructions and both laid over each other, with the RMSD.

    Args:
        originals: held-out molecules.
        original_perceived: what perception found for each.
        reconstructions: in the same order.
        verdict: of `MoleculeJudge.reconstruction`.
        path: the PNG file; missing folders are made.
        count: rows.
        title: a line above the sheet.

    Raises:
        UserError: a path that cannot be written.
    """
    tiles = []
    for index in range(min(count, len(originals))):
        before, after = original_perceived[index], verdict.perceived[index]
        matches = bool(verdict.match[index])
        elements, points = originals.atoms(index)
        made_elements, made = reconstructions.atoms(index)
        both = [(elements, points), (made_elements, align(made, points))]
        same = "same InChI" if matches else "not the same molecule"
        tiles += [
            _tile(_drawing(before) if before.valid else _overlay(both[:1]), before.smiles, "original", FAINT),
            _tile(
                _drawing(after) if after.valid else _overlay(both[1:]),
                after.smiles or "no valid molecule", f"reconstruction: {same}", GOOD if matches else BAD,
            ),
            _tile(_overlay(both), f"RMSD {verdict.rmsd[index]:.3f} Å", "original in grey", FAINT),
        ]  # fmt: skip
    save_image(_grid(tiles, 3 if count <= 4 else 6, title), path)


def _drawing(perceived: Perceived) -> Image.Image:
    """The molecule as a chemist draws it."""
    molecule = Chem.MolFromSmiles(perceived.smiles, sanitize=False)
    molecule.UpdatePropertyCache(strict=False)
    Chem.SanitizeMol(molecule, catchErrors=True)  # what cannot be sanitised again is drawn as it is
    rdDepictor.Compute2DCoords(molecule)
    drawer = rdMolDraw2D.MolDraw2DCairo(WIDTH, HEIGHT)
    options = drawer.drawOptions()
    options.prepareMolsBeforeDrawing = False
    options.fixedBondLength = 26
    options.padding = 0.08
    options.annotationFontScale = 0.8
    drawer.DrawMolecule(rdMolDraw2D.PrepareMolForDrawing(molecule, kekulize=True, addChiralHs=False))
    drawer.FinishDrawing()
    return Image.open(io.BytesIO(drawer.GetDrawingText())).convert("RGB")


def _overlay(layers: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]]]) -> Image.Image:
    """Molecules in one frame, seen along the first one's shortest axis; of several the first is grey."""
    image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), PAPER)
    draw = ImageDraw.Draw(image)
    axes = np.linalg.svd(layers[0][1] - layers[0][1].mean(0), full_matrices=True)[2]
    shown = [points @ axes.T[:, :2] for _, points in layers]
    every = np.concatenate(shown)
    extent = np.maximum(np.ptp(every, axis=0), 1e-3) + 1.0
    scale = min(WIDTH / extent[0], HEIGHT / extent[1], 26) * SMOOTH  # 26 pixels an Å, as in the drawings
    middle = (every.max(0) + every.min(0)) / 2
    for layer, (elements, points) in enumerate(layers):
        ghost = layer == 0 and len(layers) > 1
        flat = (shown[layer] - middle) * scale * [1, -1] + [WIDTH * SMOOTH / 2, HEIGHT * SMOOTH / 2]
        orders = bond_orders(elements[None], points[None])[0]
        for first, second in np.argwhere(np.triu(orders)):
            line = [tuple(flat[first]), tuple(flat[second])]
            draw.line(line, (215, 215, 220) if ghost else (120, 124, 132), (5 if ghost else 2) * SMOOTH)
        for code, (x, y) in zip(elements, flat, strict=True):
            radius = (3.0 if code == 1 else 4.5) * SMOOTH * (1.4 if ghost else 1)
            colour = (205, 205, 210) if ghost else ELEMENT_COLOURS[code]
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _tile(drawing: Image.Image, first: str, second: str, colour: tuple[int, int, int]) -> Image.Image:
    tile = Image.new("RGB", (WIDTH, HEIGHT + CAPTION), PAPER)
    tile.paste(drawing, (0, 0))
    draw = ImageDraw.Draw(tile)
    draw.text((WIDTH / 2, HEIGHT + 9), _fitted(first, label_font(12)), INK, label_font(12), anchor="mm")
    draw.text((WIDTH / 2, HEIGHT + 27), _fitted(second, label_font(10)), colour, label_font(10), anchor="mm")
    draw.line((WIDTH / 2 - 16, HEIGHT + CAPTION - 2, WIDTH / 2 + 16, HEIGHT + CAPTION - 2), colour, 2)
    return tile


def _fitted(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut with an ellipsis where it is wider than a tile."""
    if font.getlength(text) <= WIDTH:
        return text
    while text and font.getlength(text + "…") > WIDTH:
        text = text[:-1]
    return text + "…"


def _grid(tiles: Sequence[Image.Image], columns: int, title: str) -> Image.Image:
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    top = MARGIN + (30 if title else 0)
    across, down = WIDTH + GAP, HEIGHT + CAPTION + GAP
    sheet = Image.new("RGB", (2 * MARGIN + columns * across - GAP, top + MARGIN + rows * down - GAP), PAPER)
    if title:
        ImageDraw.Draw(sheet).text((MARGIN, MARGIN), title, INK, label_font(16))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (MARGIN + index % columns * across, top + index // columns * down))
    return sheet
