"""Pictures of molecules: what stands where, what is marked as broken, and a page that needs nothing else."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("rdkit")

from unite_fast.data.molecules.molecule_set import from_arrays
from unite_fast.data.molecules.perception import failed
from unite_fast.data.molecules.sample import sample_set
from unite_fast.errors import UserError
from unite_fast.evaluation.molecules import MoleculeJudge
from unite_fast.pictures_molecules import (
    Card,
    Section,
    generated_section,
    histograms,
    molecule_page,
    molecule_sheet,
    reconstruction_section,
    reconstruction_sheet,
    sheets,
)


@pytest.fixture(scope="module")
def run():
    """A judge of five held-out molecules, reconstructions with one crushed, and their verdict."""
    molecules = sample_set(20, 0, processes=1)
    judge = MoleculeJudge(molecules.select(range(15)), molecules.select(range(15, 20)), processes=1)
    positions = judge.held_out.positions.copy()
    positions[2] *= 0.2
    made = from_arrays(judge.held_out.elements, positions, source="made")
    return judge, made, judge.reconstruction(made)


def _read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def _tile(picture, row, column, top):
    y = top + row * (sheets.HEIGHT + sheets.CAPTION + sheets.GAP)
    x = sheets.MARGIN + column * (sheets.WIDTH + sheets.GAP)
    return picture[y : y + sheets.HEIGHT + sheets.CAPTION, x : x + sheets.WIDTH]


def _has(tile, colour):
    return bool((tile == colour).all(-1).any())


def test_sheet_shows_every_molecule_and_marks_the_broken(run, tmp_path):
    judge, made, verdict = run
    path = tmp_path / "new" / "sheet.png"
    molecule_sheet(made, verdict.perceived, path, columns=3)
    picture = _read(path)
    across, down = sheets.WIDTH + sheets.GAP, sheets.HEIGHT + sheets.CAPTION + sheets.GAP
    assert picture.shape == (2 * sheets.MARGIN + 2 * down - sheets.GAP, 2 * sheets.MARGIN + 3 * across - sheets.GAP, 3)
    for index in range(5):
        tile = _tile(picture, *divmod(index, 3), sheets.MARGIN)
        assert (tile[: sheets.HEIGHT].min(-1) < 150).sum() > 50, f"molecule {index} is not drawn"
        assert _has(tile, sheets.BAD) == (index == 2) and _has(tile, sheets.GOOD) == (index != 2)
    assert _tile(picture, 1, 2, sheets.MARGIN).min() == 255  # the sixth place is empty
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_fragments_are_marked(run, tmp_path):
    _, made, verdict = run
    perceived = [verdict.perceived[0]._replace(fragments=2, smiles="C.O")]
    molecule_sheet(made.select([0]), perceived, tmp_path / "a.png", title="title")
    tile = _tile(_read(tmp_path / "a.png"), 0, 0, sheets.MARGIN + 30)
    assert _has(tile, sheets.ODD) and not _has(tile, sheets.GOOD)
    with pytest.raises(UserError, match="a perception of each, got 5 and 1"):
        molecule_sheet(made, perceived, tmp_path / "b.png")


def test_reconstruction_sheet_has_three_tiles_a_molecule(run, tmp_path):
    judge, made, verdict = run
    path = tmp_path / "pairs.png"
    reconstruction_sheet(judge.held_out, judge.held_out_perceived, made, verdict, path, count=3)
    picture = _read(path)
    for row in range(3):
        original, made_tile, overlay = (_tile(picture, row, column, sheets.MARGIN) for column in range(3))
        assert _has(made_tile, sheets.GOOD) == (row != 2) and _has(made_tile, sheets.BAD) == (row == 2)
        grey = (abs(overlay - np.array([215, 215, 220])).max(-1) < 3).sum()
        assert grey > 20 and min(original[: sheets.HEIGHT].min(), overlay.min()) < 150
    assert picture.shape[0] == 2 * sheets.MARGIN + 3 * (sheets.HEIGHT + sheets.CAPTION + sheets.GAP) - sheets.GAP


def test_long_smiles_are_cut_to_the_tile():
    font = sheets.label_font(12)
    cut = sheets._fitted("C" * 200, font)
    assert cut.endswith("…") and font.getlength(cut) <= sheets.WIDTH
    assert sheets._fitted("CCO", font) == "CCO"
    for letter in "Å…":  # a missing letter is drawn as the font's empty box
        assert font.getmask(letter).getbbox() != font.getmask("\uffff").getbbox()


def test_histograms_are_drawn_even_for_hydrogen_alone(run, tmp_path):
    judge, made, _ = run
    path = tmp_path / "histograms.png"
    histograms(made, judge.held_out, path)
    picture = _read(path)
    assert (abs(picture - np.array([0x25, 0x63, 0xEB])).max(-1) < 8).sum() > 500
    lonely = from_arrays(np.ones((2, 1), int), np.zeros((2, 1, 3)), source="lonely")
    histograms(lonely, judge.held_out, path)
    assert _read(path).shape == picture.shape


def test_page_holds_every_molecule_and_nothing_from_outside(run, tmp_path):
    judge, made, verdict = run
    perceived = [*verdict.perceived]
    perceived[1] = failed("</script><b>")
    torn = [verdict.perceived[0], verdict.perceived[1]._replace(bonds=())]
    path = tmp_path / "page.html"
    sections = [
        generated_section(made, perceived, note="five"),
        reconstruction_section(
            judge.held_out, judge.held_out_perceived, made, replace(verdict, perceived=torn), count=2
        ),
    ]
    molecule_page(path, "A <run> & more", "source", sections)
    text = path.read_text()
    assert "<title>A &lt;run&gt; &amp; more</title>" in text
    assert not re.search(r"https?:|src=|@import|@@|url\(", text)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])
    assert [(section["title"], len(section["cards"])) for section in data] == [
        ("Generated molecules", 5),
        ("Reconstructions", 2),
    ]
    cards = data[0]["cards"]
    assert [card["mark"] for card in cards] == ["good", "bad", "bad", "good", "good"]
    assert cards[1]["note"] == "no valid molecule: </script><b>"
    assert text.count("</script>") == 2
    assert "ghost" in data[1]["cards"][0] and "ghost" not in cards[0]
    original = [number for bond in judge.held_out_perceived[1].bonds for number in bond]
    assert data[1]["cards"][1]["ghostBonds"] == original and data[1]["cards"][1]["bonds"] == []


def test_page_turns_molecules_and_never_mirrors_them(run, tmp_path):
    judge, *_ = run
    elements, positions = judge.held_out.atoms(0)
    card = Card("a", "b", "plain", elements, positions.astype(float), [], positions + 1.0)
    path = tmp_path / "page.html"
    molecule_page(path, "t", "s", [Section("one", "", [card])])
    (section,) = json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text(), re.S)[1])
    shown = np.reshape(section["cards"][0]["at"], (-1, 3))
    rotation, residual, *_ = np.linalg.lstsq(positions - positions.mean(0), shown, rcond=None)
    assert residual.max() < 1e-4 and np.linalg.det(rotation) == pytest.approx(1, abs=1e-2)
    assert np.ptp(shown[:, 0]) > np.ptp(shown[:, 2])  # long across the view, short along it
    ghost = np.reshape(section["cards"][0]["ghost"], (-1, 3))
    np.testing.assert_allclose(np.linalg.norm(ghost - shown, axis=1), 3**0.5, atol=5e-3)
